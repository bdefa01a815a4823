"""Advantages: numbers by hand, TRL's formula, brute force over the definition, and what must not change anything."""

import itertools

import pytest
import torch

from trl_ext.losses.advantages import (
    clipped_value_loss,
    gae,
    group_normalize,
    last_tokens,
    mean_to_go,
    min_form,
    normalize_steps,
    potentials_of,
    returns_to_go,
    shape_rewards,
    shrunken_steps,
    td_errors,
    whiten,
)


def ragged(n=6, t=9, seed=0):
    """Rewards, values and a mask with holes and padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, t, generator=generator) > 0.3
    mask[:, 0] = True
    return torch.randn(n, t, generator=generator), torch.randn(n, t, generator=generator), mask


def by_definition(rewards, values, gamma, lam):
    """GAE of one completion without padding, as the sum of its definition."""
    steps = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_normalize_is_trls(scale):
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([1.0, 0.0, 2.0, torch.nan, 5.0, 5.0, 5.0, 5.0, 0.1, 0.2, 0.3, 0.4])
    mean = torch.nanmean(rewards.view(-1, 4), dim=1).repeat_interleave(4)
    wanted = rewards - mean
    if scale == "group":
        wanted = wanted / (nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4) + 1e-4)
    elif scale == "batch":
        wanted = wanted / (nanstd(rewards) + 1e-4)
    wanted = torch.nan_to_num(wanted, nan=0.0)
    torch.testing.assert_close(group_normalize(rewards, 4, scale), wanted, atol=1e-6, rtol=0)


def test_gae_is_its_definition_and_passes_over_what_is_masked():
    rewards, values, mask = ragged()
    found = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.7)
    for row in range(len(rewards)):
        here = mask[row]
        wanted = by_definition(rewards[row, here].tolist(), values[row, here].tolist(), 0.9, 0.7)
        torch.testing.assert_close(found[row, here], torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    assert not found[~mask].any()
    poisoned = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    torch.testing.assert_close(gae(*poisoned, mask, 0.9, 0.7), found)


def test_the_ends_of_gae_are_td_errors_and_monte_carlo():
    rewards, values, mask = ragged()
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0), td_errors(rewards, values, mask, 0.9))
    returns = returns_to_go(rewards.masked_fill(~mask, 0.0), mask, 0.9)
    monte_carlo = (returns - values).masked_fill(~mask, 0.0)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 1.0), monte_carlo, atol=1e-5, rtol=1e-5)


def test_process_supervision_by_hand():
    # two completions: steps at tokens 1 and 3 with rewards 1 and 0; one step at token 2 with reward 1
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    given = torch.tensor([[False, True, False, True], [False, False, True, False]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    mean, std = 2 / 3, torch.tensor([1.0, 0.0, 1.0]).std().item() + 1e-4
    high, low = (1 - mean) / std, (0 - mean) / std
    steps = normalize_steps(rewards, given, group_size=2)
    torch.testing.assert_close(steps[0], torch.tensor([0.0, high, 0.0, low]))
    advantages = returns_to_go(steps, mask)
    torch.testing.assert_close(advantages[0], torch.tensor([high + low, high + low, low, low]))
    torch.testing.assert_close(advantages[1], torch.tensor([high, high, high, 0.0]))


def test_groups_do_not_see_each_other_and_a_flat_group_is_without_credit():
    rewards, _, given = ragged(8, 5)
    alone = normalize_steps(rewards[:4], given[:4], 4)
    torch.testing.assert_close(normalize_steps(rewards, given, 4)[:4], alone)
    flat = normalize_steps(torch.full((4, 5), 0.7), given[:4], 4)
    assert flat.abs().max() < 1e-2  # the rounding of the mean, over 1e-4
    assert not normalize_steps(rewards, torch.zeros_like(given), 4).any()


def test_shaping_keeps_the_best_policy_of_an_exact_chain():
    """All 2^3 action sequences of a small exact problem: shaping moves every return by the same amount."""
    generator = torch.Generator().manual_seed(0)
    tree = {
        s: torch.randn(1, generator=generator).item() for n in range(4) for s in itertools.product((0, 1), repeat=n)
    }
    finals = {s: torch.randn(1, generator=generator).item() for s in itertools.product((0, 1), repeat=3)}
    rewards = torch.tensor([[0.0, 0.0, finals[s]] for s in finals])
    potentials = torch.tensor([[tree[s[:t]] for t in range(3)] for s in finals])
    mask = torch.ones(8, 3, dtype=torch.bool)
    shaped = shape_rewards(rewards, potentials, mask)
    change = returns_to_go(shaped, mask)[:, 0] - returns_to_go(rewards, mask)[:, 0]
    torch.testing.assert_close(change, torch.full((8,), -tree[()]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["last", "min", "sum"])
def test_shaping_keeps_the_expected_gradient_of_every_policy(form):
    """The exact policy gradient over all 2^3 sequences of a table of logits; plain dense rewards change it."""
    generator = torch.Generator().manual_seed(1)
    states = [s for n in range(3) for s in itertools.product((0, 1), repeat=n)]
    sequences = list(itertools.product((0, 1), repeat=3))
    outcome = torch.randn(8, generator=generator)
    dense = {s: torch.randn(2, generator=generator) for s in states}
    rewards = torch.stack([torch.stack([dense[s[:t]][s[t]] for t in range(3)]) for s in sequences])
    mask = torch.ones(8, 3, dtype=torch.bool)

    def gradient(advantages):
        logits = {s: torch.tensor([0.3, -0.2 * len(s)], requires_grad=True) for s in states}
        chosen = [[logits[s[:t]].log_softmax(0)[s[t]] for t in range(3)] for s in sequences]
        chosen = torch.stack([torch.stack(row) for row in chosen])  # (8, 3)
        (chosen.detach().sum(1).exp()[:, None] * chosen * advantages).sum().backward()
        return torch.stack([logits[s].grad for s in states])

    plain = outcome[:, None] * last_tokens(mask)
    right = gradient(returns_to_go(plain, mask))
    potentials = potentials_of(rewards, mask, mask, 8, form)
    torch.testing.assert_close(gradient(gae(plain, potentials, mask, gae_lambda=1.0)), right, atol=1e-5, rtol=1e-4)
    assert (gradient(returns_to_go(plain + rewards, mask)) - right).abs().max() > 0.05
    assert (gradient(gae(plain, potentials, mask, gae_lambda=0.5)) - right).abs().max() > 0.01


def test_potentials_by_hand():
    """Two completions of one prompt; the second one has no reward, so it stays at the group's first potential."""
    rewards = torch.tensor([[0.0, 0.8, 0.0, 0.2, 0.6, 9.0], [7.0] * 6])
    given = torch.tensor([[False, True, False, True, True, False], [False] * 6])
    mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    last = potentials_of(rewards, given, mask, 2, "last")
    torch.testing.assert_close(last, torch.tensor([[0.8, 0.8, 0.8, 0.8, 0.2, 0.0], [0.8] * 6]))
    lowest = potentials_of(rewards, given, mask, 2, "min")
    torch.testing.assert_close(lowest, torch.tensor([[0.8, 0.8, 0.8, 0.8, 0.2, 0.0], [0.8] * 6]))
    given[0, 2] = True  # a reward of 0, and then a better one
    torch.testing.assert_close(
        potentials_of(rewards, given, mask, 2, "min")[0], torch.tensor([0.8, 0.8, 0.8, 0.0, 0.0, 0.0])
    )
    summed = potentials_of(rewards, given, mask, 2, "sum")
    torch.testing.assert_close(summed, torch.tensor([[0.0, 0.0, 0.8, 0.8, 1.0, 0.0], [0.0] * 6]))


def test_rare_steps_are_trusted_less():
    """Four completions of one prompt: three take step 1 at the start, one takes step 2."""
    ids = torch.tensor([[1, 5], [1, 5], [1, 6], [2, 7]])
    given = torch.tensor([[True, True]] * 4)
    returns = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    found = shrunken_steps(returns, ids, given, torch.ones(4, 2).bool(), 4)
    mean, of_1 = 3 / 4, 2 / 3
    between = 3 * (of_1 - mean) ** 2 + (1 - mean) ** 2
    gate = between / (between + 2 / 3)
    wanted = [gate * 3 / 4 * (of_1 - mean)] * 3 + [gate * 1 / 2 * (1 - mean)]
    assert found[:, 0].tolist() == pytest.approx(wanted)
    # behind step 1, two completions agree on step 5 and one takes 6; nobody else was behind step 2
    assert found[:, 1].tolist() == pytest.approx([2 / 3 * (1 - of_1)] * 2 + [1 / 2 * (0 - of_1), 0])
    alone = shrunken_steps(returns, ids, given, torch.ones(4, 2).bool(), 1)
    assert not alone.any()


def test_means_to_go_do_not_grow_with_the_number_of_steps():
    rewards = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.0, 0.5, 9.0]])
    given = torch.tensor([[True, True, True, True], [True, False, True, True]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    found = mean_to_go(rewards, given & mask, mask)
    assert found[0].tolist() == [0.5] * 4
    assert found[1].tolist() == [0.5, 0.5, 0.5, 0.0]


def test_clipped_value_loss_is_the_larger_error_and_stops_the_gradient_beyond_the_range():
    values = torch.tensor([1.0, 0.1, -1.0], requires_grad=True)
    losses = clipped_value_loss(values, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), 0.2)
    assert losses.tolist() == pytest.approx([0.8**2 / 2, 0.9**2 / 2, 2.0**2 / 2])
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -0.9, -2.0])
    plain = clipped_value_loss(values.detach(), torch.zeros(3), torch.ones(3), None)
    assert plain.tolist() == pytest.approx([0.0, 0.9**2 / 2, 2.0])
    with pytest.raises(ValueError, match="cliprange"):
        clipped_value_loss(values, values, values, 0.0)


def test_min_form_adds_up_to_the_worst_step():
    rewards = torch.tensor([[0.9, 0.2, 0.8, 9.0], [0.5, 0.0, 0.0, 0.0]])
    given = torch.tensor([[True, True, True, False], [True, False, False, False]])
    sharp = min_form(rewards, given, temperature=0.005)
    torch.testing.assert_close(sharp.sum(1), torch.tensor([0.2, 0.5]), atol=1e-4, rtol=0)
    weights = torch.exp(-torch.tensor([0.9, 0.2, 0.8]) / 0.1)
    wanted = weights / weights.sum() * torch.tensor([0.9, 0.2, 0.8])
    torch.testing.assert_close(min_form(rewards, given)[0, :3], wanted)
    assert not min_form(rewards, torch.zeros_like(given)).any()


def test_whitened_tokens_have_mean_zero_and_deviation_one():
    advantages, _, mask = ragged(6, 40)
    for size in (None, 3):
        found = whiten(advantages, mask, size)
        for rows in (slice(0, 3), slice(3, 6)) if size else (slice(0, 6),):
            tokens = found[rows][mask[rows]]
            assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
            assert tokens.std().item() == pytest.approx(1, abs=1e-3)
        assert not found[~mask].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 3).bool()), r"one shape \(N, T\)"),
        (lambda: gae(*torch.zeros(2, 2, 3), torch.ones(2, 3).bool(), gamma=1.5), "gamma=1.5"),
        (lambda: min_form(torch.zeros(1, 2), torch.ones(1, 2).bool(), temperature=0), "above 0"),
        (lambda: group_normalize(torch.zeros(5), 2), "5 completions do not make groups of 2"),
        (lambda: group_normalize(torch.zeros(4), 2, "mean"), "scale='mean'"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_and_half_precision_rewards_stay_finite():
    given = torch.ones(4, 6, dtype=torch.bool)
    for rewards in (torch.randn(4, 6) * 1e4, torch.randn(4, 6).bfloat16()):
        for found in (min_form(rewards, given), normalize_steps(rewards, given, 2), returns_to_go(rewards, given)):
            assert found.isfinite().all()
            assert found.dtype == torch.float32
