"""Streamed metrics of token-level reward models: outcomes, steps and segments.

Fill each class batch by batch with `add` and read it with `summary`, which always has the same keys, with NaN for a
metric that is not defined on the data. Memory stops growing at a fixed size (a few MB with the default capacities),
and results do not depend on batch size or on the order of the rows. With several processes, gather each batch and add
it in every process.

Scores are log-odds of *right*, or any score that is higher for better and has a `threshold` between the two classes.
[`log_odds`] computes them from the logits of two or three classes. Prefer log-odds to probabilities, which can hardly
be told apart near 1. A label above one half is *right*, so labels may be 1 / 0, +1 / -1 or probabilities. Scores and
labels must be finite where the mask is True (scorers check this). Masked values do not change the result.

This module knows nothing of models, tokens' text, losses, trainers or processes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from trl_ext.metrics.streams import CAPACITY, Calibration, ClassCounts, ExactSum, PairCounts


NAMES = ["wrong", "right"]


def log_odds(logits: torch.Tensor, positive: Sequence[int] = (-1,)) -> torch.Tensor:
    r"""
    Log-odds of some classes against the others, computed from logits and not from probabilities.

    $$
    \log \frac{P}{1 - P} = \log \sum_{c \in positive} e^{z_c} - \log \sum_{c \notin positive} e^{z_c}
    $$

    Args:
        logits (`torch.Tensor` of shape `(..., C)`):
            For C = 1 the result is the logit itself.
        positive (sequence of `int`, *optional*, defaults to `(-1,)`):
            Classes that count as right; by default the last one. With three classes for the step labels -1, 0, 1,
            `(1, 2)` counts neutral steps as right.

    Returns:
        `torch.Tensor` of shape `(...)`, at least fp32. Its sigmoid is the probability.

    Raises:
        ValueError: every class, or none, is positive.

    Example:

    ```python
    >>> log_odds(torch.tensor([0.0, 0.0, 2.0]))  # 2 - log 2
    tensor(1.3069)
    ```
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes = logits.shape[-1]
    if classes == 1:
        return logits[..., 0]
    chosen = {index % classes for index in positive}
    others = [index for index in range(classes) if index not in chosen]
    if not chosen or not others:
        raise ValueError(f"Some of the {classes} classes must be positive and some not, found {list(positive)}.")
    return logits[..., sorted(chosen)].logsumexp(-1) - logits[..., others].logsumexp(-1)


def harmonic_mean(first: float, second: float) -> float:
    """Harmonic mean of two numbers of at least 0: 0 if either is 0, NaN if either is NaN."""
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return 2 * first * second / (first + second) if first + second else 0.0


class BinaryStream:
    """
    Metrics of a two-class score over any number of positions: outcomes, or segments with a label.

    Args:
        threshold (`float`, *optional*, defaults to `0.0`):
            A score above the threshold predicts *right*; a score equal to it does not. Log-odds of 0 are a probability
            of one half.
        calibrated (`bool`, *optional*, defaults to `True`):
            Whether sigmoid(score) is a probability and labels are in [0, 1]. Set it to `False` for a hinge loss.
        capacity (`int`, *optional*, defaults to `65_536`):
            Distinct pairs of score and label up to which the AUC is exact.

    Example:

    ```python
    >>> stream = BinaryStream()
    >>> stream.add(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0]))
    >>> stream.summary()["auc"], stream.summary()["right_precision"]
    (1.0, 0.5)
    ```
    """

    def __init__(self, threshold: float = 0.0, calibrated: bool = True, capacity: int = CAPACITY):
        self.threshold = threshold
        self._counts = ClassCounts(NAMES)
        self._pairs = PairCounts(capacity)
        self._calibration = Calibration() if calibrated else None

    def add(self, scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """
        Add positions.

        Args:
            scores, labels (`torch.Tensor`, both of one shape):
                Score and label of each position, in any shape.
            mask (`torch.BoolTensor` of the same shape, *optional*):
                True for a position with a label. All positions by default.
        """
        scores, labels = _taken(mask, scores, labels)
        right = labels > 0.5
        self._counts.add(scores > self.threshold, right)
        self._pairs.add(scores, right)
        if self._calibration is not None:
            self._calibration.add(scores.double().sigmoid(), labels)

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: `accuracy`, `balanced_accuracy`, and for each class (`wrong`, `right`) `_rate`,
            `_precision`, `_recall` and `_f1`, as in [`ClassCounts`]; `auc` of *right* against *wrong*, and
            `auc_error`, the bound on its error (0 while the capacity suffices); if calibrated, `brier` and `ece`.
        """
        return {
            **self._counts.summary(),
            "auc": self._pairs.auc(),
            "auc_error": self._pairs.auc_error(),
            **(self._calibration.summary() if self._calibration is not None else {}),
        }


class StepStream:
    """
    Metrics of process reward models: single steps, and the first error of a solution.

    Steps after the first error are often labelled wrong by convention, so the position of a step alone predicts their
    label. Such steps count for the class metrics and not for the AUC. The caller decides whether neutral steps (0 of
    -1, 0, 1) are right, both in the labels and in [`log_odds`].

    See *ProcessBench: Identifying Process Errors in Mathematical Reasoning* by C. Zheng et al.
    (https://huggingface.co/papers/2412.06559) for the first-error metrics.

    Args:
        threshold (`float`, *optional*, defaults to `0.0`):
            A step with a score above the threshold is predicted right; one with a score equal to it is not.
        capacity (`int`, *optional*, defaults to `65_536`):
            Distinct pairs of score and label up to which the AUC is exact.
    """

    def __init__(self, threshold: float = 0.0, capacity: int = CAPACITY):
        self.threshold = threshold
        self._counts = ClassCounts(NAMES)
        self._pairs = PairCounts(capacity)
        self._positions = PairCounts(capacity)
        self._hits = {True: 0, False: 0}
        self._judged = {True: 0, False: 0}
        self._skipped = 0

    def add(
        self,
        scores: torch.Tensor,
        labels: torch.Tensor,
        annotated: torch.Tensor,
        real: torch.Tensor | None = None,
    ) -> None:
        """
        Add solutions.

        Args:
            scores, labels (`torch.Tensor` of shape `(B, S)`):
                Score and label of each step, in the order of the steps.
            annotated (`torch.BoolTensor` of shape `(B, S)`):
                True for a step with a label.
            real (`torch.BoolTensor` of shape `(B, S)`, *optional*):
                True for a real step. Needed if steps may lack a label. Defaults to `annotated`.

        Raises:
            ValueError: the shapes differ or are not `(B, S)`, or a step that is not real is annotated.
        """
        real = annotated if real is None else real
        if scores.dim() != 2 or not scores.shape == labels.shape == annotated.shape == real.shape:
            raise ValueError(
                "scores, labels, annotated and real must have one shape (B, S), found "
                f"{tuple(scores.shape)}, {tuple(labels.shape)}, {tuple(annotated.shape)} and {tuple(real.shape)}."
            )
        if (annotated & ~real).any():
            raise ValueError("A step is annotated but not real. Needed: `real` is True wherever `annotated` is.")
        right, predicted = labels > 0.5, scores > self.threshold  # (B, S)
        self._counts.add(predicted[annotated], right[annotated])

        wrong = annotated & ~right  # (B, S)
        to_first_error = real & ((wrong.cumsum(1) - wrong.long()) == 0)  # (B, S): error included
        scored = to_first_error & annotated  # (B, S)
        index = real.cumsum(1)  # (B, S)
        self._pairs.add(scores[scored], right[scored])
        self._positions.add(-index[scored], right[scored])

        complete = real.any(1) & ~(to_first_error & ~annotated).any(1)  # (B,)
        hit = ~(to_first_error & (predicted != right)).any(1)  # (B,)
        for has_error in (True, False):
            rows = complete & (wrong.any(1) == has_error)  # (B,)
            self._judged[has_error] += int(rows.sum())
            self._hits[has_error] += int((rows & hit).sum())
        self._skipped += int((real.any(1) & ~complete).sum())

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`:

            - Over all annotated steps: `accuracy`, `balanced_accuracy`, and for each class (`wrong`, `right`) `_rate`,
              `_precision`, `_recall` and `_f1`, as in [`ClassCounts`].
            - Over the annotated steps up to and including the first error: `auc_to_first_error`, its error bound
              `auc_error`, and `step_index_auc`, the AUC of a baseline that trusts later steps less.
            - `first_error_accuracy`: share of the solutions with an error in which the first step predicted wrong is
              the first error. `no_error_accuracy`: share of the solutions without an error in which no step is
              predicted wrong. `processbench_f1`: their harmonic mean.
            - `first_error_rows`: number of solutions in these metrics. `first_error_skipped`: number of solutions that
              cannot be judged, because a step before the first error has no label (or any step, if there is no error).
        """
        found, clean = (
            self._hits[has_error] / self._judged[has_error] if self._judged[has_error] else math.nan
            for has_error in (True, False)
        )
        return {
            **self._counts.summary(),
            "auc_to_first_error": self._pairs.auc(),
            "auc_error": self._pairs.auc_error(),
            "step_index_auc": self._positions.auc(),
            "first_error_accuracy": found,
            "no_error_accuracy": clean,
            "processbench_f1": harmonic_mean(found, clean),
            "first_error_rows": float(sum(self._judged.values())),
            "first_error_skipped": float(self._skipped),
        }


class RegressionStream:
    """
    Metrics of scores that estimate a number.

    Args:
        capacity (`int`, *optional*, defaults to `65_536`):
            Distinct pairs of score and label up to which `spearman` is exact.
    """

    def __init__(self, capacity: int = CAPACITY):
        self._count = 0
        self._labels, self._label_squares, self._residual_squares = ExactSum(), ExactSum(), ExactSum()
        self._pairs = PairCounts(capacity)

    def add(self, scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add positions; arguments as in [`BinaryStream.add`]."""
        scores, labels = (values.double() for values in _taken(mask, scores, labels))
        self._count += len(labels)
        self._labels.add(labels.tolist())
        self._label_squares.add(labels.square().tolist())
        self._residual_squares.add((scores - labels).square().tolist())
        self._pairs.add(scores, labels)

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: `mse`; `r2`, the share of the labels' variance that the scores explain (1 is perfect, 0
            is as good as the mean label, and it may be negative; NaN if the labels do not vary); `spearman`, in
            [-1, 1].
        """
        residual = self._residual_squares.value()
        spread = self._label_squares.value() - self._labels.value() ** 2 / max(self._count, 1)
        return {
            "mse": float(residual / self._count) if self._count else math.nan,
            "r2": float(1 - residual / spread) if spread > 0 else math.nan,
            "spearman": self._pairs.spearman(),
        }


class SegmentStream:
    """
    The metrics of each category of segment rewards.

    Args:
        categories (`list[str]`):
            Names of the categories, in the order of the last dimension.
        kind (`str`, *optional*, defaults to `"binary"`):
            `"binary"`: [`BinaryStream`], for labels of two classes; `"number"`: [`RegressionStream`].
        **kwargs:
            Arguments of the stream of each category.
    """

    def __init__(self, categories: list[str], kind: Literal["binary", "number"] = "binary", **kwargs):
        kinds = {"binary": BinaryStream, "number": RegressionStream}
        if kind not in kinds:
            raise ValueError(f"`kind` is 'binary' or 'number', found {kind!r}.")
        self._streams = {category: kinds[kind](**kwargs) for category in categories}

    def add(self, scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Add sequences.

        Args:
            scores, labels (`torch.Tensor` of shape `(B, T, G)`):
                Score and label of each position in each category.
            mask (`torch.BoolTensor` of shape `(B, T, G)`):
                True for a position with a label.

        Raises:
            ValueError: the shapes differ, or G is not the number of categories.
        """
        if scores.shape[-1:] != (len(self._streams),):
            raise ValueError(f"{len(self._streams)} categories need scores (B, T, G), found {tuple(scores.shape)}.")
        for index, stream in enumerate(self._streams.values()):
            stream.add(scores[..., index], labels[..., index], mask[..., index])

    def summary(self) -> dict[str, float]:
        """`<category>_<metric>` for each category and each metric of its stream."""
        return {
            f"{category}_{name}": value
            for category, stream in self._streams.items()
            for name, value in stream.summary().items()
        }


def _taken(mask: torch.Tensor | None, scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and labels where the mask is True, flat, on the CPU and in fp32."""
    if scores.shape != labels.shape or (mask is not None and mask.shape != scores.shape):
        raise ValueError(
            f"Scores, labels and mask must have one shape, found {tuple(scores.shape)}, {tuple(labels.shape)} and "
            f"{None if mask is None else tuple(mask.shape)}."
        )
    if mask is not None:
        scores, labels = scores[mask], labels[mask]
    return scores.detach().flatten().cpu().float(), labels.detach().flatten().cpu().float()
