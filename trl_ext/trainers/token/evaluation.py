"""The metrics of outcome, process and segment reward models, from the outputs at their labelled spans.

It knows which streamed metrics each kind of model has, and how `TokenObjective` reads its outputs. The metrics are in
`trl_ext.metrics.token` and `trl_ext.metrics.question`. It knows nothing of models, text or processes.
"""

import torch

from trl_ext.metrics.question import QuestionStream
from trl_ext.metrics.streams import ClassCounts
from trl_ext.metrics.token import BinaryStream, SegmentStream, StepStream
from trl_ext.trainers.token.objective import TokenObjective
from trl_ext.trainers.token.recording import Points


CLASSES = ["negative", "neutral", "positive"]


class OutcomeEvaluator:
    """
    Metrics of right and wrong completions: over all of them, and within questions that have several.

    The score of a completion is the score at its last token, as in the scorers.
    """

    def __init__(self, objective: TokenObjective):
        self._objective = objective
        self._all = BinaryStream(objective.threshold, calibrated=objective.calibrated)
        self._within = QuestionStream()

    def add(self, points: Points) -> None:
        """Take more rows."""
        scores, labels = self._objective.scores(points.logits), self._objective.right(points.labels)  # (B, L)
        self._all.add(scores, labels, points.mask)
        if points.questions is not None:
            questions = points.questions[:, None].expand_as(scores)
            self._within.add(scores[points.mask], labels[points.mask], questions[points.mask])

    def summary(self) -> dict[str, float]:
        """The metrics of `BinaryStream` and, if a question has several completions, of `QuestionStream`."""
        within = self._within.summary()
        return {**self._all.summary(), **(within if within["questions"] else {})}


class StepEvaluator:
    """Metrics of right and wrong steps, and of the first error. With three classes, neutral counts as right."""

    def __init__(self, objective: TokenObjective):
        self._objective = objective
        self._steps = StepStream(objective.threshold)
        self._classes = ClassCounts(CLASSES) if objective.outputs == 3 else None

    def add(self, points: Points) -> None:
        """Take more rows."""
        scores, labels = self._objective.scores(points.logits), self._objective.right(points.labels)  # (B, L)
        unannotated = points.unannotated
        width = max(int(points.steps.max()) + 1 if points.mask.any() else 0, unannotated.shape[1])
        row = torch.arange(len(scores))[:, None].expand_as(points.steps)[points.mask]
        step = points.steps[points.mask]

        def by_step(values: torch.Tensor) -> torch.Tensor:
            table = values.new_zeros(len(values), width)  # (B, S)
            table[row, step] = values[points.mask]
            return table

        annotated = by_step(points.mask)
        real = annotated.clone()
        real[:, : unannotated.shape[1]] |= unannotated
        self._steps.add(by_step(scores), by_step(labels), annotated, real)
        if self._classes is not None:
            predicted = points.logits.argmax(-1)[points.mask]
            self._classes.add(predicted, points.labels[points.mask].long() + 1)

    def summary(self) -> dict[str, float]:
        """The metrics of `StepStream`, and with three classes those of `ClassCounts` as `class_...`."""
        classes = {} if self._classes is None else self._classes.summary()
        return {**self._steps.summary(), **{f"class_{name}": value for name, value in classes.items()}}


class SegmentEvaluator:
    """
    Metrics of each category: of right and wrong segments, or of the estimate of a number.

    Args:
        objective ([`TokenObjective`]): turns outputs into scores.
        categories (`list[str]`): names that prefix the keys of the summary. An empty name adds no prefix.
    """

    def __init__(self, objective: TokenObjective, categories: list[str]):
        self._objective = objective
        self._names = categories
        if objective.is_number:
            self._stream = SegmentStream(categories, "number")
        else:
            self._stream = SegmentStream(
                categories, "binary", threshold=objective.threshold, calibrated=objective.calibrated
            )
        self._classes = {name: ClassCounts(CLASSES) for name in categories if objective.outputs == 3}

    def add(self, points: Points) -> None:
        """Take more rows."""
        shape = (*points.mask.shape, len(self._names))
        here = torch.nn.functional.one_hot(points.categories, len(self._names)).bool() & points.mask[..., None]
        scores, labels = self._objective.scores(points.logits), self._objective.right(points.labels)  # (B, L)
        self._stream.add(scores[..., None].expand(shape), labels[..., None].expand(shape), here)
        for number, counts in enumerate(self._classes.values()):
            of_it = here[..., number]
            counts.add(points.logits.argmax(-1)[of_it], points.labels[of_it].long() + 1)

    def summary(self) -> dict[str, float]:
        """`<category>_<metric>`, and with three classes also `<category>_class_<metric>`."""
        values = self._stream.summary()
        for name, counts in self._classes.items():
            values |= {f"{name}_class_{metric}": value for metric, value in counts.summary().items()}
        return {name.removeprefix("_"): value for name, value in values.items()}
