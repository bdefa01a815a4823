"""How much a label of each row would tell the model, and the vectors by which rows resemble each other.

It knows scorers and candidates. It does not know where rows come from, or how a batch is picked.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal

import torch

from trl_ext.metrics.design import information_gain
from trl_ext.metrics.disagreement import group_disagreement
from trl_ext.pipelines.choice.shortlist import Diversity
from trl_ext.scoring.ensemble import RewardEnsemble
from trl_ext.scoring.last_layer import expected_curvature, information_vectors
from trl_ext.scoring.scorer import RewardScorer
from trl_ext.scoring.uncertainty import Candidates, by_candidate, candidate_mask


Strategy = Literal["fisher", "uncertainty", "disagreement", "entropy", "random"]
STRATEGIES = ("fisher", "uncertainty", "disagreement", "entropy", "random")
# The strategies whose value is an information, so that the information of a batch is defined.
INFORMATIVE = ("fisher", "uncertainty", "disagreement")

# Values (N,) of some rows and, where a batch is to be diverse, their vectors (N, R, H).
Valued = tuple[torch.Tensor, torch.Tensor | None]


class _Random:
    """A random number for each row."""

    about: dict[str, Any] = {}

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, groups: list[Candidates]) -> Valued:
        return torch.rand(len(groups), generator=self._generator, dtype=torch.float64), None


class _ByFeatures:
    """Values and vectors of rows by the head's features of one scalar model."""

    def __init__(self, scorer: RewardScorer, strategy: Strategy, diversity: Diversity, prior: float | None, seed: int):
        self._scorer, self._strategy, self._diversity = scorer, strategy, diversity
        self._random = _Random(seed)
        self._weight = scorer.last_weight()
        self._posterior, self.about = None, {}
        if strategy == "uncertainty" or (strategy == "fisher" and scorer.has_uncertainty):
            self._posterior = scorer.posterior
            if prior is not None:
                raise ValueError(
                    "prior_precision is that of the fitted uncertainty. Leave it out, or fit again with it."
                )
            self.about = {"prior_precision": self._posterior.prior_precision, "labelled": self._posterior.rows}
        elif strategy == "fisher":
            size = float(self._weight.square().sum())
            self._prior = prior if prior is not None else len(self._weight) / size if size else math.inf
            if not 0 < self._prior < math.inf:
                raise ValueError(f"prior_precision={self._prior}; needed: a number above 0, or a head that is not 0.")
            self.about = {"prior_precision": self._prior, "labelled": 0}

    def __call__(self, groups: list[Candidates]) -> Valued:
        features, mask = self._scorer.group_features(groups)  # (B, K, H), (B, K)
        scores = features @ self._weight  # (B, K)
        if self._strategy == "fisher":
            vectors = self._whiten(information_vectors(features, expected_curvature(scores, mask)))
            values = information_gain(vectors)
        elif self._strategy == "uncertainty":
            # the information of a comparison that is open: p (1 - p) = 1 / 4
            values = _mean_over_pairs(mask, lambda a, b: self._whiten(features[:, a] - features[:, b]).norm(dim=-1))
            vectors = self._whiten(information_vectors(features, expected_curvature(torch.zeros_like(scores), mask)))
            if self._diversity == "determinant":
                values = information_gain(vectors)
        else:
            values = _entropy(scores, mask) if self._strategy == "entropy" else self._random(groups)[0]
            vectors = None
        if self._diversity == "k_centre":
            vectors = _spread(features, scores, mask)[:, None]
        return values, None if self._diversity == "none" else vectors

    def _whiten(self, directions: torch.Tensor) -> torch.Tensor:
        return directions / math.sqrt(self._prior) if self._posterior is None else self._posterior.whiten(directions)


class _ByScores:
    """Values and vectors of rows by the scores of an ensemble's members, or of one model on a server."""

    about: dict[str, Any] = {}

    def __init__(self, scorer: RewardScorer | RewardEnsemble, strategy: Strategy, diversity: Diversity, seed: int):
        self._scorer, self._strategy, self._diversity = scorer, strategy, diversity
        self._random = _Random(seed)

    def __call__(self, groups: list[Candidates]) -> Valued:
        scores, mask = self._member_scores(groups)  # (M, B, K), (B, K)
        mean = scores.mean(0)
        if self._strategy == "entropy":
            values = _entropy(mean, mask)
        elif self._strategy == "random":
            values, _ = self._random(groups)
        else:
            values = 2 * group_disagreement(scores, mask)  # for a pair, the deviation of its score difference
        if self._diversity == "none":
            return values, None
        differences = _spread(scores.permute(1, 2, 0), mean, mask)  # (B, M): of the best and the worst completion
        deviations = (differences - differences.mean(-1, keepdim=True)) / math.sqrt(len(scores))
        vectors = deviations[:, None] / 2 if self._diversity == "determinant" else deviations[:, None]
        return (information_gain(vectors) if self._diversity == "determinant" else values), vectors

    def _member_scores(self, groups: list[Candidates]) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.tensor(by_candidate(groups, self._table), dtype=torch.float64)  # (completions, M)
        mask = candidate_mask(groups)  # (B, K)
        padded = torch.zeros(*mask.shape, table.shape[1], dtype=torch.float64)
        padded[mask] = table
        return padded.permute(2, 0, 1), mask

    def _table(self, prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> list[list[float] | None]:
        """The members' scores of each completion, `None` where one has none."""
        if isinstance(self._scorer, RewardScorer):
            scores = [[score] for score in self._scorer.raw.scores(prompts, completions, columns)]
        else:
            scores = self._scorer.score_members(prompts, completions, **columns)
        return [None if None in row else row for row in scores]


def make_valuer(
    model: Any, strategy: Strategy, diversity: Diversity, prior: float | None, seed: int
) -> _Random | _ByFeatures | _ByScores:
    """What values rows by a strategy. Raises `ValueError` for a model that cannot."""
    if strategy == "random" and diversity == "none":
        return _Random(seed)
    if not isinstance(model, (RewardScorer, RewardEnsemble)):
        raise ValueError(
            f"The model is a {type(model).__name__}; needed for {strategy!r} (diversity: {diversity}): a "
            "RewardScorer, a RewardEnsemble, or the path of one."
        )
    if isinstance(model, RewardScorer) and model.kind != "scalar":
        raise ValueError(
            f"{model.__name__} is a reward model of the kind {model.kind!r}; needed: a scalar one, trained on "
            "comparisons, because a row is a comparison."
        )
    one = isinstance(model, RewardScorer)
    if strategy == "disagreement" and (one or len(model.members) < 2):
        raise ValueError("'disagreement' needs an ensemble of two or more members. Use 'fisher' with a single model.")
    if not one and strategy in ("fisher", "uncertainty"):
        raise ValueError(f"{strategy!r} needs a single scalar model. Use 'disagreement', or pass one member.")
    if one and (strategy in ("fisher", "uncertainty") or diversity != "none"):
        return _ByFeatures(model, strategy, diversity, prior, seed)
    return _ByScores(model, strategy, diversity, seed)


def _mean_over_pairs(mask: torch.Tensor, value: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """The mean of a value (B,) over the pairs of real candidates of each row."""
    total, count = torch.zeros(len(mask), dtype=torch.float64), torch.zeros(len(mask), dtype=torch.float64)
    for one, other in combinations(range(mask.shape[1]), 2):
        real = mask[:, one] & mask[:, other]
        total += torch.where(real, value(one, other).double(), 0.0)
        count += real
    return total / count


def _entropy(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The entropy of the Bradley-Terry preference, in nats, mean over the pairs of a row: (B,), from 0 to log 2."""

    def of_pair(one: int, other: int) -> torch.Tensor:
        margin = scores[:, one] - scores[:, other]
        return torch.nn.functional.softplus(margin) - margin * torch.sigmoid(margin)

    return _mean_over_pairs(mask, of_pair)


def _spread(features: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Features (B, K, H) of the completion with the highest score less those of the one with the lowest: (B, H)."""
    rows = torch.arange(len(scores))
    best = scores.masked_fill(~mask, -math.inf).argmax(1)
    # equal scores: argmin gives the first too, and a difference of a row with itself would say nothing
    worst = (mask.shape[1] - 1) - scores.masked_fill(~mask, math.inf).flip(1).argmin(1)
    return features[rows, best] - features[rows, worst]
