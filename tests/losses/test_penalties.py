"""Penalties of whole batches: values by hand, gradients, masks, weights."""

import pytest
import torch

from trl_ext.losses import batch_sum_to_zero, center_rewards, next_token_loss


def test_batch_sum_to_zero_by_hand():
    scores = torch.tensor([[1.0, 2.0], [3.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    penalty = batch_sum_to_zero(scores, mask)
    assert penalty.item() == 4.0
    penalty.backward()  # 2 * mean / 3
    assert scores.grad.tolist() == [[pytest.approx(4 / 3), pytest.approx(4 / 3)], [pytest.approx(4 / 3), 0.0]]
    # the second group counts three times: (1 + 2 + 3 * 3) / 5
    assert batch_sum_to_zero(scores, mask, torch.tensor([1.0, 3.0])).item() == pytest.approx(2.4**2)
    assert batch_sum_to_zero(scores, mask, torch.zeros(2)).item() == 0.0
    assert batch_sum_to_zero(scores, torch.zeros_like(mask)).item() == 0.0


def test_each_leading_index_is_a_batch_and_one_pair_is_a_quarter_of_its_centring():
    scores, mask = torch.randn(3, 4, 2), torch.rand(3, 4, 2) < 0.8
    assert torch.equal(
        batch_sum_to_zero(scores, mask),
        torch.stack([batch_sum_to_zero(*one) for one in zip(scores, mask, strict=True)]),
    )
    pair, both = torch.tensor([[0.5, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert 4 * batch_sum_to_zero(pair, both) == center_rewards(pair, both)
    # rewards that sum to zero over the batch cost nothing, whatever the sums of the pairs
    assert batch_sum_to_zero(torch.tensor([[3.0, 1.0], [-4.0, 0.0]]), both.expand(2, 2)) == 0.0
    assert batch_sum_to_zero(pair.bfloat16() * 1e4, both).isfinite()


def test_next_token_loss_is_cross_entropy_in_chunks():
    hidden, weight = torch.randn(10, 4, dtype=torch.double, requires_grad=True), torch.randn(7, 4, dtype=torch.double)
    targets = torch.randint(0, 7, (10,))
    weight.requires_grad_()
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.detach().T, targets, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), hidden)
    for chunk in (3, 5, 100):
        found = next_token_loss(hidden, weight, targets, chunk)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], slope)
    assert weight.grad is None and next_token_loss(hidden[:0], weight, targets[:0]).shape == (0,)
    low = next_token_loss(hidden.detach().bfloat16(), weight.detach().bfloat16(), targets)
    assert low.dtype == torch.float32 and low.isfinite().all()


def test_next_token_loss_keeps_no_logits_for_the_backward_pass():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(hidden, weight, torch.zeros(64, dtype=torch.long), chunk_tokens=16)
    assert loss.shape == (64,) and max(kept, default=0) <= weight.numel() and sum(kept) < 64 * 1000
