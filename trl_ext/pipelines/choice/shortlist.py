"""The rows with the highest values of a pool that is read in chunks, and the batch that is picked from them.

It knows row numbers, values and vectors. It does not know what a row holds, or where its value comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from trl_ext.metrics.design import greedy_determinant, k_centre


Diversity = Literal["determinant", "k_centre", "none"]
DIVERSITIES = ("determinant", "k_centre", "none")


@dataclass
class Shortlist:
    """
    The rows with the highest values so far, and their vectors.

    Args:
        size (`int`): how many rows are kept.
    """

    size: int
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    vectors: torch.Tensor | None = None  # (rows, R, H)
    dropped: float = -math.inf  # the highest value that was left out

    def add(self, rows: Sequence[int], values: torch.Tensor, vectors: torch.Tensor | None) -> None:
        """Add rows (N,) with their values (N,) and vectors (N, R, H); keep the best, the earlier row among equals."""
        everything = torch.cat([self.values, values.double()])
        order = everything.argsort(descending=True, stable=True)
        if len(order) > self.size:
            self.dropped = max(self.dropped, float(everything[order[self.size]]))
        order = order[: self.size]
        self.values, self.rows = everything[order], torch.cat([self.rows, torch.tensor(rows)])[order]
        if vectors is not None:
            self.vectors = _stacked(self.vectors, vectors)[order]

    def pick(self, n: int, diversity: Diversity) -> tuple[list[int], list[float], bool]:
        """
        Rows and their values, in order, and whether a longer shortlist would have given the same rows.

        The gain of a row in a growing batch is at most its value alone. So the greedy design is that of the whole pool
        if each gain is at least the highest value that was left out.
        """
        if diversity == "determinant":
            picked, values = greedy_determinant(self.vectors, n)
            return self.rows[picked].tolist(), values, min(values) >= self.dropped
        picked = list(range(n)) if diversity == "none" else k_centre(self.vectors[:, 0], n)
        exact = diversity == "none" or self.dropped == -math.inf
        return self.rows[picked].tolist(), self.values[picked].tolist(), exact


def _stacked(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Vectors of two batches of rows, with zeros where a row has fewer vectors than another."""
    if one is None:
        return other
    rank = max(one.shape[1], other.shape[1])
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, 0, 0, rank - part.shape[1])) for part in (one, other)])
