"""Calibration of disagreement: by hand, beside scikit-learn, and what cannot be asked."""

import statistics

import pytest
import torch
from sklearn.metrics import roc_auc_score

from trl_ext.metrics.disagreement import error_auc, error_by_disagreement, pair_disagreement, relative_disagreement


def test_by_hand():
    margins = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.5, 3.0])
    spread = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.3])
    bins = error_by_disagreement(margins, spread, bins=3)
    assert [one["pairs"] for one in bins] == [2, 2, 2]
    assert [one["error"] for one in bins] == [0.0, 0.0, 1.0]  # no difference is an error
    assert [one["disagreement"] for one in bins] == pytest.approx([0.15, 0.5, 0.85])
    assert error_auc(margins, spread) == 1.0


@pytest.mark.parametrize("size", [10, 13, 99])
def test_bins_hold_every_pair_once_and_are_of_equal_size(size):
    generator = torch.Generator().manual_seed(size)
    margins, spread = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    bins = error_by_disagreement(margins, spread)
    sizes = [one["pairs"] for one in bins]
    assert len(bins) == 10 and sum(sizes) == size and max(sizes) - min(sizes) <= 1
    errors = sum(one["error"] * one["pairs"] for one in bins)
    assert errors == pytest.approx((margins <= 0).sum().item())
    means = [one["disagreement"] for one in bins]
    assert means == sorted(means)


def test_auc_is_that_of_scikit_learn_with_ties():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(200, generator=generator)
    spread = torch.randint(0, 5, (200,), generator=generator).double()
    assert error_auc(margins, spread) == pytest.approx(roc_auc_score((margins <= 0).numpy(), spread.numpy()))
    assert error_auc(margins.abs() + 1, spread) is None


def test_pair_disagreement_is_the_population_s():
    differences = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
    assert pair_disagreement(differences).tolist() == pytest.approx([statistics.pstdev([1, 2, 4]), 0.0])
    assert pair_disagreement(differences[:, :1]).tolist() == [0.0, 0.0]
    relative = relative_disagreement(torch.tensor([[1.0, -3.0], [2.0, 2.0], [1.0, -1.0]]))
    assert relative.tolist() == [2.0, 0.0, float("inf")]


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="3 pairs cannot fill"):
        error_by_disagreement(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="one of each per pair"):
        error_by_disagreement(torch.ones(3), torch.ones(3, 2), bins=1)
