"""Bugs of ranking losses seen in other libraries: each test shows the wrong number beside ours."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.losses.helpers import (
    LOSSES,
    MARGINS,
    brute_force,
    each_list_loss,
    each_margin_loss,
    everyone,
    pairs,
    softplus,
    with_gradient,
)
from trl_ext.losses import plackett_luce


def test_regression_margin_column_does_not_broadcast():
    """Scores (B, 1) less a margin (B,) give (B, B), whose mean is another loss: here shapes are checked."""
    scores, ratings, mask = pairs(groups=8)
    margin = torch.rand(8, generator=torch.Generator().manual_seed(0))
    broadcast = -F.logsigmoid(scores[:, :1] - scores[:, 1:] - margin)
    assert broadcast.shape == (8, 8)
    for loss in MARGINS.values():
        found = loss(scores, ratings, mask, margin=margin)
        assert found.shape == (8,)
        torch.testing.assert_close(found, broadcast.diagonal())
        for wrong in (margin[:, None], margin[None], margin[:4]):
            with pytest.raises(ValueError, match="margin must have the shape"):
                loss(scores, ratings, mask, margin=wrong)


@each_margin_loss
def test_regression_a_missing_margin_is_not_read_as_zero(loss):
    """A margin that is missing for one row comes as NaN: that row's loss is NaN, not that of margin 0."""
    scores, ratings, mask = pairs(groups=3)
    found = loss(scores, ratings, mask, margin=torch.tensor([0.5, torch.nan, 0.5]))
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("last", "naive", "truth"), [(103.0, math.inf, 103.0), (-76.9, 53.9, 0.0)])
def test_regression_listmle_by_exp_cumsum_log(last, naive, truth):
    """log(cumsum(exp(s)) + 1e-10) overflows, and where it does not the 1e-10 becomes the loss."""
    scores, ratings = torch.tensor([0.0, last]), torch.tensor([2.0, 1.0])
    elsewhere = ((scores.exp().flip(0).cumsum(0).flip(0) + 1e-10).log() - scores).sum()
    assert elsewhere.item() == pytest.approx(naive, abs=0.05)
    assert brute_force(scores, ratings).item() == pytest.approx(truth)
    value, grad = with_gradient(plackett_luce, scores[None], ratings[None], everyone(scores[None]))
    assert value.item() == pytest.approx(truth, abs=1e-6) and grad.isfinite().all()


@each_list_loss
def test_regression_padding_does_not_leak_into_the_normaliser(loss):
    """Padding of score 0 adds exp(0) to a softmax: it is most of it where real scores are low."""
    scores, ratings = torch.tensor([[-9.0, -10.0, -12.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    padded = [F.pad(tensor, (0, 5)) for tensor in (scores, ratings, everyone(scores))]
    torch.testing.assert_close(loss(*padded), loss(scores, ratings, everyone(scores)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce"])
def test_regression_log_of_sigmoid_on_bf16(name):
    """log(sigmoid(x) + 1e-10) ends at 23 and has no gradient there; in bf16 it is 0 from 6 on."""
    scores = torch.tensor([[-30.0, 30.0], [7.0, 0.0]], dtype=torch.bfloat16)
    naive, naive_grad = with_gradient(lambda s: -((s[:, 0] - s[:, 1]).sigmoid() + 1e-10).log(), scores)
    assert naive[0] < 24 and naive_grad[0].abs().max() < 1e-3 and naive[1] == 0
    value, grad = with_gradient(LOSSES[name], scores, torch.tensor([[1.0, 0.0]] * 2), everyone(scores))
    assert value.tolist() == pytest.approx([60.0, softplus(-7.0)], rel=1e-5)
    assert grad[0].tolist() == [-1.0, 1.0] and grad[1, 0] < 0


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce"])
def test_regression_the_batch_is_not_summed_before_the_sigmoid(name):
    """-log sigmoid(sum of differences) calls a batch with one right and one wrong pair a coin flip."""
    scores, ratings = torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0]] * 2)
    loss = LOSSES[name](scores, ratings, everyone(scores))
    assert loss.tolist() == pytest.approx([softplus(-5.0), softplus(5.0)], rel=1e-5)
    assert loss.mean().item() > 2.5 > -F.logsigmoid((scores[:, 0] - scores[:, 1]).sum()).item()
