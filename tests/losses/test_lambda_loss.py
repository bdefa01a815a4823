"""`lambda_loss`: the weighted pairs by hand, and what does not depend on padding or order."""

import math

import pytest
import torch

from trl_ext.losses import lambda_loss


def test_pairs_count_by_what_their_swap_changes():
    scores = torch.tensor([[0.5, 2.0, -1.0, 9.0]], requires_grad=True)
    ratings = torch.tensor([[3.0, 1.0, 0.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    places = {0: 2, 1: 1, 2: 3}  # by the scores
    wanted = wanted_linear = 0.0
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        discount = abs(1 / math.log(1 + places[better]) - 1 / math.log(1 + places[worse]))
        gap = scores[0, better].item() - scores[0, worse].item()
        for gain in (lambda r: 2**r - 1, lambda r: r):
            weight = abs(gain(ratings[0, better].item()) - gain(ratings[0, worse].item())) * discount
            term = weight * math.log1p(math.exp(-gap))
            wanted, wanted_linear = (wanted + term, wanted_linear) if gain(2) == 3 else (wanted, wanted_linear + term)
    assert lambda_loss(scores, ratings, mask).item() == pytest.approx(wanted, rel=1e-5)
    assert lambda_loss(scores, ratings, mask, linear_gain=True).item() == pytest.approx(wanted_linear, rel=1e-5)
    lambda_loss(scores, ratings, mask).sum().backward()
    assert scores.grad[0, 3] == 0 and scores.grad[0, :3].abs().min() > 0


def test_the_order_of_the_candidates_does_not_matter_and_ties_give_zero():
    torch.manual_seed(0)
    scores, ratings, mask = torch.randn(3, 5), torch.randint(0, 4, (3, 5)).float(), torch.ones(3, 5, dtype=torch.bool)
    turned = torch.randperm(5)
    first = lambda_loss(scores, ratings, mask)
    torch.testing.assert_close(first, lambda_loss(scores[:, turned], ratings[:, turned], mask))
    assert lambda_loss(scores, torch.ones(3, 5), mask).tolist() == [0, 0, 0]


def test_equal_scores_give_the_same_loss_in_any_order():
    """As in the first step of a policy, whose implicit rewards are all 0."""
    ratings = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [2.0, 0.0, 3.0, 1.0]])
    scores = torch.zeros(3, 4, requires_grad=True)
    losses = lambda_loss(scores, ratings, torch.ones(3, 4, dtype=torch.bool))
    losses.sum().backward()
    by_rating = scores.grad.gather(1, ratings.argsort(dim=1))
    assert losses[0] > 0
    torch.testing.assert_close(losses, losses[:1].expand(3))
    torch.testing.assert_close(by_rating, by_rating[:1].expand(3, 4))


def test_ratings_that_the_gain_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="linear_gain"):
        lambda_loss(torch.zeros(1, 2), torch.tensor([[100.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
