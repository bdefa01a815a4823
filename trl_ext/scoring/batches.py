"""Runs a reward model on lists of token ids, in batches that fit in memory, and returns the outputs of its head.

It knows a model, token ids and memory. It knows nothing of text, sidecars or what an output means.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from trl_ext.data.collators import FLAT_BELOW, padded
from trl_ext.data.prefix_layout import build_layout
from trl_ext.data.tokenization import Prompt
from trl_ext.models.heads import (
    HeadError,
    features_as_output,
    run_with_head_output,
    token_logits_at_last,
    unwrap,
)
from trl_ext.models.rope import length_class, reset_rope
from trl_ext.models.shared_prefix import current_attention, flat_scores, select_attention, use_shared_prefix
from trl_ext.scoring.packing import SharedRows, num_tokens, pack, padded_tokens, share_prompts


RUNNING = threading.RLock()
"""Held while a model scores, because all threads share the model's mode, attention and hooks."""


class BatchRunner:
    """
    Runs rows sorted by length. When a batch does not fit in memory, it halves all batches from then on.

    With dynamic or longrope RoPE the rotary positions of a row depend on the longest row in its batch. Rows up to the
    original context and longer rows therefore run in separate batches, so that no score depends on the other rows.

    Args:
        model (`nn.Module`): the reward model.
        pad_id (`int`): any token id of the model; padding is masked.
        limit (`int`): largest number of padded tokens, or of rows, in a batch.
        by_tokens (`bool`): whether `limit` counts tokens (else rows).
        shared_prefix (`"auto"`, `True` or `False`): whether rows of one prompt run as one flat row.
        max_length (`int` or `None`): longest row in tokens, if there is a limit.
        say (`Callable`): takes a message and its topic, and logs it once per topic.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        limit: int,
        by_tokens: bool,
        shared_prefix: bool | Literal["auto"],
        max_length: int | None,
        say: Callable[[str, str], None],
    ):
        self._model = model
        self._pad_id = pad_id
        self._limit = limit
        self._by_tokens = by_tokens
        self._say = say
        self._attention = current_attention(model)
        self._class_of = length_class(unwrap(model).config)
        # "auto" is decided when the first rows share a prompt
        self._flat = None if shared_prefix == "auto" else use_shared_prefix(model, shared_prefix, max_length)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """
        Put the model in eval mode without gradients or autocast, with a pad token if it needs one for batches. Other
        threads wait.
        """
        with RUNNING:
            model = self._model
            training = [module for module in model.modules() if module.training]
            config = unwrap(model).config.get_text_config()
            before, self._attention = config.pad_token_id, current_attention(model)
            model.eval()
            config.pad_token_id = self._pad_id if before is None else before
            try:
                # not inference mode: tensors that the model caches there could not be used in training
                with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
                    yield
            finally:
                config.pad_token_id = before
                select_attention(model, self._attention)
                for module in training:
                    module.training = True

    def scores(self, prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[float | None]:
        """
        The scalar score of each list of token ids; `None` for an empty list. Call it inside `mode`. A stacked model
        gives a list with the score of each member.
        """
        return self._last_outputs(prompts, ids, lambda logits, rows: _by_row(logits[:, 0], rows))

    def features(self, prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[torch.Tensor | None]:
        """
        What the head's output layer gets for each list of token ids, (H,) in fp32 on the CPU; `None` for an empty
        list. Call it inside `mode`.
        """
        with features_as_output(self._model):
            return self._last_outputs(prompts, ids, lambda outputs, rows: list(outputs.cpu()))

    def _last_outputs(
        self,
        prompts: Sequence[Prompt] | None,
        ids: Sequence[list[int]],
        by_row: Callable[[torch.Tensor, int], list[Any]],
    ) -> list[Any]:
        """Run the rows, flat where that saves tokens; `by_row` divides a batch's outputs at the last token by row."""
        groups = share_prompts(prompts, ids)
        one_class = len({self._class_of(len(row)) for row in ids if row}) <= 1
        if groups and one_class and self._pays_flat(groups, ids):
            return self._run(groups, len(ids), lambda batch: by_row(*self._flat_batch(batch)), flat=True)
        single = _single(groups, ids)
        return self._run(single, len(ids), lambda batch: by_row(*self._padded_batch(_ids(batch))), flat=False)

    def token_outputs(self, prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[torch.Tensor | None]:
        """
        The head's output for each token, (T, outputs) in fp32 on the CPU; `None` for an empty list. `prompts` are not
        used. Call it inside `mode`.
        """
        rows = _single(share_prompts(None, ids), ids)
        return self._run(rows, len(ids), lambda batch: self._token_batch(_ids(batch)), flat=False)

    # ------------------------------------------------------------------------------------------------------- batches
    def _run(
        self, todo: list[SharedRows], size: int, run: Callable[[list[SharedRows]], list[Any]], flat: bool
    ) -> list[Any]:
        """Call `run` on batches of `todo` that fit in memory; return a list of `size` with each result at its row."""
        results: list[Any] = [None] * size
        while todo:
            classes: dict[int, list[SharedRows]] = {}
            for group in todo:
                classes.setdefault(self._class_of(group.longest), []).append(group)
            batches = [batch for groups in classes.values() for batch in pack(groups, *self._bounds(), flat)]
            while batches:
                reset_rope(self._model)
                rows = [row for group in batches[0] for row in group.rows]
                found = _unless_out_of_memory(partial(run, batches[0]))
                if found is None:
                    self._halve(len(rows), num_tokens(batches[0], flat))
                    break
                for row, result in zip(rows, found, strict=True):
                    results[row] = result
                del batches[0]
            todo = [group for batch in batches for group in batch]
        return results

    def _pays_flat(self, groups: list[SharedRows], ids: Sequence[list[int]]) -> bool:
        """Whether sharing prompts saves enough tokens and the model supports it (checked at the first need)."""
        if self._flat is False or all(len(group.rows) == 1 for group in groups):
            return False
        lengths = [len(ids[row]) for group in groups for row in group.rows]
        batch_rows = max(1, self._limit // max(lengths)) if self._by_tokens else self._limit
        packed = sum(num_tokens(batch, flat=True) for batch in pack(groups, *self._bounds(), flat=True))
        if packed >= FLAT_BELOW * padded_tokens(lengths, batch_rows):
            return False
        if self._flat is None:
            self._flat = use_shared_prefix(self._model, "auto", max(lengths))
        return self._flat

    def _bounds(self) -> tuple[int | None, int | None]:
        """The largest number of tokens and of rows in a batch."""
        return (self._limit, None) if self._by_tokens else (None, self._limit)

    def _flat_batch(self, batch: list[SharedRows]) -> tuple[torch.Tensor, int]:
        """The outputs at the last token of each row, (N, C), and the number of rows."""
        device = next(self._model.parameters()).device
        layout = build_layout([(group.prefix, group.own) for group in batch]).to(device)
        return flat_scores(self._model, layout, call=self._plain_call()), len(layout.last)

    def _padded_batch(self, ids: list[Sequence[int]]) -> tuple[torch.Tensor, int]:
        return token_logits_at_last(self._model, *self._pad(ids), call=self._plain_call()), len(ids)

    def _token_batch(self, ids: list[Sequence[int]]) -> list[torch.Tensor]:
        _, raw = run_with_head_output(self._model, *self._pad(ids), call=self._plain_call())
        if raw.dim() != 3:
            raise HeadError(
                f"The head of {type(unwrap(self._model)).__name__} runs after pooling, so there is no output for each "
                "token. Train it with a trainer of trl_ext, which gives encoders a token-level head."
            )
        outputs = raw.float().cpu()  # (N, T, outputs)
        return [outputs[number, : len(row)].clone() for number, row in enumerate(ids)]  # a view would keep the batch

    def _pad(self, ids: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, (N, T), padded on the right. Also switches to the attention for padded batches."""
        device = next(self._model.parameters()).device
        batch = padded(ids, self._pad_id)
        select_attention(self._model, self._attention)
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def _plain_call(self) -> Callable:
        # the forward of the class: a trainer replaces that of the instance by one with autocast
        return partial(type(self._model).forward, self._model)

    def _halve(self, rows: int, tokens: int) -> None:
        if rows == 1:
            raise torch.OutOfMemoryError(
                f"A single row of {tokens} tokens does not fit in memory. Pass `max_length`, load the model in fewer "
                "bits, or free memory on the device."
            )
        self._limit = tokens // 2 if self._by_tokens else rows // 2
        self._say(
            f"a batch of {rows} rows and {tokens} tokens did not fit in memory. Batches now have at most "
            f"{self._limit} {'tokens' if self._by_tokens else 'rows'}, and are halved again if needed.",
            "memory",
        )


def _by_row(scores: torch.Tensor, rows: int) -> list[Any]:
    """Scores (N,) as numbers; scores (M * N,) of a stacked model, member by member, as a list of M for each row."""
    return scores.tolist() if len(scores) == rows else scores.view(-1, rows).T.tolist()


def _single(groups: list[SharedRows], ids: Sequence[list[int]]) -> list[SharedRows]:
    """Split groups into one group for each row."""
    return [SharedRows([row], [], [ids[row]]) for group in groups for row in group.rows]


def _ids(batch: list[SharedRows]) -> list[Sequence[int]]:
    """Token ids of a batch of single rows."""
    return [group.own[0] for group in batch]


def _unless_out_of_memory(run: Callable[[], list[Any]]) -> list[Any] | None:
    """What `run` returns, or `None` if it does not fit in memory."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # the traceback keeps the batch's tensors alive, so their memory is free only after this block
    torch.cuda.empty_cache()
    return None
