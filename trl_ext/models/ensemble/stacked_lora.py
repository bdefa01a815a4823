"""Layers that hold one LoRA adapter, or one head, for each of M ensemble members and apply them all by batched matmul.

Rows come *member-major*: all rows of member 0, then all of member 1, and so on. The members share the base layer under
the adapters, which sees all rows at once. These layers know tensors and linear layers. `stacked_model.py` reads and
writes PEFT files, repeats a batch for the members, and scores with all of them.

Letters: `M` members, `N` rows in all (of any leading shape), `d` inputs, `o` outputs, `r` rank.
"""

import math

import torch
from torch import nn


class MemberRows:
    """
    Maps the rows of a batch to ensemble members. All stacked layers of a model share one object.

    Args:
        members (`int`): M.

    Attributes:
        shares (`list[int]`, *optional*): how many rows of the current batch belong to each member, in any unit (rows,
            sequences, tokens); `None` if all members have equally many.
        alone (`int`, *optional*): the only member that all rows belong to.
    """

    def __init__(self, members: int):
        self.members = members
        self.shares: list[int] | None = None
        self.alone: int | None = None
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def use(self, shares: list[int] | None = None, alone: int | None = None) -> None:
        """Set the members that the rows of the next batch belong to."""
        self.shares = None if shares is None or len(set(shares)) == 1 else shares
        self.alone = alone
        self._places.clear()

    def weights(self, stacked: torch.Tensor) -> torch.Tensor:
        """The weights of all members, or of the only one in use: (M or 1, ...)."""
        return stacked if self.alone is None else stacked[self.alone : self.alone + 1]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) member-major -> (M, n, d); members with fewer rows than n get a copy of some row instead."""
        count = 1 if self.alone is not None else self.members
        if self.shares is None or self.alone is not None:
            return x.reshape(count, -1, x.shape[-1])
        return x.reshape(-1, x.shape[-1])[self._place(x)[0]]

    def join(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(M, n, o) -> (..., o); undoes `split`, so that each row is where it was in `x`."""
        if self.shares is not None and self.alone is None:
            y = y.flatten(0, 1)[self._place(x)[1]]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _place(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of each member's rows, (M, n), and the position of each row among them, (N,)."""
        rows = x.numel() // x.shape[-1]
        if rows not in self._places:
            shares = torch.tensor(self.shares)
            lengths = shares * (rows // int(shares.sum()))  # (M,)
            if int(lengths.sum()) != rows:
                raise ValueError(f"{rows} rows cannot be divided among the members in the ratio {self.shares}.")
            starts = lengths.cumsum(0) - lengths
            within = torch.arange(int(lengths.max()))
            index = (starts[:, None] + within).clamp(max=rows - 1)  # (M, n)
            real = (within < lengths[:, None]).flatten()
            self._places[rows] = (index.to(x.device), real.nonzero()[:, 0].to(x.device))
        return self._places[rows]


class StackedLoRA(nn.Module):
    """
    A frozen linear layer with a LoRA adapter for each member: y = base(x) + s B_m A_m x for the rows x of member m.

    Args:
        base_layer (`nn.Module`): the layer under the adapters: `nn.Linear`, transformers' `Conv1D`, or one of
            bitsandbytes; it sees all rows at once.
        lora_A (`torch.Tensor` of shape `(M, r, d)`), lora_B (`torch.Tensor` of shape `(M, o, r)`): the adapters.
        scaling (`float`): s, e.g. alpha / r.
        dropout (`float`): probability with which an input of the adapters is dropped in training.
        rows ([`MemberRows`]): which member each row belongs to.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        dropout: float,
        rows: MemberRows,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer(x)  # (..., o)
        inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)
        inputs = self.rows.split(self.dropout(inputs))  # (M, n, d)
        A, B = self.rows.weights(self.lora_A), self.rows.weights(self.lora_B)
        change = torch.bmm(torch.bmm(inputs, A.transpose(1, 2)) * self.scaling, B.transpose(1, 2))  # (M, n, o)
        return base + self.rows.join(change, x).to(base.dtype)

    def extra_repr(self) -> str:
        members, rank, _ = self.lora_A.shape
        return f"members={members}, r={rank}, scaling={self.scaling}"


class StackedLinear(nn.Module):
    """
    A linear layer of the head for each member; it computes in fp32 whatever the autocast state and the input's dtype.

    Args:
        weight (`torch.Tensor` of shape `(M, o, d)`), bias (`torch.Tensor` of shape `(M, o)`, *optional*): fp32.
        rows ([`MemberRows`]): which member each row belongs to.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: MemberRows):
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = None if bias is None else nn.Parameter(bias.float())
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            inputs = self.rows.split(x.float())  # (M, n, d)
            output = torch.bmm(inputs, self.rows.weights(self.weight).transpose(1, 2))  # (M, n, o)
            if self.bias is not None:
                output = output + self.rows.weights(self.bias)[:, None]
            return self.rows.join(output, x)

    def extra_repr(self) -> str:
        return "members={}, out_features={}, in_features={}".format(*self.weight.shape)


def clip_by_member(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """
    Scale each member's gradients so that their norm is at most `max_norm`, as M separate runs would.

    Args:
        parameters (`list[nn.Parameter]`): stacked parameters, (M, ...) each; those without a gradient are skipped.
        max_norm (`float`): largest norm; with infinity the norms are measured and nothing is scaled.

    Returns:
        `torch.Tensor` of shape `(M,)`: the norms before scaling.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = [gradient.float().flatten(1).square().sum(1) for gradient in gradients]  # (M,) each
    norms = torch.stack(squares).sum(0).sqrt()
    if max_norm < math.inf:
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # torch's rule
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
    return norms
