"""Outputs at labelled tokens of many forward passes -> metrics of them all, in bounded memory.

Knows logits, labels and processes. Of a batch of the evaluation only the outputs at labelled tokens are kept, and
those only until they are counted. Knows nothing of models, losses or where metrics go.
"""

import math
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator

from trl_ext.metrics.streams import ExactSum


class Points(NamedTuple):
    """
    The labelled spans of B rows, at most L each: the model's output at the last labelled token of each.

    Args:
        logits (`torch.Tensor` of shape `(B, L, C)`): outputs for the span's category.
        labels (`torch.Tensor` of shape `(B, L)`): labels.
        categories, steps (`torch.Tensor` of shape `(B, L)`): category, and which step or segment of the row it is.
        mask (`torch.BoolTensor` of shape `(B, L)`): True where there is a span.
        unannotated (`torch.BoolTensor` of shape `(B, S)`): True for the steps of which no label is shown.
        questions (`torch.LongTensor` of shape `(B,)`, *optional*): a number of the prompt.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    categories: torch.Tensor
    steps: torch.Tensor
    mask: torch.Tensor
    unannotated: torch.Tensor
    questions: torch.Tensor | None = None


class Evaluator(Protocol):
    """What turns labelled spans into metrics."""

    def add(self, points: Points) -> None: ...

    def summary(self) -> dict[str, float]: ...


def labelled_points(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> Points:
    """
    The output at the last labelled token of each span: with a label on each token of a span, it still counts once.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, C)`): outputs for every token and category.
        batch (`dict`): what `TokenRewardCollator` returns.
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
    Counts the labelled spans of an evaluation, each row once, whatever the batches and processes.

    Args:
        accelerator (`Accelerator`): for gathering.
        evaluator ([`Evaluator`]): makes the metrics.
        by_row (`bool`): the loss is averaged over rows, each divided by its labels first; else over labels.
        stream (`bool`): the rows have no known number, so that repeated ones are told by their index.
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
        Take a batch. With several processes a collective operation.

        Args:
            points ([`Points`]): its labelled spans.
            sums (`torch.Tensor` of shape `(B,)`, or `(B, M)` of M members): loss summed over the labels of each row.
            labels, rows (`torch.Tensor` of shape `(B,)`): their number, and the row in its data set.
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
        """`loss` (of members their mean, and each) and the evaluator's metrics, those that are defined."""
        losses = [float(loss.value()) / self._items for loss in self._losses if self._items]
        values = {"loss": sum(losses) / len(losses) if losses else math.nan}
        if len(losses) > 1:
            values |= {f"loss_member_{member}": loss for member, loss in enumerate(losses)}
        values |= self._evaluator.summary()
        return {name: value for name, value in values.items() if not math.isnan(value)}


class TrainingRecorder:
    """
    Counts labels that were predicted right, and tokens, between two log entries. Nothing waits for the GPU before.

    Args:
        accelerator (`Accelerator`): for adding up over processes.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._counts: torch.Tensor | None = None
        self._hits = self._labels = 0
        self.tokens = 0

    def add(self, hits: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> None:
        """
        Take a batch.

        Args:
            hits (`torch.BoolTensor` of shape `(B, T, G)`): whether the prediction is the label.
            mask (`torch.BoolTensor` of shape `(B, T, G)`): True where a label is given.
            tokens (`torch.Tensor` of shape `()`): number of real tokens.
        """
        counts = torch.stack([(hits & mask).sum(), mask.sum(), tokens])
        self._counts = counts if self._counts is None else self._counts + counts

    def flush(self) -> None:
        """Add up over processes. With several of them a collective operation: all call it, or none."""
        if self._counts is None:
            return
        hits, labels, tokens = self._accelerator.reduce(self._counts, reduction="sum").tolist()
        self._counts = None
        self._hits, self._labels, self.tokens = self._hits + hits, self._labels + labels, self.tokens + tokens

    def accuracy(self) -> float | None:
        """Share of the labels since the last call that were predicted right; `None` if there were none."""
        hits, labels = self._hits, self._labels
        self._hits = self._labels = 0
        return hits / labels if labels else None


def real_scores(scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, T, G) as (B, T * G), 0 where there is no real token, and the mask of the real ones."""
    mask = batch["attention_mask"].bool()[..., None].expand_as(scores).flatten(1)  # (B, T * G)
    return torch.where(mask, scores.flatten(1), 0.0), mask
