"""Metrics of labelled tokens over many forward passes and processes, in bounded memory.

It knows logits, labels and processes. It keeps only the outputs at labelled tokens, and only until they are counted.
It knows nothing of models, losses or where metrics go.
"""

import math
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator

from trl_ext.metrics.streams import ExactSum


class Points(NamedTuple):
    """
    The labelled spans of B rows, at most L in a row, with the model's output at the last labelled token of each span.

    Args:
        logits (`torch.Tensor` of shape `(B, L, C)`): outputs for the span's category.
        labels (`torch.Tensor` of shape `(B, L)`): labels.
        categories, steps (`torch.Tensor` of shape `(B, L)`): the category, and the number of the step or segment.
        mask (`torch.BoolTensor` of shape `(B, L)`): True where there is a span.
        unannotated (`torch.BoolTensor` of shape `(B, S)`): True for steps without a label.
        questions (`torch.LongTensor` of shape `(B,)`, *optional*): a number that identifies the prompt.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    categories: torch.Tensor
    steps: torch.Tensor
    mask: torch.Tensor
    unannotated: torch.Tensor
    questions: torch.Tensor | None = None


class Evaluator(Protocol):
    """Turns labelled spans into metrics."""

    def add(self, points: Points) -> None: ...

    def summary(self) -> dict[str, float]: ...


def labelled_points(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> Points:
    """
    The output at the last labelled token of each span. A span counts once, even if all of its tokens have a label.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, C)`): outputs for every token and category.
        batch (`dict`): a batch of `TokenRewardCollator`.
    """
    rows, categories, tokens = batch["label_mask"].transpose(1, 2).nonzero(as_tuple=True)  # (n,) in this order
    steps = batch["label_steps"][rows, tokens, categories]  # (n,)
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = (rows[1:] != rows[:-1]) | (categories[1:] != categories[:-1]) | (steps[1:] != steps[:-1])
    rows, categories, tokens, steps = rows[last], categories[last], tokens[last], steps[last]

    counts = rows.bincount(minlength=len(logits))  # (B,)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = max(1, int(counts.max()))  # never 0: gloo cannot gather a tensor without elements

    def spread(values: torch.Tensor) -> torch.Tensor:
        result = values.new_zeros(len(logits), width, *values.shape[1:])
        result[rows, slots] = values
        return result

    return Points(
        logits=spread(logits[rows, tokens, categories].float()),
        labels=spread(batch["token_labels"][rows, tokens, categories]),
        categories=spread(categories),
        steps=spread(steps),
        mask=spread(torch.ones_like(rows, dtype=torch.bool)),
        unannotated=batch.get("unannotated_steps", rows.new_zeros(len(logits), 1, dtype=torch.bool)),
        questions=batch.get("question"),
    )


class EvaluationRecorder:
    """
    Collects the labelled spans of an evaluation. Every row counts once, with any batch size and any processes.

    Args:
        accelerator (`Accelerator`): gathers values from all processes.
        evaluator ([`Evaluator`]): computes the metrics.
        by_row (`bool`): average the loss of each row over its labels first, then over rows. Otherwise over labels.
        stream (`bool`): the number of rows is not known, so the recorder finds repeated rows by their index.
    """

    def __init__(self, accelerator: Accelerator, evaluator: Evaluator, by_row: bool, stream: bool):
        self._accelerator = accelerator
        self._evaluator = evaluator
        self._by_row = by_row
        self._seen: set[int] | None = set() if stream else None
        self._losses: list[ExactSum] = []  # one, or one for each member of an ensemble
        self._items = 0

    def add(self, points: Points, sums: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> None:
        """
        Add a batch. A collective operation: all processes call it, or none.

        Args:
            points ([`Points`]): the labelled spans of the batch.
            sums (`torch.Tensor` of shape `(B,)`, or `(B, M)` for M members): loss of each row, summed over its labels.
            labels, rows (`torch.Tensor` of shape `(B,)`): number of labels, and row number in the data set.
        """
        points, sums, labels, rows = self._gather(points, sums, labels, rows)
        self._evaluator.add(points)
        sums = sums.double().view(len(labels), -1)  # (B, M)
        if self._by_row:
            sums, labels = sums / labels.clamp(min=1)[:, None], labels.clamp(max=1)
        self._losses = self._losses or [ExactSum() for _ in range(sums.shape[1])]
        for loss, values in zip(self._losses, sums.unbind(1), strict=True):
            loss.add(values.tolist())
        self._items += int(labels.sum())

    def _gather(
        self, points: Points, sums: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
    ) -> tuple[Points, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._accelerator.num_processes > 1:
            asked = points.questions is not None
            numbers = torch.stack([labels, rows, points.questions if asked else rows], dim=1)  # (B, 3)
            spans = torch.stack([points.labels, points.categories, points.steps, points.mask], dim=-1).float()
            spans, unannotated = self._accelerator.pad_across_processes(
                (torch.cat([points.logits, spans], dim=-1), points.unannotated.float()), dim=1
            )
            spans, unannotated, sums, numbers = self._accelerator.gather_for_metrics(
                (spans, unannotated, sums, numbers)
            )
            logits, (targets, categories, steps, mask) = spans[..., :-4], spans[..., -4:].unbind(-1)
            labels, rows, questions = numbers.unbind(1)
            points = Points(
                logits, targets, categories.long(), steps.long(), mask.bool(), unannotated.bool(),
                questions if asked else None,
            )  # fmt: skip
        points = Points(*(value if value is None else value.cpu() for value in points))
        sums, labels, rows = sums.cpu(), labels.cpu(), rows.cpu()
        if self._seen is not None:
            first = [row not in self._seen and not self._seen.add(row) for row in rows.tolist()]
            points = Points(*(value if value is None else value[first] for value in points))
            sums, labels, rows = sums[first], labels[first], rows[first]
        return points, sums, labels, rows

    def summary(self) -> dict[str, float]:
        """`loss` (for members their mean and each one's) and the evaluator's metrics. Undefined ones are left out."""
        losses = [float(loss.value()) / self._items for loss in self._losses if self._items]
        values = {"loss": sum(losses) / len(losses) if losses else math.nan}
        if len(losses) > 1:
            values |= {f"loss_member_{member}": loss for member, loss in enumerate(losses)}
        values |= self._evaluator.summary()
        return {name: value for name, value in values.items() if not math.isnan(value)}


class TrainingRecorder:
    """
    Counts correctly predicted labels, and tokens, between two log entries. It does not wait for the GPU in between.

    Args:
        accelerator (`Accelerator`): sums over processes.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._counts: torch.Tensor | None = None
        self._hits = self._labels = 0
        self.tokens = 0

    def add(self, hits: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            hits (`torch.BoolTensor` of shape `(B, T, G)`): whether the prediction matches the label.
            mask (`torch.BoolTensor` of shape `(B, T, G)`): True where a label is given.
            tokens (`torch.Tensor` of shape `()`): number of real tokens.
        """
        counts = torch.stack([(hits & mask).sum(), mask.sum(), tokens])
        self._counts = counts if self._counts is None else self._counts + counts

    def flush(self) -> None:
        """Sum over processes. A collective operation: all processes call it, or none."""
        if self._counts is None:
            return
        hits, labels, tokens = self._accelerator.reduce(self._counts, reduction="sum").tolist()
        self._counts = None
        self._hits, self._labels, self.tokens = self._hits + hits, self._labels + labels, self.tokens + tokens

    def accuracy(self) -> float | None:
        """Share of the labels since the last call that were predicted correctly. `None` if there were no labels."""
        hits, labels = self._hits, self._labels
        self._hits = self._labels = 0
        return hits / labels if labels else None


def real_scores(scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten scores (B, T, G) to (B, T * G), with 0 at padding. Also returns the mask of real tokens."""
    mask = batch["attention_mask"].bool()[..., None].expand_as(scores).flatten(1)  # (B, T * G)
    return torch.where(mask, scores.flatten(1), 0.0), mask
