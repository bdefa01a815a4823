"""Ranking losses: by hand, against brute force and TRL's formula, what must not change them, extremes, errors."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate

from tests.losses.helpers import (
    LOSSES,
    MARGINS,
    brute_force,
    each_list_loss,
    each_loss,
    each_margin_loss,
    everyone,
    one,
    pairs,
    ragged,
    softplus,
    trl_loss,
    with_gradient,
)
from trl_ext.losses import bradley_terry, center_rewards, listnet, pairwise, plackett_luce, pointwise, ties


# By hand


def test_bradley_terry_by_hand():
    assert one(bradley_terry, [1.0, 0.0], [1.0, 0.0]) == pytest.approx(softplus(-1.0))
    assert one(bradley_terry, [1.0, 0.0], [0.0, 1.0]) == pytest.approx(softplus(1.0))
    assert one(bradley_terry, [1.0, 0.0], [1.0, 0.0], margin=torch.tensor([3.0])) == pytest.approx(softplus(2.0))
    assert one(bradley_terry, [1.0, 0.0], [4.0, 1.5], margin_from_ratings=True) == pytest.approx(softplus(1.5))
    wanted = 0.8 * softplus(-1.0) + 0.2 * softplus(1.0)
    assert one(bradley_terry, [1.0, 0.0], [1.0, 0.0], target=torch.tensor([0.8])) == pytest.approx(wanted)
    assert one(bradley_terry, [0.0, 1.0], [0.0, 1.0], target=torch.tensor([0.8])) == pytest.approx(wanted)


def test_pairwise_by_hand():
    scores, ratings = [2.0, 0.0, 1.0], [5.0, 1.0, 1.0]  # two decided pairs
    assert one(pairwise, scores, ratings) == pytest.approx((softplus(-2.0) + softplus(-1.0)) / 2)
    wanted = (softplus(4.0 - 2.0) + softplus(4.0 - 1.0)) / 2
    assert one(pairwise, scores, ratings, margin_from_ratings=True) == pytest.approx(wanted)
    wanted = (softplus(0.5 - 2.0) + softplus(0.5 - 1.0)) / 2
    assert one(pairwise, scores, ratings, margin=torch.tensor([0.5])) == pytest.approx(wanted)
    margin = torch.zeros(1, 3, 3)
    margin[0, 0, 1] = 0.5  # by which candidate 0 shall beat candidate 1
    wanted = (softplus(0.5 - 2.0) + softplus(-1.0)) / 2
    assert one(pairwise, scores, ratings, margin=margin) == pytest.approx(wanted)


def test_plackett_luce_by_hand():
    first, second = math.e**2 / (math.e**2 + math.e + 1), math.e / (math.e + 1)
    assert one(plackett_luce, [2.0, 1.0, 0.0], [3.0, 2.0, 1.0]) == pytest.approx(-math.log(first * second))
    # the first two tied: every order but those in which the third is not last
    third_last = first * second + math.e / (math.e**2 + math.e + 1) * math.e**2 / (math.e**2 + 1)
    assert one(plackett_luce, [2.0, 1.0, 0.0], [2.0, 2.0, 1.0]) == pytest.approx(-math.log(third_last))
    # the last two tied: only the first pick counts, top-1
    assert one(plackett_luce, [2.0, 1.0, 0.0], [2.0, 1.0, 1.0]) == pytest.approx(-math.log(first))
    # equal scores: K! orders, alike
    assert one(plackett_luce, [7.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0]) == pytest.approx(math.log(120))
    assert one(plackett_luce, [7.0] * 5, [2.0, 2.0, 2.0, 1.0, 1.0]) == pytest.approx(math.log(10))


def test_listnet_and_pointwise_by_hand():
    wanted = [math.e / (1 + math.e), 1 / (1 + math.e)]
    assert one(listnet, [0.0, 0.0], [1.0, 0.0]) == pytest.approx(math.log(2))
    assert one(listnet, [2.0, 0.0], [1.0, 0.0]) == pytest.approx(
        wanted[0] * softplus(-2.0) + wanted[1] * softplus(2.0)
    )
    assert one(listnet, [2.0, 0.0], [3.0, 0.0], temperature=3.0) == pytest.approx(one(listnet, [2.0, 0.0], [1.0, 0.0]))
    assert one(pointwise, [1.0, 0.0, 2.0], [3.0, 1.0, 2.0]) == pytest.approx(5 / 3)


def test_center_rewards_by_hand():
    scores = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 6.0], [torch.nan] * 3])
    mask = torch.tensor([[True, True, False], [True, True, True], [False] * 3])
    assert center_rewards(scores, mask).tolist() == [9.0, 36.0, 0.0]
    scores, _, mask = pairs()
    assert torch.equal(center_rewards(scores, mask), (scores[:, 0] + scores[:, 1]) ** 2)  # as TRL


def test_docstring_values():
    assert one(bradley_terry, [1.0, 0.0], [1.0, 0.0]) == pytest.approx(0.3133, abs=1e-4)
    assert one(pairwise, [2.0, 0.0, 1.0], [5.0, 1.0, 1.0]) == pytest.approx(0.2201, abs=1e-4)
    assert one(plackett_luce, [2.0, 1.0, 0.0], [3.0, 2.0, 1.0]) == pytest.approx(0.7209, abs=1e-4)
    assert one(plackett_luce, [2.0, 1.0, 0.0], [2.0, 2.0, 1.0]) == pytest.approx(0.3540, abs=1e-4)
    assert one(listnet, [1.0, 0.0], [2.0, 1.0]) == pytest.approx(0.5822, abs=1e-4)
    assert one(pointwise, [1.0, 0.0], [3.0, 1.0]) == pytest.approx(2.5)


# Against an independent reference


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce"])
@pytest.mark.parametrize("flipped", [False, True])
def test_two_candidates_equal_trl_in_loss_and_gradient(name, flipped):
    scores, ratings, mask = pairs()
    wanted, wanted_grad = with_gradient(lambda scores: trl_loss(scores[:, 0], scores[:, 1]), scores)
    if flipped:
        scores, ratings, wanted_grad = scores.flip(1), ratings.flip(1), wanted_grad.flip(1)
    loss, grad = with_gradient(LOSSES[name], scores, ratings, mask)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-6, atol=1e-6)


@each_margin_loss
def test_two_candidates_with_a_margin_equal_trl(loss):
    scores, ratings, mask = pairs()
    margin = torch.rand(len(scores), generator=torch.Generator().manual_seed(1))
    wanted = with_gradient(lambda scores: trl_loss(scores[:, 0], scores[:, 1], margin), scores)
    found = with_gradient(loss, scores, ratings, mask, margin=margin)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [None, 2, 3, 5])
def test_plackett_luce_against_all_orders(levels):
    scores, ratings, mask = ragged(groups=24, width=6, levels=levels)
    loss, grad = with_gradient(plackett_luce, scores, ratings, mask)
    for group in range(len(scores)):
        real = mask[group]
        wanted, wanted_grad = with_gradient(brute_force, scores[group, real], ratings[group, real])
        assert loss[group].item() == pytest.approx(wanted.item(), rel=1e-5, abs=2e-6)
        torch.testing.assert_close(grad[group, real], wanted_grad, rtol=1e-5, atol=2e-6)
        assert (grad[group, ~real] == 0).all()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3, 2), (5, 1, 3), (1, 1, 1, 4, 1), (8, 1), (12, 2), (3, 12, 1)])
def test_tied_blocks_against_an_integral(sizes):
    """P(all of G before those below) = E[prod over G of (1 - u^(w / Λ))], u uniform: exponential races, no subsets."""
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = torch.randn(1, sum(sizes), generator=generator)
    ratings = torch.repeat_interleave(-torch.arange(len(sizes)), torch.tensor(sizes)).float()[None]
    weights, wanted, start = scores[0].double().exp().numpy(), 0.0, 0
    for size in sizes[:-1]:
        block, below = weights[start : start + size], weights[start + size :].sum()
        wanted -= math.log(
            integrate.quad(lambda u, b=block, s=below: np.prod(1 - u ** (b / s)), 0, 1, epsabs=1e-13)[0]
        )
        start += size
    order = torch.randperm(sum(sizes), generator=generator)
    loss = plackett_luce(scores[:, order], ratings[:, order], everyone(scores))
    assert loss.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_places_after_the_k_th_tied_is_top_k():
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    loss = plackett_luce(scores, torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]]), everyone(scores))
    wanted = -sum(scores[0, i] - scores[0, i:].logsumexp(0) for i in range(3))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("levels", [None, 3])
@each_list_loss
def test_gradients_by_finite_differences(loss, levels):
    scores, ratings, mask = ragged(groups=6, width=5, levels=levels)
    scores = scores.double().requires_grad_()
    assert loss(scores, ratings, mask).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda scores: loss(scores, ratings, mask), scores)


def test_pairwise_against_a_loop_over_pairs():
    scores, ratings, mask = ragged(levels=4)
    for group, loss in enumerate(pairwise(scores, ratings, mask).tolist()):
        real = mask[group].nonzero()[:, 0].tolist()
        losses = [
            softplus(float(scores[group, j] - scores[group, i]))
            for i, j in itertools.permutations(real, 2)
            if ratings[group, i] > ratings[group, j]
        ]
        assert loss == pytest.approx(sum(losses) / len(losses) if losses else 0.0, abs=1e-5)


# What must not change a loss


@pytest.mark.parametrize("levels", [None, 3])
@each_list_loss
def test_order_of_candidates(loss, levels):
    scores, ratings, mask = ragged(levels=levels)
    value, grad = with_gradient(loss, scores, ratings, mask)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(3))
    shuffled = with_gradient(loss, scores[:, order], ratings[:, order], mask[:, order])
    torch.testing.assert_close(shuffled, (value, grad[:, order]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filling", [0.0, 100.0, -1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("levels", [None, 3])
@each_list_loss
def test_padding(loss, levels, filling):
    """Each group alone, without padding, gives what it gives in a padded batch, whatever the padding holds."""
    scores, ratings, mask = ragged(levels=levels)
    scores, ratings = scores.masked_fill(~mask, filling), ratings.masked_fill(~mask, filling)
    value, grad = with_gradient(loss, scores, ratings, mask)
    assert (grad[~mask] == 0).all()
    for group in range(len(scores)):
        real = mask[group]
        alone = [tensor[group, real][None] for tensor in (scores, ratings, mask)]
        alone_value, alone_grad = with_gradient(loss, *alone)
        torch.testing.assert_close(alone_value[0], value[group], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone_grad[0], grad[group, real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce", "listnet"])
def test_a_shift_of_all_scores(name):
    scores, ratings, mask = pairs()
    torch.testing.assert_close(
        LOSSES[name](scores + 8, ratings, mask), LOSSES[name](scores, ratings, mask), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce"])
def test_only_the_order_of_the_ratings_counts(name):
    scores, ratings, mask = pairs()
    assert torch.equal(LOSSES[name](scores, 40 * ratings - 7, mask), LOSSES[name](scores, ratings, mask))


@pytest.mark.parametrize("levels", [None, 3])
@each_list_loss
def test_batch_composition(loss, levels):
    """4 x 2 groups give what 8 groups give."""
    scores, ratings, mask = ragged(groups=8, levels=levels)
    parts = [loss(scores[i : i + 2], ratings[i : i + 2], mask[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), loss(scores, ratings, mask), rtol=1e-6, atol=1e-6)


@each_margin_loss
def test_margin_zero_is_no_margin(loss):
    scores, ratings, mask = pairs()
    found = with_gradient(loss, scores, ratings, mask, margin=torch.zeros(len(scores)))
    torch.testing.assert_close(found, with_gradient(loss, scores, ratings, mask), rtol=0, atol=1e-7)


def test_target_one_is_no_target():
    scores, ratings, mask = pairs()
    found = with_gradient(bradley_terry, scores, ratings, mask, target=torch.ones(len(scores)))
    torch.testing.assert_close(found, with_gradient(bradley_terry, scores, ratings, mask), rtol=0, atol=1e-7)


def test_bradley_terry_finds_the_two_real_candidates_of_wider_groups():
    scores, ratings, mask = pairs(groups=3)
    wide, wide_ratings = torch.full((3, 4), torch.nan), torch.full((3, 4), torch.nan)
    wide_mask = torch.zeros(3, 4, dtype=torch.bool)
    for group, places in enumerate([(0, 1), (1, 3), (2, 3)]):
        wide[group, list(places)], wide_ratings[group, list(places)] = scores[group], ratings[group]
        wide_mask[group, list(places)] = True
    torch.testing.assert_close(bradley_terry(wide, wide_ratings, wide_mask), bradley_terry(scores, ratings, mask))


# Extremes


@each_loss
def test_undecided_groups_are_exactly_zero(loss):
    scores = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1e4, -1e4], [torch.nan, torch.nan]])
    ratings = torch.tensor([[2.0, 2.0], [2.0, 1.0], [0.0, 0.0], [torch.nan, torch.nan]])
    mask = torch.tensor([[True, True], [False, True], [True, True], [False, False]])
    value, grad = with_gradient(loss, scores, ratings, mask)
    assert value.tolist() == [0.0] * 4 and (grad == 0).all()
    value, grad = with_gradient(loss, scores[:, :1], ratings[:, :1], mask[:, :1])
    assert value.tolist() == [0.0] * 4 and (grad == 0).all()


@pytest.mark.parametrize("levels", [None, 2, 3])
@each_list_loss
def test_scores_of_ten_thousand(loss, levels):
    scores, ratings, mask = ragged(levels=levels)
    value, grad = with_gradient(loss, scores.sign() * 1e4, ratings, mask)
    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", ["bradley_terry", "pairwise", "plackett_luce"])
def test_small_gaps_survive_large_scores(name):
    """At 1e4 fp32 has steps of 0.001: the difference of two scores is taken before any sum of exponentials."""
    gap = torch.tensor([10000.0, 9995.0])
    value, grad = with_gradient(LOSSES[name], gap[None], torch.tensor([[1.0, 0.0]]), everyone(gap[None]))
    assert value.item() == pytest.approx(softplus(-5.0), rel=1e-5)
    assert grad[0].tolist() == pytest.approx([-1 / (1 + math.e**5), 1 / (1 + math.e**5)], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_loss
def test_low_precision_scores_are_computed_in_fp32(loss, dtype):
    scores, ratings, mask = pairs()
    low = scores.to(dtype)
    value, grad = with_gradient(loss, low, ratings, mask)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, loss(low.float(), ratings, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(low, ratings, mask), value)


@each_loss
def test_nan_is_not_hidden_and_stays_in_its_group(loss):
    scores, ratings = torch.tensor([[1.0, torch.nan], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    ratings[2, 1] = torch.nan
    assert loss(scores, ratings, everyone(scores)).isnan().tolist() == [True, False, True]


def test_a_pair_that_is_not_decided_may_have_any_margin():
    """The margins of (i, j) where i is not the better one: NaN there came into the gradient of all scores."""
    scores, ratings = torch.tensor([[1.0, 2.0, 3.0, torch.nan]]), torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    mask = torch.tensor([[True, True, True, False]])
    decided = (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    filled = [torch.where(decided, 0.5, filling) for filling in (0.5, torch.nan, torch.inf)]
    (value, grad), *others = [with_gradient(pairwise, scores, ratings, mask, margin=margin) for margin in filled]
    assert grad.isfinite().all() and grad.abs().sum() > 0
    for other in others:
        assert torch.equal(other[0], value) and torch.equal(other[1], grad)


def test_ties_met_first_in_inference_mode_can_be_trained_on():
    """The tables of subsets are kept, and tensors of inference mode cannot be saved for a backward pass."""
    ties._subsets.cache_clear()
    scores, ratings = torch.randn(1, 4), torch.tensor([[2.0, 2.0, 1.0, 0.0]])
    with torch.inference_mode():
        plackett_luce(scores, ratings, everyone(scores))
    assert with_gradient(plackett_luce, scores, ratings, everyone(scores))[1].isfinite().all()


def test_more_than_twelve_tied_are_approximated_and_said_once(monkeypatch):
    monkeypatch.setattr(ties, "_warned_of_efron", False)
    scores = 0.1 * torch.randn(2, 15, generator=torch.Generator().manual_seed(0))
    ratings = torch.tensor([1.0] * 13 + [0.0] * 2).expand(2, 15)
    with pytest.warns(UserWarning, match="found 13 candidates with the same rating.* up to 12 are exact"):
        value, grad = with_gradient(plackett_luce, scores, ratings, everyone(scores))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plackett_luce(scores, ratings, everyone(scores))
    monkeypatch.setattr(ties, "MAX_EXACT_TIES", 13)
    exact, exact_grad = with_gradient(plackett_luce, scores, ratings, everyone(scores))
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=0, atol=0.1)
    value, grad = with_gradient(plackett_luce, 1e5 * scores, ratings, everyone(scores))
    assert value.isfinite().all() and grad.isfinite().all()


def test_the_lowest_block_is_never_approximated():
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    ratings = torch.tensor([[1.0] + [0.0] * 39])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = plackett_luce(scores, ratings, everyone(scores))
    assert loss.item() == pytest.approx(-scores[0].log_softmax(0)[0].item(), abs=1e-6)


# Errors


def test_errors_say_what_was_found():
    scores, ratings, mask = pairs(groups=4)
    column = torch.ones(4, 1)
    for loss in MARGINS.values():
        with pytest.raises(ValueError, match=r"margin must have the shape \(4,\).* found \(4, 1\)"):
            loss(scores, ratings, mask, margin=column)
        with pytest.raises(ValueError, match="one or the other"):
            loss(scores, ratings, mask, margin=column[:, 0], margin_from_ratings=True)
    with pytest.raises(ValueError, match=r"target must have the shape \(4,\) .* found \(4, 1\)"):
        bradley_terry(scores, ratings, mask, target=column)
    with pytest.raises(ValueError, match="a margin and a target"):
        bradley_terry(scores, ratings, mask, target=column[:, 0], margin=column[:, 0])
    for name in ("plackett_luce", "listnet", "pointwise"):
        with pytest.raises(ValueError, match=f"`{name}` cannot use a margin"):
            LOSSES[name](scores, ratings, mask, margin=column[:, 0])
    for name in ("pairwise", "plackett_luce", "listnet", "pointwise"):
        with pytest.raises(ValueError, match=f"`{name}` cannot use a target"):
            LOSSES[name](scores, ratings, mask, target=column[:, 0])
    with pytest.raises(ValueError, match="temperature above 0, found 0"):
        listnet(scores, ratings, mask, temperature=0)
    three = torch.rand(2, 3)
    with pytest.raises(ValueError, match="found 3 in group 0 of the batch: use `pairwise` or `plackett_luce`"):
        bradley_terry(three, three, everyone(three))


@each_loss
def test_shapes_are_checked(loss):
    scores, ratings, mask = pairs(groups=4)
    with pytest.raises(ValueError, match=r"found \(4, 2\), \(4, 1\) and \(4, 2\)"):
        loss(scores, ratings[:, :1], mask)
    with pytest.raises(ValueError, match=r"shape \(B, K\), found \(4,\)"):
        loss(scores[:, 0], ratings[:, 0], mask[:, 0])
    with pytest.raises(ValueError, match=r"mask must be bool .* found torch.int64"):
        loss(scores, ratings, mask.long())
