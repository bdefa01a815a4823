"""Streamed metrics within a question: right against wrong answers, and best-of-n.

The answers to a question may arrive scattered over batches. Memory stops growing at a fixed size, and results depend
neither on batch size nor on the order of the rows. With several processes, gather each batch and add it in every
process. Scores must be finite (scorers check this), and are rounded to fp32.

This module knows scores, labels and numbers of questions. It knows nothing of models, tokens or text.
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

    An AUC over all answers mostly measures whether the model knows which questions are hard. To choose among the
    answers to a question, only their order matters.

    The answers to a question may arrive scattered, so they must be kept: 13 bytes per row. When there are more than
    `capacity` rows, half of the questions are dropped with all their rows, and so on. A fixed hash of the question's
    number decides which, so neither batch size nor order changes the result.

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
        Add answers.

        Args:
            scores, labels (`torch.Tensor` of shape `(B,)`):
                Score and label of each answer.
            questions (`torch.LongTensor` of shape `(B,)`):
                The number of each answer's question.

        Raises:
            ValueError: the shapes differ, or the numbers are not integers (floats merge questions above 2^24).
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
        """The rows of the questions that are kept. The hashes of their numbers have leading bits of 0."""
        mixed = (rows[0] ^ (rows[0] >> 32) ^ 0x5851F42D4C957F2D) * 0x1E3779B97F4A7C15  # overflows on purpose
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

            - `question_auc`: AUC within a question (equal scores count half), averaged over the questions that have
              right and wrong answers. Each such question has the same weight.
            - `right_wrong_accuracy`: share of all pairs of a right and a wrong answer to one question in which the
              right one scores higher; equal scores are wrong. Each pair has the same weight.
            - `best_of_n`: share of the questions with several answers whose best-scored answer is right (among equal
              best scores the share of right ones). `mean_of_n`: the same for a random answer. `oracle_of_n`: share of
              these questions that have a right answer.
            - `questions`: number of questions. `rows_left_out`: rows of questions that were dropped for lack of
              capacity.
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
