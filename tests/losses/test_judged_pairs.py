"""Losses of pairs with ties and with wrong labels: by hand, against probabilities, limits, extremes."""

import math

import pytest
import torch

from tests.losses.helpers import everyone, one, pairs, ragged, softplus, with_gradient
from trl_ext.losses import bradley_terry, ranking_losses, rao_kupper, robust_bradley_terry


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_rao_kupper_by_hand():
    # strengths e^s: P(i wins) = a / (a + theta b), P(tie) = (theta^2 - 1) a b / ((a + theta b)(b + theta a))
    a, b, theta = math.exp(1.0), math.exp(0.25), 2.5
    win, lose = a / (a + theta * b), b / (b + theta * a)
    tie = (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a))
    assert win + lose + tie == pytest.approx(1)
    assert one(rao_kupper, [1.0, 0.25], [2.0, 1.0], theta=theta) == pytest.approx(-math.log(win))
    assert one(rao_kupper, [1.0, 0.25], [1.0, 2.0], theta=theta) == pytest.approx(-math.log(lose))
    assert one(rao_kupper, [1.0, 0.25], [1.0, 1.0], theta=theta) == pytest.approx(-math.log(tie))
    assert one(rao_kupper, [4.0, 4.0], [1.0, 1.0]) == pytest.approx(math.log(2))
    # three candidates: the mean over their pairs
    of_pairs = [one(rao_kupper, [1.0, 0.5], [2.0, 1.0]), one(rao_kupper, [1.0, -1.0], [2.0, 1.0])]
    of_pairs.append(one(rao_kupper, [0.5, -1.0], [1.0, 1.0]))
    assert one(rao_kupper, [1.0, 0.5, -1.0], [2.0, 1.0, 1.0]) == pytest.approx(sum(of_pairs) / 3)


def test_both_good_and_both_bad_by_hand():
    for rating, wanted in ((1.0, softplus(-1.0) + softplus(-0.5)), (0.0, softplus(1.0) + softplus(0.5))):
        plain = one(rao_kupper, [1.0, 0.5], [rating, rating])
        assert one(rao_kupper, [1.0, 0.5], [rating, rating], good_from=0.5) == pytest.approx(plain + wanted / 2)
    # a tie pulls the scores together, "both bad" pulls both down as well
    tied = torch.zeros(1, 2)
    _, gradient = with_gradient(rao_kupper, torch.tensor([[0.1, -0.1]]), tied, everyone(tied))
    assert gradient[0, 0] > 0 > gradient[0, 1] and gradient.sum() == pytest.approx(0, abs=1e-7)
    _, gradient = with_gradient(rao_kupper, torch.tensor([[0.1, -0.1]]), tied, everyone(tied), good_from=1.0)
    assert (gradient > 0).all()


def test_limits_are_bradley_terry():
    scores, ratings, mask = pairs()
    wanted, slope = with_gradient(bradley_terry, scores, ratings, mask)
    for loss, options in ((rao_kupper, {"theta": 1 + 1e-6}), (robust_bradley_terry, {"flip_probability": 0.0})):
        found, gradient = with_gradient(loss, scores, ratings, mask, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-5)


def test_robust_bradley_terry_by_hand():
    for delta in (-3.0, 0.0, 1.0):
        wanted = -math.log(0.9 * sigmoid(delta) + 0.1 * sigmoid(-delta))
        assert one(robust_bradley_terry, [delta, 0.0], [1.0, 0.0], flip_probability=0.1) == pytest.approx(wanted)
        assert one(robust_bradley_terry, [0.0, delta], [0.0, 1.0], flip_probability=0.1) == pytest.approx(wanted)
    # Christiano et al.: one answer in ten is drawn at random
    assert one(robust_bradley_terry, [1.0, 0.0], [1.0, 0.0]) == pytest.approx(-math.log(0.9 * sigmoid(1) + 0.05))
    assert one(robust_bradley_terry, [1.0, 0.0], [1.0, 0.0]) == pytest.approx(0.3454, abs=1e-4)
    # the pull of a pair that contradicts everything fades, that of bradley_terry does not
    scores, ratings = torch.tensor([[-20.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    loss, gradient = with_gradient(robust_bradley_terry, scores, ratings, everyone(scores))
    assert loss.item() == pytest.approx(-math.log(0.05), abs=1e-4) and gradient.abs().max() < 1e-6


def test_the_minimum_recovers_the_scores_that_made_the_labels():
    """With the share of labels that the model expects, the slope is zero at the true difference of scores."""
    true, e, theta = 0.8, 0.2, 2.0
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    win = (1 - e) * sigmoid(true) + e * sigmoid(-true)
    eta = math.log(theta)
    wins, losses = sigmoid(true - eta), sigmoid(-true - eta)
    cases = (
        (robust_bradley_terry, {"flip_probability": e}, (win, 1 - win, 0.0)),
        (rao_kupper, {"theta": theta}, (wins, losses, 1 - wins - losses)),
    )
    for loss, options, shares in cases:
        scores = torch.tensor([[true, 0.0]]).expand(3, 2).clone().requires_grad_()
        values = loss(scores, kinds, everyone(kinds), **options)
        (values * torch.tensor(shares)).sum().backward()
        assert scores.grad.sum(0).abs().max() < 1e-6
        # plain Bradley-Terry would want another difference
    plain = torch.tensor([[true, 0.0]]).expand(2, 2).clone().requires_grad_()
    (bradley_terry(plain, kinds[:2], everyone(kinds[:2])) * torch.tensor([win, 1 - win])).sum().backward()
    assert plain.grad.sum(0).abs().max() > 0.05


@pytest.mark.parametrize("options", [{}, {"good_from": 2.0}])
def test_rao_kupper_masks_order_and_extremes(options):
    scores, ratings, mask = ragged(levels=3)
    found, gradient = with_gradient(rao_kupper, scores, ratings, mask, **options)
    spoilt = scores.masked_fill(~mask, torch.nan), ratings.masked_fill(~mask, torch.nan), mask
    again, same = with_gradient(rao_kupper, *spoilt, **options)
    assert torch.equal(found, again) and torch.equal(gradient, same) and (gradient[~mask] == 0).all()
    order = torch.randperm(scores.shape[1])
    torch.testing.assert_close(rao_kupper(scores[:, order], ratings[:, order], mask[:, order], **options), found)
    if not options:
        torch.testing.assert_close(rao_kupper(scores + 7.0, ratings, mask), found, rtol=1e-4, atol=1e-4)
        assert (found[mask.sum(1) < 2] == 0).all()
    for scale in (1e4, -1e4):
        loss, gradient = with_gradient(rao_kupper, (scale * scores).bfloat16(), ratings, mask, **options)
        assert loss.isfinite().all() and gradient.isfinite().all() and loss.dtype == torch.float32
    ratings[0, mask[0].nonzero()[0]] = torch.inf
    assert rao_kupper(scores, ratings, mask, **options)[0].isnan()


def test_robust_bradley_terry_masks_and_extremes():
    scores, ratings, mask = pairs()
    for scale in (1e4, -1e4):
        loss, gradient = with_gradient(robust_bradley_terry, scale * scores, ratings, mask)
        assert loss.isfinite().all() and gradient.isfinite().all()
    tied = torch.zeros(2, 2)
    loss, gradient = with_gradient(robust_bradley_terry, torch.randn(2, 2), tied, everyone(tied))
    assert not loss.any() and not gradient.any()
    with pytest.raises(ValueError, match="`robust_bradley_terry` compares two candidates, found 3"):
        robust_bradley_terry(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))


def test_wrong_arguments():
    scores, ratings, mask = pairs(2)
    for theta in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="theta="):
            rao_kupper(scores, ratings, mask, theta=theta)
    for share in (0.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="flip_probability="):
            robust_bradley_terry(scores, ratings, mask, flip_probability=share)
    for loss in (rao_kupper, robust_bradley_terry):
        with pytest.raises(ValueError, match="cannot use a margin"):
            loss(scores, ratings, mask, margin=torch.ones(2))
        assert ranking_losses.get(loss.__name__) is loss
