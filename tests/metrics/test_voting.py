"""Votes, pass@k, best of k, the bound on its KL and bootstrap intervals: worked numbers, brute force, simulation."""

import itertools
import math
import random

import pandas as pd
import pytest
import torch

from trl_ext.metrics.voting import (
    best_of_k,
    best_of_k_curve,
    bootstrap_interval,
    kl_bound,
    majority_vote,
    pass_at_k,
    weighted_vote,
)


class TestVotes:
    def test_majority(self):
        assert majority_vote(["4", "5", None, "5", None, None]) == "5"
        assert majority_vote(["b", "a", "a", "b"]) == "b"  # a tie goes to the first to appear
        assert majority_vote([None, None]) is None
        assert majority_vote([]) is None

    def test_weights(self):
        assert weighted_vote(["4", "5", "5"], [0.9, 0.3, 0.4]) == "4"
        assert weighted_vote(["4", "5", "5"], [0.9, 0.5, 0.5]) == "5"
        assert weighted_vote(["4", "5", None], [None, 0.1, 9.0]) == "5"
        assert weighted_vote(["4", "5"], [float("nan"), 0.0]) == "5"
        assert weighted_vote(["4"], [None]) is None

    def test_wrong_weights_are_named(self):
        with pytest.raises(ValueError, match="2 answers and 1 weights"):
            weighted_vote(["4", "5"], [1.0])
        with pytest.raises(ValueError, match="the weight -0.5 is negative"):
            weighted_vote(["4"], [-0.5])


class TestPassAtK:
    @pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
    def test_against_all_subsets(self, n, c):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

    def test_large_numbers(self):
        assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
        assert pass_at_k(200, 200, 200) == 1.0

    @pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
    def test_impossible_numbers(self, n, c, k):
        with pytest.raises(ValueError, match="needed: 0 <= c <= n and 1 <= k <= n"):
            pass_at_k(n, c, k)


class TestBestOfK:
    def test_against_all_subsets_with_ties(self):
        rng = random.Random(0)
        for n in range(1, 7):
            values = [rng.random() for _ in range(n)]
            scores = [float(rng.randrange(3)) for _ in range(n)]
            for k in range(1, n + 1):
                expected = []
                for subset in itertools.combinations(range(n), k):
                    top = max(scores[i] for i in subset)
                    best = [values[i] for i in subset if scores[i] == top]
                    expected.append(sum(best) / len(best))
                assert best_of_k(values, scores, k) == pytest.approx(sum(expected) / len(expected))

    def test_special_cases(self):
        values = [0.0, 1.0, 0.0, 1.0, 0.0]
        assert best_of_k(values, [3.0, 1.0, 2.0, 5.0, 4.0], 1) == pytest.approx(0.4)  # a random one
        assert best_of_k(values, [0.0] * 5, 3) == pytest.approx(0.4)  # scores that say nothing
        for k in range(1, 6):
            assert best_of_k(values, values, k) == pytest.approx(pass_at_k(5, 2, k))  # the oracle
        assert best_of_k([0.0, 1.0], [-math.inf, math.inf], 2) == 1.0

    def test_curve(self):
        values, scores = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]], [[3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]
        curve = best_of_k_curve(values, scores)
        assert list(curve) == [1, 2]
        assert curve[2] == pytest.approx((1 / 3 + 1 / 2) / 2)
        assert list(best_of_k_curve(values, scores, ks=[3])) == [3]

    def test_wrong_input_is_named(self):
        with pytest.raises(ValueError, match="2 values and 1 scores"):
            best_of_k([0.0, 1.0], [1.0], 1)
        with pytest.raises(ValueError, match="a question without samples"):
            best_of_k_curve([[1.0], []], [[1.0], []])
        with pytest.raises(ValueError, match="cannot draw k=3 of 2"):
            best_of_k([0.0, 1.0], [1.0, 2.0], 3)
        with pytest.raises(ValueError, match="NaN"):
            best_of_k([0.0, 1.0], [1.0, math.nan], 1)
        with pytest.raises(ValueError, match="no questions"):
            best_of_k_curve([], [])


class TestKlBound:
    def test_numbers(self):
        assert kl_bound(1) == 0.0
        assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)

    def test_it_is_reached_where_no_two_samples_are_alike(self):
        """Best-of-n of m equally likely, distinct outcomes: the exact divergence rises to the bound with m."""
        n, below = 4, []
        for m in (8, 64, 4096):
            mass = [(rank / m) ** n - ((rank - 1) / m) ** n for rank in range(1, m + 1)]
            below.append(kl_bound(n) - sum(p * math.log(p * m) for p in mass if p > 0))
        assert below == sorted(below, reverse=True) and 0 < below[-1] < 1e-3

    def test_no_samples(self):
        with pytest.raises(ValueError, match="n=0"):
            kl_bound(0)


class TestBootstrap:
    def test_covers_the_truth_as_often_as_it_says(self):
        rng = random.Random(0)
        inside = 0
        for trial in range(300):
            values = [float(rng.random() < 0.3) for _ in range(200)]
            low, high = bootstrap_interval(values, resamples=400, seed=trial)
            inside += low <= 0.3 <= high
        assert 0.90 < inside / 300 < 0.99

    def test_width_against_the_normal_formula(self):
        values = [float(i % 10 < 4) for i in range(2000)]
        low, high = bootstrap_interval(values)
        assert low < 0.4 < high
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 2000), rel=0.1)

    def test_what_shares_a_group_is_drawn_together(self):
        values = [float(i % 10 < 4) for i in range(100)]
        low, high = bootstrap_interval(values)
        assert bootstrap_interval(values, groups=[f"group {i}" for i in range(100)]) == (low, high)
        # each value five times over is no more evidence
        wide = bootstrap_interval([value for value in values for _ in range(5)], groups=[i // 5 for i in range(500)])
        assert wide == pytest.approx((low, high)) and wide[1] - wide[0] > 2 * 1.96 * math.sqrt(0.24 / 500)
        # the mean of all drawn values, not of the groups' means
        assert bootstrap_interval([0.0, 0.0, 0.0, 1.0], groups=[0, 0, 0, 0]) == (0.25, 0.25)

    def test_is_reproducible_and_leaves_the_random_state_alone(self):
        values = [0.0, 1.0, 1.0, 0.0, 1.0]
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert bootstrap_interval([2.0]) == (2.0, 2.0)

    def test_wrong_input_is_named(self):
        with pytest.raises(ValueError, match="no values"):
            bootstrap_interval([])
        with pytest.raises(ValueError, match="level=95"):
            bootstrap_interval([1.0], level=95)
        with pytest.raises(ValueError, match="2 groups for 1 values"):
            bootstrap_interval([1.0], groups=["a", "b"])

    def test_a_series_is_read_by_place_whatever_its_index(self):
        values, scores = [0.0, 1.0, 1.0], [3.0, 2.0, 1.0]
        series = [pd.Series(column, index=[2, 0, 1]) for column in (values, scores)]
        assert best_of_k(*series, k=2) == best_of_k(values, scores, k=2)
        assert best_of_k_curve(pd.Series([values]), pd.Series([scores])) == best_of_k_curve([values], [scores])
        assert bootstrap_interval(series[1]) == bootstrap_interval(scores)
