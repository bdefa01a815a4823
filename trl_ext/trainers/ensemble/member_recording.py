"""Metrics of a token-level ensemble: of each member, of their mean output, and how far members are apart.

It knows logits, labels and processes, as `trl_ext.trainers.token.recording` does, and nothing of models or of where
metrics go.
"""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from trl_ext.metrics.disagreement import member_disagreement
from trl_ext.trainers.token.objective import TokenObjective
from trl_ext.trainers.token.recording import Evaluator, Points, TrainingRecorder
from trl_ext.trainers.token.samples import MOST_SCORES


class MemberEvaluator:
    """
    The metrics of the members' mean output, of each member (`<name>_member_<m>`), and `disagreement`: the standard
    deviation over the members (divided by M) of a span's score, averaged over the spans.

    Args:
        make (`Callable[[], Evaluator]`): new, empty metrics of one model.
        objective ([`TokenObjective`]): how outputs are read.
        members (`int`): M; the points' logits are (B, L, M * C), member after member.

    Attributes:
        disagreements (`list[tuple[float, float]]`): of the first spans, disagreement and whether their mean output is
            wrong (1.0; NaN where outputs are numbers).
    """

    def __init__(self, make: Callable[[], Evaluator], objective: TokenObjective, members: int):
        self._of_mean = make()
        self._of_members = [make() for _ in range(members)]
        self._objective = objective
        self._spread, self._spans = 0.0, 0
        self.disagreements: list[tuple[float, float]] = []

    def add(self, points: Points) -> None:
        """Take more rows."""
        logits = by_member(points.logits, len(self._of_members))  # (M, B, L, C)
        mean = points._replace(logits=logits.mean(0))
        self._of_mean.add(mean)
        for evaluator, own in zip(self._of_members, logits, strict=True):
            evaluator.add(points._replace(logits=own))
        spread = member_disagreement(self._objective.scores(logits).double())[points.mask]  # (spans,)
        self._spread += spread.sum().item()
        self._spans += len(spread)
        room = max(0, MOST_SCORES - len(self.disagreements))
        wrong = ~self._objective.hits(mean.logits, {"token_labels": points.labels})[points.mask]
        wrong = torch.full_like(spread, torch.nan) if self._objective.is_number else wrong.double()
        self.disagreements.extend(zip(spread[:room].tolist(), wrong[:room].tolist(), strict=True))

    def summary(self) -> dict[str, float]:
        """The metrics by name."""
        values = {**self._of_mean.summary(), "disagreement": self._spread / self._spans if self._spans else math.nan}
        for member, evaluator in enumerate(self._of_members):
            values |= {f"{name}_member_{member}": value for name, value in evaluator.summary().items()}
        return values


class MemberTrainingRecorder(TrainingRecorder):
    """
    Besides, loss and accuracy of each member between two log entries.

    Args:
        accelerator (`Accelerator`): for adding up over processes.
        is_number (`bool`): labels are numbers, so that there is no accuracy.
    """

    def __init__(self, accelerator: Accelerator, is_number: bool):
        super().__init__(accelerator)
        self._is_number = is_number
        self._new: torch.Tensor | None = None  # (4, M)
        self._sums: torch.Tensor | None = None

    def add_members(self, losses: torch.Tensor, items: torch.Tensor, hits: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Take a batch: loss terms and what divides them, labels that were predicted right and all labels, each summed
        over the rows that a member counts, (M,).
        """
        sums = torch.stack([tensor.float() for tensor in (losses, items, hits, labels)])
        self._new = sums if self._new is None else self._new + sums

    def flush(self) -> None:
        """Add up over processes. With several of them a collective operation: all call it, or none."""
        super().flush()
        if self._new is None:
            return
        sums = self._accelerator.reduce(self._new, reduction="sum").cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._new = None

    def of_members(self) -> dict[str, float]:
        """`loss_member_<m>` and `accuracy_member_<m>` since the last call; of a member without labels, none."""
        if self._sums is None:
            return {}
        losses, items, hits, labels = self._sums
        values = {"loss": losses / items, **({} if self._is_number else {"accuracy": hits / labels})}
        self._sums = None
        return {
            f"{name}_member_{member}": value
            for name, each in values.items()
            for member, value in enumerate(each.tolist())
            if not math.isnan(value)
        }


def by_member(logits: torch.Tensor, members: int) -> torch.Tensor:
    """Logits (..., M * C), member after member, as (M, ..., C)."""
    return logits.unflatten(-1, (members, -1)).movedim(-2, 0)
