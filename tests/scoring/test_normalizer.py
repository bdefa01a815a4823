"""The normaliser: by hand, and what has no scale."""

import math

import pytest

from trl_ext.scoring.normalizer import mean_and_std


def test_by_hand():
    assert mean_and_std([1.0, None, 3.0, 5.0]) == {"mean": 3.0, "std": pytest.approx(math.sqrt(8 / 3))}


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([1.0, None], "1 of 2 rows have a score of member-1"),
        ([2.0, 2.0, 2.0], "standard deviation of the 3 scores of member-1 is 0"),
        ([1e6, 1e6 + 1e-3], "too small to normalise by"),
        ([0.5, -math.inf], "A score of member-1 is minus infinity"),
    ],
)
def test_what_has_no_scale(scores, complaint):
    with pytest.raises(ValueError, match=complaint):
        mean_and_std(scores, "member-1")
