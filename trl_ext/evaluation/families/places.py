r"""Whether a score depends on the place of a candidate in its row, beyond what the candidate's rating explains.

A reward model never sees the place, so the two should not be related once ratings are taken into account. Where they
are, the file's order says something about the texts that the ratings do not say (generated in this order, sorted by
length, shown first to annotators). It knows scores, ratings and places, and nothing of texts.
"""

import math

import numpy as np


class Places:
    r"""
    The partial correlation of score and place given the rating, within rows.

    Scores s, ratings r and places p are centred in each row, so that rows of different difficulty are comparable, and
    \( \rho = (c_{sp} - c_{sr} c_{rp}) / \sqrt{(1 - c_{sr}^2)(1 - c_{rp}^2)} \) with the pooled correlations c. A row
    is kept as six sums.
    """

    def __init__(self):
        self._sums: list[tuple[float, ...]] = []

    def add(self, scores: np.ndarray, ratings: np.ndarray | None = None) -> None:
        """
        One row.

        Args:
            scores (`np.ndarray` of shape `(K,)`): of the candidates, in the order of the file.
            ratings (`np.ndarray` of shape `(K,)`, *optional*): nothing is taken into account without them.
        """
        s = scores - scores.mean()
        p = np.arange(len(scores)) - (len(scores) - 1) / 2
        r = np.zeros(len(scores)) if ratings is None else ratings - ratings.mean()
        self._sums.append(tuple(float(a @ b) for a, b in ((s, s), (r, r), (p, p), (s, r), (s, p), (r, p))))

    def correlation(self, rows: np.ndarray) -> float:
        """The correlation over these rows, in [-1, 1]; NaN where the place says what the rating says, or all tie."""
        ss, rr, pp, sr, sp, rp = np.asarray(self._sums).reshape(-1, 6)[rows].sum(0)
        if ss <= 0 or pp <= 0:
            return math.nan
        by_rating, of_place = (sr / math.sqrt(ss * rr), rp / math.sqrt(rr * pp)) if rr > 0 else (0.0, 0.0)
        left = (1 - by_rating**2) * (1 - of_place**2)
        if left < 1e-9:
            return math.nan
        return float((sp / math.sqrt(ss * pp) - by_rating * of_place) / math.sqrt(left))
