"""The bootstrap draws whole groups, and its means are those of the drawn units."""

import pytest
import torch

from trl_ext.metrics.bootstrap import bootstrap_draws, bootstrap_means, group_numbers


def test_the_mean_of_a_resample_is_that_of_all_units_of_the_drawn_groups():
    values, names = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), ["a", "b", "a", "c", "c"]
    groups, count = group_numbers(names)
    assert groups.tolist() == [0, 1, 0, 2, 2] and count == 3
    means = bootstrap_means(values, groups, count, resamples=50, seed=3)
    (drawn,) = bootstrap_draws(count, 50, seed=3)
    wanted = [torch.cat([values[groups == group] for group in row]).mean().item() for row in drawn]
    assert means.tolist() == pytest.approx(wanted)
    # several numbers of the same units are drawn together
    both = bootstrap_means(torch.stack([values, -2 * values], 1), groups, count, resamples=50, seed=3)
    assert both[:, 0].tolist() == means.tolist() and both[:, 1].tolist() == (-2 * means).tolist()


def test_draws_in_blocks_are_the_draws_of_one_block(monkeypatch):
    whole = torch.cat(list(bootstrap_draws(7, 30, seed=1)))
    monkeypatch.setattr("trl_ext.metrics.bootstrap._AT_ONCE", 60)
    blocks = list(bootstrap_draws(7, 30, seed=1))
    assert len(blocks) == 4 and torch.equal(torch.cat(blocks), whole)


def test_groups_of_one_unit_need_no_sizes():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    alone = bootstrap_means(values, torch.arange(20), 20, resamples=10)
    pairs = bootstrap_means(values.repeat_interleave(2), torch.arange(20).repeat_interleave(2), 20, resamples=10)
    assert alone.tolist() == pytest.approx(pairs.tolist())
