"""Metrics of a token-level ensemble: of each member, of their mean output, and the disagreement of the members.

It knows logits, labels and processes, as `trl_ext.trainers.token.recording` does. It knows nothing of models or of
where metrics go.
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
        make (`Callable[[], Evaluator]`): makes new, empty metrics of one model.
        objective ([`TokenObjective`]): turns outputs into scores.
        members (`int`): M. The logits of the points are (B, L, M * C), member after member.

    Attributes:
        disagreements (`list[tuple[float, float]]`): for the first spans, the disagreement, and 1.0 if the mean output
            is wrong (else 0.0; NaN if outputs are numbers).
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
    A [`TrainingRecorder`] that also records loss and accuracy of each member between two log entries.

    Args:
        accelerator (`Accelerator`): sums over processes.
        is_number (`bool`): labels are numbers, so there is no accuracy.
    """

    def __init__(self, accelerator: Accelerator, is_number: bool):
        super().__init__(accelerator)
        self._is_number = is_number
        self._new: torch.Tensor | None = None  # (4, M)
        self._sums: torch.Tensor | None = None

    def add_members(self, losses: torch.Tensor, items: torch.Tensor, hits: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add a batch. All arguments have the shape (M,) and are summed over the rows that a member counts.

        Args:
            losses, items: the loss terms and their divisor.
            hits, labels: the number of correctly predicted labels and of all labels.
        """
        sums = torch.stack([tensor.float() for tensor in (losses, items, hits, labels)])
        self._new = sums if self._new is None else self._new + sums

    def flush(self) -> None:
        """Sum over processes. A collective operation: all processes call it, or none."""
        super().flush()
        if self._new is None:
            return
        sums = self._accelerator.reduce(self._new, reduction="sum").cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._new = None

    def of_members(self) -> dict[str, float]:
        """`loss_member_<m>` and `accuracy_member_<m>` since the last call. A member without labels has none."""
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
