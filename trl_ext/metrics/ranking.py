"""Ranking metrics: one number per group from its scores and ratings, and their aggregation over a data set.

Per-group functions take `(scores, ratings, mask)`, each `(B, K)`, and return fp32 `(B,)`, with NaN for groups on which
the metric is not defined. [`StreamedMetrics`] then counts every group once, so batch size and number of processes do
not change the result. Scores and ratings must be finite (scorers check this). Masked values do not change the result.

This module knows nothing of models, losses, trainers or processes.
"""

import math
from collections.abc import Mapping

import torch


def _signs(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sign(v_i - v_j) for real pairs, 0 elsewhere: (B, K, K)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~mask, 0.0)
    both = mask[:, :, None] & mask[:, None, :]
    return (values[:, :, None] - values[:, None, :]).sign() * both


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole in fp32, NaN where whole is 0."""
    return torch.where(whole > 0, part / whole, torch.nan).float()


def pair_accuracy(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Share of the decided pairs of a group that scores and ratings order in the same way.

    A pair is decided if its ratings differ. Equal scores are wrong. For a group of two it is TRL's `accuracy`.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Scores of the candidates.
        ratings (`torch.Tensor` of shape `(B, K)`):
            Ratings, higher is better.
        mask (`torch.BoolTensor` of shape `(B, K)`):
            True for a real candidate.

    Returns:
        `torch.Tensor` of shape `(B,)` in [0, 1]; NaN if there is no decided pair.

    Example:

    ```python
    >>> pair_accuracy(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3).bool())
    tensor([0.6667])
    ```
    """
    wanted, found = _signs(ratings, mask), _signs(scores, mask)  # (B, K, K)
    decided = wanted > 0
    return _ratio((decided & (found > 0)).sum((1, 2)), decided.sum((1, 2)))


def length_accuracy(lengths: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    [`pair_accuracy`] of the baseline that prefers the longer candidate. A reward model should beat it.

    Args:
        lengths (`torch.Tensor` of shape `(B, K)`):
            Lengths of the completions, in tokens.
        ratings, mask:
            As in [`pair_accuracy`].

    Returns:
        `torch.Tensor` of shape `(B,)` in [0, 1]; NaN if there is no decided pair.
    """
    return pair_accuracy(lengths, ratings, mask)


def top1_agreement(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    1 if the best-scored candidate has the best rating, else 0: whether best-of-K picks the best candidate.

    If several candidates share the best score, all of them must have the best rating. So a model that gives all
    candidates the same score gets 0, and the order of the candidates does not matter. For a group of two it is
    [`pair_accuracy`].

    Args:
        scores, ratings, mask:
            As in [`pair_accuracy`].

    Returns:
        `torch.Tensor` of shape `(B,)`, 0 or 1; NaN if no two ratings differ.
    """
    wanted, found = _signs(ratings, mask), _signs(scores, mask)  # (B, K, K)
    best_rated = mask & ~(wanted < 0).any(-1)  # (B, K)
    best_scored = mask & ~(found < 0).any(-1)  # (B, K)
    agrees = ~(best_scored & ~best_rated).any(-1)  # (B,)
    return torch.where((wanted > 0).any((1, 2)), agrees.float(), torch.nan)


def kendall_tau(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Kendall's rank correlation with ties, tau-b.

    $$
    \tau_b = \frac{C - D}{\sqrt{(C + D + T_s)(C + D + T_r)}}
    $$

    C and D are the numbers of concordant and discordant pairs, T_s and T_r those of pairs tied only in the score and
    only in the rating. See *The Treatment of Ties in Ranking Problems* by M. G. Kendall
    (https://doi.org/10.1093/biomet/33.3.239). It equals `scipy.stats.kendalltau`.

    Args:
        scores, ratings, mask:
            As in [`pair_accuracy`].

    Returns:
        `torch.Tensor` of shape `(B,)` in [-1, 1]; NaN if no two ratings, or no two scores, differ.
    """
    wanted, found = _signs(ratings, mask), _signs(scores, mask)  # (B, K, K)
    agreement = (wanted * found).sum((1, 2))  # each pair twice, here and below
    untied = wanted.abs().sum((1, 2)) * found.abs().sum((1, 2))
    return _ratio(agreement, untied.sqrt())


def ndcg(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Normalised discounted cumulative gain over the whole group, with linear gains.

    $$
    \frac{\sum_k g_k / \log_2(1 + rank_k)}{\max_{orders}}, \qquad g_k = rating_k - \min(0, \min_j rating_j)
    $$

    See *Cumulated gain-based evaluation of IR techniques* by K. Järvelin and J. Kekäläinen
    (https://doi.org/10.1145/582415.582418). Candidates with equal scores get the mean discount of their places. It
    equals `sklearn.metrics.ndcg_score` if no rating is negative. A group with negative ratings (ranks become negative
    ratings) is first shifted so that its lowest gain is 0.

    Args:
        scores, ratings, mask:
            As in [`pair_accuracy`].

    Returns:
        `torch.Tensor` of shape `(B,)` in [0, 1]; NaN if no two ratings differ.
    """
    width = scores.shape[1]
    ratings = ratings.float().masked_fill(~mask, 0.0)
    gains = (ratings - ratings.amin(-1, keepdim=True).clamp(max=0.0)).masked_fill(~mask, 0.0)  # (B, K)
    discounts = 1 / torch.arange(2, width + 2, device=scores.device, dtype=torch.float32).log2()  # (K,)
    summed = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])  # (K+1,): of the first places

    found = _signs(scores, mask)  # (B, K, K)
    both = mask[:, :, None] & mask[:, None, :]
    ahead = (found < 0).sum(-1)  # (B, K)
    alike = ((found == 0) & both).sum(-1).clamp(min=1)  # (B, K): with oneself
    shared = (summed[ahead + alike] - summed[ahead]) / alike  # (B, K)
    gained = (gains * shared).sum(-1)  # (B,)
    best = (gains.sort(dim=-1, descending=True).values * discounts).sum(-1)  # (B,)
    return torch.where((_signs(ratings, mask) > 0).any((1, 2)), gained / best, torch.nan)


def margin(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean of s_better - s_worse over the decided pairs of a group. For a group of two it is TRL's `margin`.

    Args:
        scores, ratings, mask:
            As in [`pair_accuracy`].

    Returns:
        `torch.Tensor` of shape `(B,)`; NaN if there is no decided pair.
    """
    scores = scores.float().masked_fill(~mask, 0.0)
    decided = _signs(ratings, mask) > 0  # (B, K, K)
    gaps = (scores[:, :, None] - scores[:, None, :]) * decided  # (B, K, K)
    return _ratio(gaps.sum((1, 2)), decided.sum((1, 2)))


def centered_products(
    x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The sums of (x - mean)², (y - mean)² and (x - mean)(y - mean) of each group, which can be added for [`pearson`].

    Args:
        x, y (`torch.Tensor` of shape `(B, K)`):
            Two quantities of the candidates, e.g. score and length.
        mask (`torch.BoolTensor` of shape `(B, K)`):
            True for a real candidate.

    Returns:
        Three `torch.Tensor` of shape `(B,)`; 0 for a group with fewer than two real candidates.
    """
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    x, y = (values.float().masked_fill(~mask, 0.0) for values in (x, y))
    x, y = ((values - values.sum(-1, keepdim=True) / count).masked_fill(~mask, 0.0) for values in (x, y))
    return (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)


def pearson(xx: float, yy: float, xy: float) -> float:
    """
    Pearson correlation from summed [`centered_products`].

    If the products are summed over groups, the result is the correlation *within* groups. For example, it ignores that
    a prompt with long answers has high scores. NaN if x or y does not vary within any group.

    Example:

    ```python
    >>> pearson(2.0, 8.0, 4.0)
    1.0
    ```
    """
    return max(-1.0, min(1.0, xy / math.sqrt(xx * yy))) if xx > 0 and yy > 0 else math.nan


def ranking_columns(
    scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    The values that [`ranking_summary`] needs from a batch, one number per group, which processes can gather.

    Args:
        scores, ratings, mask:
            As in [`pair_accuracy`].
        lengths (`torch.Tensor` of shape `(B, K)`):
            Lengths of the completions, in tokens.

    Returns:
        `dict[str, torch.Tensor]`: always the same keys in the same order. Each value is fp32 of shape `(B,)`, with NaN
        for groups on which it is not defined.
    """
    real_scores = scores.float()
    count = mask.sum(-1).float()  # (B,)
    score_square, length_square, score_length = centered_products(scores, lengths, mask)
    return {
        "accuracy": pair_accuracy(scores, ratings, mask),
        "top1_agreement": top1_agreement(scores, ratings, mask),
        "kendall_tau": kendall_tau(scores, ratings, mask),
        "ndcg": ndcg(scores, ratings, mask),
        "margin": margin(scores, ratings, mask),
        "length_accuracy": length_accuracy(lengths, ratings, mask),
        "candidates": count,
        "reward_sum": real_scores.masked_fill(~mask, 0.0).sum(-1),
        "reward_min": torch.where(count > 0, real_scores.masked_fill(~mask, math.inf).amin(-1), torch.nan),
        "reward_max": torch.where(count > 0, real_scores.masked_fill(~mask, -math.inf).amax(-1), torch.nan),
        "score_square": score_square,
        "length_square": length_square,
        "score_length": score_length,
    }


class StreamedMetrics:
    """
    Count, sum, minimum and maximum of named columns that arrive batch by batch. NaN means undefined and is ignored.

    Sums are kept in fp64 and added row by row, so the batch size does not change the result.

    Example:

    ```python
    >>> stream = StreamedMetrics()
    >>> stream.add({"accuracy": torch.tensor([1.0, torch.nan])})
    >>> stream.add({"accuracy": torch.tensor([0.0, 1.0, 1.0])})
    >>> stream.count("accuracy"), stream.mean("accuracy"), stream.minimum("accuracy")
    (4, 0.75, 0.0)
    ```
    """

    def __init__(self):
        self._counts: dict[str, int] = {}
        self._sums: dict[str, float] = {}
        self._minima: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, columns: Mapping[str, torch.Tensor]) -> None:
        """
        Add one batch.

        Args:
            columns (`Mapping[str, torch.Tensor]`):
                One number per row for each name, shape `(B,)`. B may be 0 and may differ between names.

        Raises:
            ValueError: a column is not one-dimensional.
        """
        for name, column in columns.items():
            if column.dim() != 1:
                raise ValueError(f"The column '{name}' must have the shape (B,), found {tuple(column.shape)}.")
            values = [value for value in column.tolist() if not math.isnan(value)]
            total = self.sum(name)
            for value in values:  # one by one, so that every batch size gives the same additions
                total += value
            self._sums[name] = total
            self._counts[name] = self.count(name) + len(values)
            self._minima[name] = min([self._minima.get(name, math.inf), *values])
            self._maxima[name] = max([self._maxima.get(name, -math.inf), *values])

    def count(self, name: str) -> int:
        """Number of rows on which the column is defined."""
        return self._counts.get(name, 0)

    def sum(self, name: str) -> float:
        """Sum over the defined rows; 0 if there is none."""
        return self._sums.get(name, 0.0)

    def mean(self, name: str) -> float:
        """Mean over the defined rows; NaN if there is none."""
        return self.sum(name) / self.count(name) if self.count(name) else math.nan

    def minimum(self, name: str) -> float:
        """Smallest defined value; NaN if there is none."""
        return self._minima[name] if self.count(name) else math.nan

    def maximum(self, name: str) -> float:
        """Largest defined value; NaN if there is none."""
        return self._maxima[name] if self.count(name) else math.nan


def ranking_summary(stream: StreamedMetrics) -> dict[str, float]:
    """
    The metrics of a data set, from the [`ranking_columns`] of its batches.

    Args:
        stream ([`StreamedMetrics`]):
            A stream that has the columns of all batches.

    Returns:
        `dict[str, float]`, with NaN for a metric that no group defines:

        - `accuracy`, `top1_agreement`, `kendall_tau`, `ndcg`, `margin`: means over the groups that define them.
        - `length_accuracy`: the accuracy of preferring the longer completion.
        - `length_correlation`: Pearson correlation of score and length within groups, in [-1, 1].
        - `mean_reward`: the mean score of all candidates; `min_reward`, `max_reward`: over the whole set.
    """
    means = ("accuracy", "top1_agreement", "kendall_tau", "ndcg", "margin", "length_accuracy")
    candidates = stream.sum("candidates")
    products = [stream.sum(name) for name in ("score_square", "length_square", "score_length")]
    return {
        **{name: stream.mean(name) for name in means},
        "length_correlation": pearson(*products),
        "mean_reward": stream.sum("reward_sum") / candidates if candidates else math.nan,
        "min_reward": stream.minimum("reward_min"),
        "max_reward": stream.maximum("reward_max"),
    }


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """
    Spearman's rank correlation of two quantities; tied values get their mean rank.

    Args:
        x, y (`torch.Tensor` of shape `(N,)`): the two quantities.

    Returns:
        `float` in [-1, 1]; NaN if either does not vary.

    Example:

    ```python
    >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.3, 0.2]))
    0.5
    ```
    """
    x_ranks, y_ranks = (ranks - ranks.mean() for ranks in (_mean_ranks(x), _mean_ranks(y)))
    return pearson(*(float(product.sum()) for product in (x_ranks**2, y_ranks**2, x_ranks * y_ranks)))


def _mean_ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each value, from 1; equal values get their mean rank: fp64 (N,)."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1).double() / 2)[place]
