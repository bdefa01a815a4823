"""The hinge loss: by hand, against a loop over the pairs, what must not change it, extremes, and its name."""

import pytest
import torch
from trl_ext_plugin_hinge import hinge

from trl_ext.losses import RankingLossProperties, ranking_losses


def everyone(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def test_by_hand():
    scores, ratings = torch.tensor([[2.0, 0.0, 0.5]]), torch.tensor([[3.0, 1.0, 2.0]])
    # 2.0 - 0.0 and 2.0 - 0.5 are apart by more than 1; 0.5 - 0.0 lacks 0.5; three pairs
    assert hinge(scores, ratings, everyone(scores)).tolist() == pytest.approx([0.5 / 3])
    assert hinge(scores, ratings, everyone(scores), width=2.0).tolist() == pytest.approx([(0.0 + 0.5 + 1.5) / 3])


def test_against_a_loop():
    torch.manual_seed(0)
    scores, ratings = torch.randn(8, 5), torch.randint(0, 3, (8, 5)).float()
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1))
    margin = torch.rand(8)
    for group, loss in enumerate(hinge(scores, ratings, mask, margin=margin).tolist()):
        real = mask[group].nonzero()[:, 0].tolist()
        losses = [
            max(0.0, 1.0 + float(margin[group] - scores[group, i] + scores[group, j]))
            for i in real
            for j in real
            if ratings[group, i] > ratings[group, j]
        ]
        assert loss == pytest.approx(sum(losses) / len(losses) if losses else 0.0, abs=1e-6)


def test_what_must_not_change_it():
    torch.manual_seed(0)
    scores, ratings = torch.randn(4, 3), torch.rand(4, 3)
    loss = hinge(scores, ratings, everyone(scores))
    order = [2, 0, 1]
    assert torch.allclose(hinge(scores[:, order], ratings[:, order], everyone(scores)), loss)
    assert torch.allclose(hinge(scores, ratings, everyone(scores), margin=torch.zeros(4)), loss)
    padded = [torch.nn.functional.pad(tensor, (0, 2), value=float("nan")) for tensor in (scores, ratings)]
    assert torch.allclose(hinge(*padded, torch.nn.functional.pad(everyone(scores), (0, 2))), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(dtype):
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1.0, 1.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    ratings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [5.0, 5.0], [1.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    loss = hinge(scores, ratings, mask)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss[0] == 0 and loss[2:].tolist() == [0, 0]
    assert loss[1].item() == pytest.approx(2e4, rel=0.01)  # bf16 holds 1e4 as 9984
    assert scores.grad.float().tolist() == [[0, 0], [-1, 1], [0, 0], [0, 0]]


def test_errors():
    scores, ratings = torch.zeros(2, 2), torch.tensor([[1.0, 0.0]] * 2)
    with pytest.raises(ValueError, match="cannot use a target"):
        hinge(scores, ratings, everyone(scores), target=torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\), found \(2, 1\)"):
        hinge(scores, ratings, everyone(scores), margin=torch.ones(2, 1))
    with pytest.raises(ValueError, match="width above 0"):
        hinge(scores, ratings, everyone(scores), width=0.0)


def test_is_found_by_name_with_its_properties():
    assert ranking_losses.get("hinge") is hinge
    assert ranking_losses.properties_of("hinge") == RankingLossProperties(
        uses_distances=False, max_candidates=None, takes_margin=True, takes_target=False
    )


def test_only_the_order_of_the_ratings_counts():
    torch.manual_seed(0)
    scores, ratings = torch.randn(4, 5), torch.rand(4, 5)
    ranks = ratings.argsort(-1).argsort(-1).float()
    assert torch.equal(hinge(scores, ratings, everyone(scores)), hinge(scores, ranks, everyone(scores)))
