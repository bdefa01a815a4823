"""What the tests of ranking losses share: parametrisations, made-up groups, and references without code of ours."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import bradley_terry, pairwise, ranking_losses


NAMES = ("bradley_terry", "pairwise", "plackett_luce", "listnet", "pointwise", "lambda_loss")
LOSSES = {name: ranking_losses.get(name) for name in NAMES}
LISTS = {name: loss for name, loss in LOSSES.items() if name != "bradley_terry"}  # take K > 2
MARGINS = {"bradley_terry": bradley_terry, "pairwise": pairwise}

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_list_loss = pytest.mark.parametrize("loss", LISTS.values(), ids=LISTS)
each_margin_loss = pytest.mark.parametrize("loss", MARGINS.values(), ids=MARGINS)


def everyone(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def one(loss, scores, ratings, **kwargs):
    """The loss of one group, from lists."""
    scores, ratings = torch.tensor([scores]), torch.tensor([ratings])
    return loss(scores, ratings, everyone(scores), **kwargs).item()


def with_gradient(loss, scores, *args, **kwargs):
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, *args, **kwargs)
    value.sum().backward()
    return value.detach(), scores.grad


def softplus(x):
    return math.log1p(math.exp(x))


def trl_loss(chosen, rejected, margin=0.0):
    """What trl.RewardTrainer.compute_loss minimises, before the mean."""
    return -F.logsigmoid(chosen - rejected - margin)


def brute_force(scores, ratings):
    """-log of the summed probability of all orders that agree with the ratings; differentiable, fp64."""
    scores = scores.double()
    total = []
    for order in itertools.permutations(range(len(scores))):
        if all(ratings[a] >= ratings[b] for a, b in itertools.pairwise(order)):
            ordered = scores[list(order)]
            total.append(sum(ordered[i] - ordered[i:].logsumexp(0) for i in range(len(order))))
    return -torch.stack(total).logsumexp(0)


def ragged(groups=16, width=7, levels=None, seed=0):
    """Scores, ratings (of few levels: with ties) and a mask with holes anywhere, at least one real candidate each."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(groups, width, generator=generator)
    ratings = torch.stack([torch.randperm(width, generator=generator) for _ in range(groups)]).float()
    if levels is not None:
        ratings = torch.randint(0, levels, (groups, width), generator=generator).float()
    mask = torch.rand(groups, width, generator=generator) < 0.75
    mask[torch.arange(groups), torch.randint(0, width, (groups,), generator=generator)] = True
    return scores, ratings, mask


def pairs(groups=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(groups, 2, generator=generator)
    return scores, torch.tensor([[1.0, 0.0]]).expand(groups, 2), torch.ones(groups, 2, dtype=torch.bool)
