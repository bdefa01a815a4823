"""The rows with the highest values of a pool that is read in chunks, and the batch that is picked from them.

It knows row numbers, values and vectors. It does not know what a row holds, or where its value comes from.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from trl_ext.metrics.design import greedy_determinant, k_centre


Diversity = Literal["determinant", "k_centre", "none"]
DIVERSITIES = ("determinant", "k_centre", "none")


class Shortlist:
    """
    The rows with the highest values so far, and their vectors. Memory holds at most twice as many rows.

    Args:
        size (`int`): how many rows are kept.
    """

    def __init__(self, size: int):
        self.size = size
        self.dropped = -math.inf  # the highest value that was left out
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None  # sorted by value
        self._new: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def add(self, rows: Sequence[int], values: torch.Tensor, vectors: torch.Tensor | None) -> None:
        """Add rows (N,) with their values (N,) and vectors (N, R, H); of equal values the earlier row counts more."""
        values, full = values.double(), self._kept is not None and len(self._kept[0]) == self.size
        good = values > self._kept[1][-1] if full else torch.ones(len(values), dtype=torch.bool)
        self.dropped = max([self.dropped, *values[~good].tolist()])
        self._new.append((torch.tensor(rows)[good], values[good], None if vectors is None else vectors[good]))
        if sum(len(part[0]) for part in self._new) >= self.size:
            self.best()

    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Row numbers, values and vectors of the shortlist, the highest value first."""
        parts = [*([] if self._kept is None else [self._kept]), *self._new]
        rows, values = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        order = values.argsort(descending=True, stable=True)
        if len(order) > self.size:
            self.dropped = max(self.dropped, float(values[order[self.size]]))
        order = order[: self.size]
        vectors = None if parts[0][2] is None else _stacked([part[2] for part in parts])[order]
        self._kept, self._new = (rows[order], values[order], vectors), []
        return self._kept

    def pick(self, n: int, diversity: Diversity) -> tuple[list[int], list[float], bool]:
        """
        Rows and their values, in order, and whether a longer shortlist would have given the same rows.

        The gain of a row in a growing batch is at most its value alone. So the greedy design is that of the whole pool
        if each gain is at least the highest value that was left out.
        """
        rows, values, vectors = self.best()
        if diversity == "determinant":
            picked, gains = greedy_determinant(vectors, n)
            return rows[picked].tolist(), gains, min(gains) >= self.dropped
        picked = list(range(n)) if diversity == "none" else k_centre(vectors[:, 0], n)
        exact = diversity == "none" or self.dropped == -math.inf
        return rows[picked].tolist(), values[picked].tolist(), exact


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors of several batches of rows, with zeros where a row has fewer vectors than another."""
    rank, pad = max(part.shape[1] for part in parts), torch.nn.functional.pad
    return torch.cat([pad(part, (0, 0, 0, rank - part.shape[1])) for part in parts])
