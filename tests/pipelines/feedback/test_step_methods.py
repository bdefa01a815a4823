"""Which prefixes get rollouts, when a prefix is decided, and what the labels are."""

import math

import pytest

from trl_ext.pipelines.feedback.step_methods import (
    StepSettings,
    Tally,
    decide,
    excludes,
    labels_of,
    wanted,
)


def label(first_wrong: int, length: int, settings: StepSettings) -> tuple[list, int]:
    """Labels of a solution whose prefixes are right up to a place, and how many noise-free rollouts that took."""
    tallies, asked = [Tally() for _ in range(length)], 0
    right = first_wrong > length
    while requests := wanted(tallies, right, settings):
        for place, count in requests.items():
            asked += count
            for _ in range(count):
                tallies[place].add(place < first_wrong)
    return labels_of(tallies, right, settings), asked


@pytest.mark.parametrize("method", ["binary", "adaptive", "full"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_every_method_finds_every_first_error(method, threshold):
    settings = StepSettings(method=method, labels="hard", num_rollouts=16, threshold=threshold)
    costs = {}
    for length in range(9):
        for first_wrong in range(length + 2):  # `length` is the last step, one more is no error
            found, costs[length, first_wrong] = label(first_wrong, length, settings)
            assert found == [1.0] * min(first_wrong, length + 1) + [0.0] * (length + 1 - first_wrong)
    if method == "binary":
        assert max(costs.values()) == 16 * math.ceil(math.log2(9)) and costs[8, 9] == 0
    if method == "adaptive":
        assert costs[8, 8] == (4 if threshold == 0 else 4 * 8)  # right rollouts decide at once; or 8 of 1, 1, 2, 4


def test_soft_labels_are_shares():
    tallies = [Tally(right=3, wrong=1), Tally(right=0, wrong=4, unscored=2), Tally(unscored=4)]
    assert labels_of(tallies, False, StepSettings()) == [0.75, 0.0, None, 0.0]
    # a right rollout from a longer prefix is a right completion of a shorter one
    tallies = [Tally(wrong=4), Tally(right=1, wrong=3), Tally(wrong=4)]
    assert labels_of(tallies, False, StepSettings(labels="hard")) == [1.0, 1.0, 0.0, 0.0]
    assert labels_of(tallies, False, StepSettings(labels="hard", reuse=False)) == [0.0, 1.0, 0.0, 0.0]
    assert labels_of(tallies, False, StepSettings(labels="hard", threshold=0.3)) == [0.0, 0.0, 0.0, 0.0]


def test_shared_rollouts_go_from_the_shortest_prefix_to_the_longest():
    tallies = [Tally(right=8), Tally(right=2, wrong=1), Tally()]
    assert wanted(tallies, False, StepSettings()) == {1: 5}
    assert wanted(tallies, False, StepSettings(reuse=False)) == {1: 5, 2: 8}
    assert wanted(tallies, True, StepSettings(labels="hard")) == {}


def test_denoised_labels_by_hand():
    tallies = [Tally(right=1, wrong=7), Tally(right=4, wrong=4), Tally(right=3, wrong=5), Tally(wrong=8)]
    settings = StepSettings(denoise=True)
    assert labels_of(tallies, False, settings, confidence=0.5) == [1.0, 1.0, 0.75, 0.0, 0.0]
    settings = StepSettings(denoise=True, tolerance=3)
    assert labels_of(tallies, False, settings, confidence=0.5) == [0.25, 1.0, 0.75, 0.0, 0.0]
    settings = StepSettings(denoise=True, tolerance=0)
    assert labels_of(tallies, False, settings, confidence=0.5) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert labels_of(tallies, True, settings, confidence=0.5) == [1.0] * 5 and wanted(tallies, True, settings) == {}


def test_a_prefix_without_a_scored_rollout_decides_nothing():
    settings = StepSettings(method="binary", num_rollouts=2)
    assert decide(Tally(unscored=2), settings) is None
    assert wanted([Tally(unscored=2)], False, settings) == {}
    assert labels_of([Tally(unscored=2)], False, settings) is None


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_the_confidence_sequence_errs_as_seldom_as_it_says(threshold):
    """The exact probability that it excludes the true rate at any of the first 200 rollouts."""
    error, crossed, alive = 0.1, 0.0, {0: 1.0}
    for number in range(1, 201):
        moved: dict[int, float] = {}
        for right, chance in alive.items():
            for more, step in ((1, threshold), (0, 1 - threshold)):
                moved[right + more] = moved.get(right + more, 0.0) + chance * step
        out = {right for right in moved if excludes(Tally(right, number - right), threshold, error)}
        crossed += sum(moved.pop(right) for right in out)
        alive = moved
    assert 0.01 < crossed <= error
    assert excludes(Tally(right=200), threshold, error) and excludes(Tally(wrong=200), threshold, error)


def test_adaptive_with_a_threshold_stops_early():
    settings = StepSettings(method="adaptive", threshold=0.5, num_rollouts=64, error=0.1)
    assert decide(Tally(right=6), settings) is None and decide(Tally(right=7), settings) is True  # 2^7 / 8 > 10
    assert decide(Tally(wrong=7), settings) is False
    assert decide(Tally(right=30, wrong=34), settings) is False  # the share, when there are no more
    assert wanted([Tally(right=3, wrong=1)], False, settings) == {0: 4}


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "fast"},
        {"num_rollouts": 0},
        {"labels": "fuzzy"},
        {"method": "binary", "labels": "soft"},
        {"threshold": 1.0},
        {"error": 0.0},
        {"min_confidence": 1.0},
        {"tolerance": -1},
    ],
)
def test_settings_that_cannot_be_meant(arguments):
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        StepSettings(**arguments)
