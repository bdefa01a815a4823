"""Metrics of rankings over many forward passes and processes. Every group counts once.

It knows scores, ratings and processes. It knows nothing of models, losses, or where metrics go. The recorder collects
the passes and computes their metrics together, so that a training step neither computes metrics nor waits for the GPU.
"""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn.functional import pad
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.metrics.ranking import StreamedMetrics, ranking_columns, ranking_summary


PASSES_AT_ONCE = 64
"""Forward passes that are collected before their metrics are computed. It bounds the memory and changes no value."""


class ScoredBatch(NamedTuple):
    """Scores, ratings, mask and lengths (B, K), and losses and rows (B,), of one forward pass."""

    scores: torch.Tensor
    ratings: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    losses: torch.Tensor
    rows: torch.Tensor
    more: dict[str, torch.Tensor] = {}
    """More numbers of each group, (B,) each, NaN where undefined. Their means become metrics."""


def signed_ratings(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The ratings (B, K) of a batch, with the sign of each soft preference.

    A soft preference (`target`) below one half prefers the second of a pair, so the ratings of that pair change their
    sign. With exactly one half, both ratings become 0: neither is preferred.
    """
    if "target" not in batch:
        return batch["ratings"]
    return batch["ratings"] * (batch["target"][:, None] - 0.5).sign()


class GroupRecorder:
    """
    Collects scored groups and computes their metrics over all processes.

    Args:
        accelerator (`Accelerator`): gathers values from all processes.
        evaluation (`bool`): gather every pass at once, and leave out groups that only fill up the last batch.
        stream (`bool`, *optional*, defaults to `False`): the number of rows is not known, so the recorder finds
            repeated rows by their index.
    """

    def __init__(self, accelerator: Accelerator, evaluation: bool, stream: bool = False):
        self._accelerator = accelerator
        self._evaluation = evaluation
        self._seen: set[int] | None = set() if stream else None
        self._pending: list[ScoredBatch] = []
        self._more: dict[str, None] = {}  # names, in order
        self._metrics = StreamedMetrics()
        self._new_tokens = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.tokens = 0

    def count_tokens(self, tokens: torch.Tensor | int) -> None:
        """Add the real tokens of a pass, a scalar, to `tokens` at the next flush."""
        self._new_tokens = self._new_tokens + tokens

    def add(self, batch: ScoredBatch) -> None:
        """Add the groups of one forward pass. Every process must call this equally often."""
        self._pending.append(batch)
        each = self._evaluation and self._accelerator.num_processes > 1
        if each or len(self._pending) >= PASSES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Compute the metrics of the collected passes. A collective operation: all processes call it, or none."""
        if not self._pending:
            return
        more = {name: torch.cat([batch.more[name] for batch in self._pending]) for name in self._pending[0].more}
        self._more.update(dict.fromkeys(more))
        columns = {**self._columns(), **more, "loss": torch.cat([batch.losses.float() for batch in self._pending])}
        values = torch.stack(list(columns.values()), dim=1)  # (B, columns)
        rows = torch.cat([batch.rows for batch in self._pending])  # (B,)
        self._pending.clear()
        if not self._evaluation:
            self.tokens += int(self._accelerator.reduce(self._new_tokens, reduction="sum"))
            self._new_tokens = torch.zeros_like(self._new_tokens)
        if self._accelerator.num_processes > 1:
            if self._evaluation:
                values, rows = self._accelerator.gather_for_metrics((values, rows))
            else:  # NaN means undefined, so rows of padding change nothing
                values = self._accelerator.gather(
                    self._accelerator.pad_across_processes(values, dim=0, pad_index=float("nan"))
                )
        if self._seen is not None:
            values = values[self._first_time(rows.tolist())]
        self._metrics.add(dict(zip(columns, values.unbind(dim=1), strict=True)))

    def summary(self) -> dict[str, float]:
        """The metrics since the last call, and `loss`. A metric that no group defines is left out."""
        metrics, self._metrics = self._metrics, StreamedMetrics()
        if not metrics.count("candidates"):
            return {}
        values = {"loss": metrics.mean("loss"), **ranking_summary(metrics)}
        values |= {name: metrics.mean(name) for name in self._more}
        return {name: value for name, value in values.items() if value == value}

    def _columns(self) -> dict[str, torch.Tensor]:
        width = max(batch.mask.shape[1] for batch in self._pending)

        def together(name: str) -> torch.Tensor:
            tensors = [batch._asdict()[name] for batch in self._pending]
            return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])  # (B, K)

        return ranking_columns(*(together(name) for name in ("scores", "ratings", "mask", "lengths")))

    def _first_time(self, rows: list[int]) -> list[int]:
        """The positions of rows that were not seen before."""
        fresh = []
        for position, row in enumerate(rows):
            if row not in self._seen:
                self._seen.add(row)
                fresh.append(position)
        return fresh


class RecordingCallback(TrainerCallback):
    """Makes the training recorder compute its metrics before logging, in all processes at the same time."""

    def __init__(self, recorder: GroupRecorder):
        self.recorder = recorder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if control.should_log:
            self.recorder.flush()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.recorder.flush()
