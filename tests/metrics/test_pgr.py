"""Performance gap recovered: by hand, what is refused, the bootstrap against a normal approximation, clusters."""

import math

import pytest
import torch

from trl_ext.metrics.pgr import estimate_pgr, performance_gap_recovered


def test_by_hand():
    assert performance_gap_recovered(0.6, 0.75, 0.8) == 0.75
    assert performance_gap_recovered(0.6, 0.6, 0.8) == 0.0
    assert performance_gap_recovered(0.6, 0.8, 0.8) == 1.0


def test_clipping_is_optional():
    assert performance_gap_recovered(0.6, 0.5, 0.8) == 0.0
    assert performance_gap_recovered(0.6, 0.5, 0.8, clip=False) == pytest.approx(-0.5)
    assert performance_gap_recovered(0.6, 0.9, 0.8, clip=False) == pytest.approx(1.5)


@pytest.mark.parametrize(("weak", "ceiling"), [(0.8, 0.8), (0.9, 0.8)])
def test_no_gap_is_an_error(weak, ceiling):
    with pytest.raises(ValueError, match="not above the weak model"):
        performance_gap_recovered(weak, 0.8, ceiling)


def test_a_performance_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="weak_to_strong=nan"):
        performance_gap_recovered(0.5, math.nan, 0.8)


def rows(number: int, *shares: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.rand(number, generator=generator) < share).double() for share in shares]


def test_interval_is_that_of_the_normal_approximation():
    """Of independent rows the delta method gives the standard error of the ratio."""
    weak, student, ceiling = rows(4000, 0.5, 0.7, 0.9)
    found = estimate_pgr(weak, student, ceiling)
    gap, gain = ceiling - weak, student - weak
    expected = float(gain.mean() / gap.mean())
    assert found.pgr == pytest.approx(expected, abs=1e-9)
    influence = (gain - expected * gap) / gap.mean()
    error = float(influence.std() / math.sqrt(len(weak)))
    low, high = found.interval
    assert (low, high) == pytest.approx((expected - 1.96 * error, expected + 1.96 * error), abs=0.01)
    assert found.gap_error == pytest.approx(float(gap.std() / math.sqrt(len(weak))), rel=0.06)


def test_pairing_matters():
    """A student that is right exactly where the ceiling is has no error of its own."""
    weak, ceiling = rows(2000, 0.5, 0.8)
    found = estimate_pgr(weak, ceiling, ceiling)
    assert found.pgr == 1.0 and found.interval == (1.0, 1.0)


def test_undefined_below_two_standard_errors():
    weak = torch.arange(100) % 2
    student = ceiling = (torch.arange(100) % 7 < 4).double()  # 0.58 against 0.5, unpaired
    found = estimate_pgr(weak, student, ceiling)
    assert found.pgr is None and found.interval is None and "standard errors" in found.reason
    worse = estimate_pgr(ceiling * 0 + 1, student, ceiling)
    assert worse.pgr is None and "not above the weak model" in worse.reason


def test_copies_of_rows_do_not_count_as_new_evidence():
    """Four copies of each row (seeds, say) in one cluster: the same interval; as rows of their own: a narrower one."""
    weak, student, ceiling = rows(300, 0.4, 0.6, 0.9)
    once = estimate_pgr(weak, student, ceiling)
    many = [values.repeat(4) for values in (weak, student, ceiling)]
    clustered = estimate_pgr(*many, clusters=list(range(300)) * 4)
    assert clustered.interval == pytest.approx(once.interval, abs=1e-9)
    naive = estimate_pgr(*many)
    width = once.interval[1] - once.interval[0]
    assert naive.interval[1] - naive.interval[0] == pytest.approx(width / 2, rel=0.2)


def test_same_seed_same_interval_and_level():
    values = rows(500, 0.4, 0.6, 0.9)
    assert estimate_pgr(*values, seed=1).interval == estimate_pgr(*values, seed=1).interval
    narrow, wide = estimate_pgr(*values, level=0.5).interval, estimate_pgr(*values, level=0.99).interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="Row 1"):
        estimate_pgr(torch.tensor([0.0, math.nan]), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="one length"):
        estimate_pgr(torch.zeros(2), torch.zeros(3), torch.ones(2))
    alone = estimate_pgr(torch.zeros(3), torch.ones(3), torch.ones(3), clusters=[5, 5, 5])
    assert alone.pgr is None and "one prompt" in alone.reason
    with pytest.raises(ValueError, match="clusters"):
        estimate_pgr(torch.zeros(2), torch.zeros(2), torch.ones(2), clusters=[1])
    with pytest.raises(ValueError, match="at least one row"):
        estimate_pgr(torch.zeros(0), torch.zeros(0), torch.ones(0))
