"""Losses on weak labels: by hand, against references, micro-batches of one, the published behaviour, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import bce, bradley_terry
from trl_ext.losses.distillation import (
    ConfidenceLoss,
    LogConfRanking,
    LogConfToken,
    distillation,
    entropy_sum,
    scheduled_weight,
)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


# -------------------------------------------------------------------------------------------------- confidence loss
def test_at_the_start_it_is_cross_entropy_to_the_soft_label():
    loss = ConfidenceLoss()
    z, q = torch.tensor([2.0, -1.0]), torch.tensor([0.7, 0.2])
    expected = [0.7 * softplus(-2.0) + 0.3 * softplus(2.0), 0.2 * softplus(1.0) + 0.8 * softplus(-1.0)]
    assert loss(z, q).tolist() == pytest.approx(expected, rel=1e-6)


def test_by_hand_with_a_threshold():
    """alpha 0.5 at half the ramp: a quarter of the target is the student's own hardened prediction."""
    loss = ConfidenceLoss(alpha=0.5, warmup=1.0)
    loss.end_step(0.5, torch.tensor([[0.0, 0.5], [2.0, 0.5]]))  # half are positive: the median, 1.0
    assert loss.threshold == pytest.approx(1.0) and loss.weight == 0.25
    target = 0.75 * 0.4 + 0.25 * 1.0  # 1.5 > 1.0
    expected = target * softplus(-1.5) + (1 - target) * softplus(1.5)
    assert loss(torch.tensor([1.5]), torch.tensor([0.4])).item() == pytest.approx(expected, rel=1e-6)
    target = 0.75 * 0.4  # 0.5 < 1.0: negative, though its probability is above one half
    expected = target * softplus(-0.5) + (1 - target) * softplus(0.5)
    assert loss(torch.tensor([0.5]), torch.tensor([0.4])).item() == pytest.approx(expected, rel=1e-6)


def test_threshold_gives_the_weak_labels_share_of_positives():
    loss = ConfidenceLoss(window=10**6)
    values = torch.stack([torch.randn(2000, generator=torch.Generator().manual_seed(0)), torch.full((2000,), 0.3)], 1)
    loss.end_step(1.0, values)
    assert (values[:, 0] > loss.threshold).double().mean().item() == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("sizes", [[32], [1] * 32, [5, 27]], ids=["1x32", "32x1", "5+27"])
def test_micro_batches_do_not_matter(sizes):
    """Three steps of 32 examples, however they are cut: the same losses, exactly."""

    def losses(sizes):
        loss, found = ConfidenceLoss(window=40), []
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            z, q = torch.randn(32, generator=generator), torch.rand(32, generator=generator)
            found += [loss(*part) for part in zip(z.split(sizes), q.split(sizes), strict=True)]
            loss.end_step((step + 1) / 3)
        return torch.cat(found), loss.threshold

    (whole, threshold), (cut, other) = losses([32]), losses(sizes)
    assert torch.equal(whole, cut) and threshold == other


def test_the_published_quantile_depends_on_micro_batches():
    """At micro-batch 1 every row is its own quantile: all get one class."""
    loss = ConfidenceLoss(reference=True)
    loss.progress = 0.5
    z, q = torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5])
    whole = loss(z, q)
    single = torch.cat([loss(z[k : k + 1], q[k : k + 1]) for k in range(2)])
    assert not torch.allclose(whole, single)
    hardened = 0.5 * q + 0.5 * torch.tensor([1.0, 0.0])
    assert torch.allclose(whole, F.binary_cross_entropy_with_logits(z, hardened, reduction="none"))


def test_ramp_is_continuous_and_the_published_one_jumps():
    ours, published = ConfidenceLoss(alpha=0.5, warmup=0.1), ConfidenceLoss(alpha=0.5, warmup=0.1, reference=True)
    ours.threshold = 0.0

    def weights(loss):
        values = []
        for progress in (0.0, 0.05, 0.0999, 0.1001, 1.0):
            loss.progress = progress
            values.append(loss.weight)
        return values

    assert weights(ours) == pytest.approx([0.0, 0.25, 0.4995, 0.5, 0.5])
    assert weights(published) == pytest.approx([0.0, 0.025, 0.04995, 0.5, 0.5])


def test_window_keeps_whole_steps():
    loss = ConfidenceLoss(window=10)
    for value in (100.0, 0.0, 0.0):
        loss.end_step(0.5, torch.tensor([[value, 0.5]]).repeat(6, 1))
    assert loss.threshold == 0.0  # the first step is out: 6 + 6 >= 10 without it


def test_evaluation_leaves_no_trace():
    loss = ConfidenceLoss()
    with torch.no_grad():
        loss(torch.zeros(3), torch.zeros(3))
    assert len(loss.step_values()) == 0
    loss(torch.zeros(3, requires_grad=True), torch.zeros(3))
    assert loss.step_values().shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(dtype):
    loss = ConfidenceLoss(warmup=0.0)
    loss.end_step(0.5, torch.tensor([[0.0, 0.5]]))
    z = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    loss(z, torch.tensor([0.0, 1.0, 0.5])).sum().backward()
    assert z.grad.isfinite().all()


def test_no_gradient_flows_through_the_own_prediction():
    loss = ConfidenceLoss(alpha=1.0, warmup=0.0)
    loss.end_step(1.0, torch.tensor([[0.0, 0.5]]))
    z = torch.tensor([0.3], requires_grad=True)
    loss(z, torch.tensor([0.0])).backward()
    assert z.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(0.3)).item() - 1.0, rel=1e-6)


@pytest.mark.parametrize("kwargs", [{"alpha": 1.5}, {"warmup": -0.1}, {"window": 0}])
def test_values_out_of_range(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        ConfidenceLoss(**kwargs)


# --------------------------------------------------------------------------------------------- pairs and tokens
def test_pairs_at_the_start_equal_bradley_terry_with_a_target():
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    ratings, mask = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]]), torch.ones(5, 2, dtype=torch.bool)
    target = torch.tensor([0.9, 0.1, 0.5, 1.0, 0.3])
    expected = bradley_terry(scores, ratings, mask, target=target)
    assert torch.allclose(LogConfRanking()(scores, ratings, mask, target=target), expected)


def test_pairs_have_no_orientation():
    """Swapping the sides of pairs, and so their targets, changes nothing: the threshold is 0."""
    loss = LogConfRanking(warmup=0.0)
    loss.confidence.end_step(0.5)
    scores = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    ratings, mask = torch.tensor([[1.0, 0.0]] * 6), torch.ones(6, 2, dtype=torch.bool)
    target = torch.rand(6, generator=torch.Generator().manual_seed(1))
    one = loss(scores, ratings, mask, target=target)
    assert loss.confidence.weight == 0.5
    assert torch.allclose(one, loss(scores.flip(1), ratings, mask, target=1 - target))


def test_tied_pairs_cost_nothing_and_margins_are_refused():
    loss, mask = LogConfRanking(), torch.ones(1, 2, dtype=torch.bool)
    assert loss(torch.randn(1, 2), torch.zeros(1, 2), mask).tolist() == [0.0]
    with pytest.raises(ValueError, match="margin"):
        loss(torch.randn(1, 2), torch.tensor([[1.0, 0.0]]), mask, margin=torch.ones(1))
    with pytest.raises(ValueError, match="two candidates"):
        loss(torch.randn(1, 3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))


def test_tokens_at_the_start_equal_bce():
    logits = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, False], [False, False, True]])[..., None]
    assert torch.allclose(LogConfToken()(logits, labels, mask), bce(logits, labels, mask))
    two = torch.cat([torch.zeros_like(logits), logits], dim=-1)  # the same odds from two outputs
    assert torch.allclose(LogConfToken()(two, labels, mask), bce(logits, labels, mask))


def test_tokens_with_labels_that_are_no_probability_are_refused():
    """A label of -1 gave a loss without a lower bound: it fell with the logit, for ever."""
    logits, mask = torch.zeros(1, 2, 1, 1), torch.tensor([[True, False]])[..., None]
    LogConfToken()(logits, torch.tensor([[1.0, torch.nan]])[..., None], mask)
    for label in (-1.0, 1.5, torch.nan):
        with pytest.raises(ValueError, match=r"`logconf` needs labels in \[0, 1\].*token 0"):
            LogConfToken()(logits, torch.tensor([[label, 1.0]])[..., None], mask)


# ------------------------------------------------------------------------------------------------- distillation
def test_divergence_by_hand_and_its_direction():
    """KL(weak || strong) with weak (0.5, 0.5) and strong (0.8, 0.2): 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2)."""
    strong, weak = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    mask, labels = torch.tensor([True]), torch.tensor([0])
    data, divergence = distillation(strong, weak, labels, mask, weight=2.0)
    assert data.item() == pytest.approx(-math.log(0.8), rel=1e-6)
    by_hand = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert divergence.item() == pytest.approx(2.0 * by_hand, rel=1e-5)


def test_a_token_that_the_teacher_never_gives_costs_nothing():
    """A teacher logit of -inf gave NaN: 0 log 0 is 0. The rest of the vocabulary gives the divergence by hand."""
    strong = torch.tensor([[0.6, 0.2, 0.2]]).log().requires_grad_()
    weak = torch.tensor([[0.5, 0.5, 0.0]]).log()
    _, divergence = distillation(strong, weak, torch.tensor([0]), torch.tensor([True]), weight=1.0)
    assert divergence.item() == pytest.approx(0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.2), rel=1e-5)
    divergence.sum().backward()
    assert strong.grad[0].tolist() == pytest.approx([0.1, -0.3, 0.2], abs=1e-6)  # strong - weak
    both = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()  # neither model gives it
    distillation(both, weak, torch.tensor([0]), torch.tensor([True]), weight=1.0)[1].sum().backward()
    assert both.grad.isfinite().all()
    assert entropy_sum(weak).item() == pytest.approx(math.log(2))


def test_divergence_draws_the_student_to_the_teacher():
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, 0.0]])
    distillation(student, teacher, torch.tensor([1]), torch.tensor([True]), 5.0)[1].sum().backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]  # the step goes against the gradient


def test_masked_tokens_and_weight_zero():
    logits = torch.randn(3, 5)
    mask, labels = torch.tensor([True, False, True]), torch.tensor([1, -100, 2])
    data, divergence = distillation(logits, logits + 1, labels, mask, 1.0)
    assert data[1] == 0 and divergence.abs().max() < 1e-6  # a constant added to logits changes no distribution
    assert distillation(logits, logits * 0, labels, mask, 0.0)[1].sum() == 0


def test_distillation_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="same vocabulary"):
        distillation(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1).long(), torch.tensor([True]), 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        distillation(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1).long(), torch.tensor([True]), -1.0)


def test_schedules():
    assert [scheduled_weight(2.0, p, "linear") for p in (0.0, 0.25, 1.0)] == [2.0, 1.5, 0.0]
    assert [scheduled_weight(2.0, p, "cosine") for p in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.0, 0.0])
    assert scheduled_weight(2.0, 0.7) == 2.0
    with pytest.raises(ValueError, match="cubic"):
        scheduled_weight(1.0, 0.5, "cubic")
