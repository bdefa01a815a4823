"""Metrics within a question, streamed: right against wrong answers, and best-of-n.

The answers to a question may arrive scattered over batches. Memory stops growing at a fixed size, and results depend
neither on batch size nor on the order of the rows. Between processes, gather a batch first and add it on each. Scores
are taken to be finite: whoever scores stops on NaN. They are rounded to fp32.

It knows scores, labels and numbers of questions, and nothing of models, tokens or text.
"""

import math
from bisect import bisect_left, bisect_right
from itertools import groupby
from operator import itemgetter

import torch

from trl_ext.metrics.streams import CAPACITY, HELD_BATCHES


class QuestionStream:
    """
    Right against wrong answers to the *same* question.

    An AUC over all answers mostly measures whether the model knows which questions are hard; to choose among answers
    only the order within a question counts.

    The answers to a question may arrive scattered, so they have to be kept: 13 bytes a row. When there are more than
    `capacity` rows, half of the questions are left out, with all their rows, and so on. Which ones a fixed hash of
    their number decides, so that neither batch size nor order changes the result.

    Args:
        capacity (`int`, *optional*, defaults to `65_536`):
            Rows to keep.

    Example:

    ```python
    >>> stream = QuestionStream()
    >>> stream.add(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([1, 0, 0]), torch.tensor([7, 7, 7]))
    >>> stream.summary()["right_wrong_accuracy"], stream.summary()["best_of_n"]
    (0.5, 0.0)
    ```
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self._seen = 0
        self._halvings = 0
        self._rows: list[tuple[torch.Tensor, ...]] = []
        self._kept = 0

    def add(self, scores: torch.Tensor, labels: torch.Tensor, questions: torch.Tensor) -> None:
        """
        Take more answers.

        Args:
            scores, labels (`torch.Tensor` of shape `(B,)`):
                Score and label of each answer.
            questions (`torch.LongTensor` of shape `(B,)`):
                A number of the question, the same for all of its answers.

        Raises:
            ValueError: if the shapes differ, or the numbers are no integers (floats merge questions above 2^24).
        """
        if not scores.shape == labels.shape == questions.shape == (len(scores),):
            raise ValueError(
                "scores, labels and questions must have one shape (B,), found "
                f"{tuple(scores.shape)}, {tuple(labels.shape)} and {tuple(questions.shape)}."
            )
        if questions.is_floating_point():
            raise ValueError(f"questions must be integers, found {questions.dtype}.")
        columns = (questions.detach().cpu().long(), scores.detach().cpu().float(), labels.detach().cpu() > 0.5)
        self._seen += len(scores)
        self._rows.append(self._sample(columns))
        self._kept += len(self._rows[-1][0])
        if self._kept > self.capacity or len(self._rows) > HELD_BATCHES:
            rows = self._all()
            while len(rows[0]) > self.capacity:
                self._halvings += 1
                rows = self._sample(rows)
            self._rows, self._kept = [rows], len(rows[0])

    def _sample(self, rows: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The rows of the questions that are kept: those of whose hash the leading bits are 0."""
        mixed = (rows[0] ^ (rows[0] >> 32) ^ 0x5851F42D4C957F2D) * 0x1E3779B97F4A7C15  # wraps around, on purpose
        leading = (mixed >> (63 - self._halvings)) & ((1 << self._halvings) - 1)
        return tuple(column[leading == 0] for column in rows)

    def _all(self) -> tuple[torch.Tensor, ...]:
        if not self._rows:
            return torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0, dtype=torch.bool)
        return tuple(torch.cat(column) for column in zip(*self._rows, strict=True))

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`:

            - `question_auc`: AUC within a question, equal scores half, mean over the questions with right and wrong
              answers; each such question weighs the same.
            - `right_wrong_accuracy`: share of all pairs of a right and a wrong answer to a question in which the
              right one scores higher; equal scores are wrong. Each pair weighs the same.
            - `best_of_n`: share of the questions with several answers of which the best scored is right; among equal
              scores the share of right ones. `mean_of_n`: of one picked blindly. `oracle_of_n`: with a right answer
              at all.
            - `questions`: their number; `rows_left_out`: rows of questions left out for lack of capacity.
        """
        rows = sorted(zip(*(column.tolist() for column in self._all()), strict=True))
        areas, best, mean, oracle = [], [], [], []
        won = pairs = 0
        for _, group in groupby(rows, key=itemgetter(0)):
            answers = [(score, right) for _, score, right in group]
            if len(answers) < 2:
                continue
            right = [score for score, is_right in answers if is_right]  # sorted, as rows are
            wrong = [score for score, is_right in answers if not is_right]
            at_top = [is_right for score, is_right in answers if score == answers[-1][0]]
            best.append(sum(at_top) / len(at_top))
            mean.append(len(right) / len(answers))
            oracle.append(float(bool(right)))
            if right and wrong:
                below = sum(bisect_left(wrong, score) for score in right)
                equal = sum(bisect_right(wrong, score) for score in right) - below
                won, pairs = won + below, pairs + len(right) * len(wrong)
                areas.append((below + equal / 2) / (len(right) * len(wrong)))
        return {
            "question_auc": _mean(areas),
            "right_wrong_accuracy": won / pairs if pairs else math.nan,
            "best_of_n": _mean(best),
            "mean_of_n": _mean(mean),
            "oracle_of_n": _mean(oracle),
            "questions": float(len(best)),
            "rows_left_out": float(self._seen - len(rows)),
        }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
