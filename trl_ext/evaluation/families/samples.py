"""Metrics of a policy's own samples: would this reward model teach that policy anything?

A unit is a prompt with its samples. A reward model that is accurate on other texts but gives nearly the same score to
all samples of a prompt teaches slowly: the gradient of the expected reward vanishes with its variance. See *What Makes
a Reward Model a Good Teacher?* by N. Razin et al. (https://huggingface.co/papers/2503.15477), theorem 1. It knows
scores and words, and nothing of models.
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import jensenshannon

from trl_ext.evaluation.families.places import Places
from trl_ext.evaluation.items import Item
from trl_ext.evaluation.measures import Measure, Units


# A prompt has no signal if the standard deviation of its scores is below this share of the overall one: our choice.
SIGNAL = 1e-3


class Words:
    """Which words a set of texts uses, and how long the texts are."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.lengths: list[float] = []

    def add(self, text: str) -> None:
        """One text."""
        self.counts.update(text.lower().split())
        self.lengths.append(math.log1p(len(text)))

    def distance(self, other: "Words") -> float:
        """Jensen-Shannon distance (base 2) of the two distributions of words: 0 the same, 1 no word in common."""
        words = sorted(self.counts.keys() | other.counts.keys())
        if not self.counts or not other.counts:
            return math.nan
        return float(jensenshannon(*([counts[word] for word in words] for counts in (self.counts, other.counts)), 2))

    def length_gap(self, other: "Words") -> float:
        """Mean log length less the other's, in standard deviations of both together."""
        spread = float(np.std(self.lengths + other.lengths))
        return (float(np.mean(self.lengths)) - float(np.mean(other.lengths))) / spread if spread else 0.0


class Samples:
    """Collects the scores of a policy's samples."""

    def __init__(self):
        self.units = Units()
        self._places = Places()
        self._all: list[float] = []

    def add(self, item: Item, scores: list[float]) -> float:
        """Take one scored row; there is no mistake to rank it by."""
        scores_ = np.asarray(scores, dtype=float)
        self.units.add(
            item.row,
            item.cluster,
            item.subset,
            mean=scores_.mean(),
            std=scores_.std(),
            distinct=len(np.unique(scores_)) / len(scores_),
            at_ceiling=((scores_ == scores_.max()).sum() - 1) / (len(scores_) - 1) if len(scores_) > 1 else math.nan,
        )
        self._all += scores_.tolist()
        self._places.add(scores_)
        return math.nan

    def measures(self) -> Iterator[Measure]:
        """Every number of these rows, with what its interval is drawn from."""
        units = self.units
        if not len(units):
            return
        spread = float(np.std(self._all))
        std = units.array("std")
        yield Measure("reward_mean", values=units.array("mean"), clusters=units.clusters, proportion=False)
        yield Measure("reward_std_within_prompt", values=std, clusters=units.clusters, proportion=False)
        share = std**2 / spread**2 if spread else np.zeros(len(std))
        yield Measure("within_prompt_variance_share", values=share, clusters=units.clusters, proportion=False)
        without = (std <= SIGNAL * spread).astype(float)
        yield Measure("prompts_without_signal", values=without, clusters=units.clusters)
        yield Measure("tied_scores", values=1 - units.array("distinct"), clusters=units.clusters)
        yield units.mean("at_ceiling")  # of the samples beside the best one, how many share its score
        yield units.computed("position_correlation", self._places.correlation)
