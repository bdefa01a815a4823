"""Measures of a policy: numbers worked by hand, and signs of reward hacking."""

import logging
import math

import pytest
import torch

from trl_ext.metrics.policy import explained_variance, first_low_steps, repetition, sums_by_step, trend
from trl_ext.trainers.policy import watch
from trl_ext.trainers.policy.watch import HackingWatch


REWARDS = torch.tensor([[0.9, 0.0, 0.2, 0.1], [0.0, 0.7, 0.0, 0.6], [0.0, 0.0, 0.0, 0.0]])
GIVEN = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()


def test_rewards_by_position_of_the_step():
    sums, counts = sums_by_step(REWARDS, GIVEN, 2)  # the second position counts the third too
    torch.testing.assert_close(sums, torch.tensor([0.9 + 0.7, 0.2 + 0.1 + 0.6]))
    assert counts.tolist() == [2, 3]


def test_first_low_step_of_each_completion():
    assert first_low_steps(REWARDS, GIVEN, 0.5, 3).tolist() == [0, 1, 0, 1]
    assert first_low_steps(REWARDS, GIVEN, 0.8, 3).tolist() == [1, 1, 0, 0]
    assert first_low_steps(REWARDS, GIVEN, 0.15, 2).tolist() == [0, 1, 1]  # the third step counts as the last position


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, False]])
    observed = torch.tensor([[0.0, 2.0, 9.0]])
    assert explained_variance(observed + 5, observed, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros(1, 3), observed, mask) == pytest.approx(0)
    assert explained_variance(-observed, observed, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(observed, torch.ones(1, 3), mask))
    assert math.isnan(explained_variance(observed, observed, mask & False))


def test_repeated_runs_of_tokens():
    assert repetition([1, 2, 3], size=4) == 0
    assert repetition([1] * 8, size=4) == pytest.approx(0.8)
    assert repetition(list(range(8)), size=4) == 0


def test_trend_is_the_t_value_of_a_slope():
    assert math.isnan(trend([1.0, 2.0, 3.0]))
    assert trend([1.0, 1.0, 1.0, 1.0]) == 0
    assert trend([1.0, 2.0, 3.0, 4.0]) == math.inf
    values = [0.3, 0.1, 0.9, 0.5, 1.2]
    r = torch.corrcoef(torch.stack([torch.arange(5.0), torch.tensor(values)]))[0, 1].item()
    assert trend(values) == pytest.approx(r * math.sqrt(3 / (1 - r**2)), rel=1e-4)
    assert trend(values[::-1]) == pytest.approx(-trend(values))


def test_a_reward_that_rises_alone_is_said_once(caplog):
    rises = [n + 0.1 * (n % 3) for n in range(watch.WINDOW + 5)]
    alone, together = HackingWatch("truth"), HackingWatch("truth")
    with caplog.at_level(logging.WARNING):
        for n, reward in enumerate(rises):
            assert together.add(reward, reward)["watch/hacking_suspected"] == 0
            found = alone.add(reward, 0.5 + 0.1 * (n % 2))
    assert found["watch/hacking_suspected"] == 1
    assert caplog.text.count("may exploit the reward") == 1


def test_a_dense_reward_that_rises_alone_is_said(caplog):
    """The scalar reward is the verifier itself, so it cannot part from it; the dense rewards can."""
    watched = HackingWatch("truth")
    with caplog.at_level(logging.WARNING):
        for n in range(watch.WINDOW + 5):
            truth = 0.5 + 0.1 * (n % 2)
            found = watched.add(truth, truth, dense=5 + 0.1 * n + 0.01 * (n % 3))
    assert found["watch/hacking_suspected"] == 1 and found["watch/dense_reward_trend"] > watch.RISES
    assert watched.add(0.5, 0.5)["watch/hacking_suspected"] == 0  # no dense reward: another window begins
    assert caplog.text.count("the dense reward rose") == 1


def test_a_verifier_that_falls_is_said_whatever_the_rewards_do(caplog):
    watched = HackingWatch("truth")
    with caplog.at_level(logging.WARNING):
        for n in range(watch.WINDOW + 5):
            found = watched.add(1 - 0.01 * n + 0.001 * (n % 3), 1 - 0.01 * n + 0.001 * (n % 2))
    assert found["watch/hacking_suspected"] == 0 and "watch/dense_reward_trend" not in found
    assert caplog.text.count("makes it worse") == 1


def test_a_verifier_that_falls_while_the_reward_rises_is_said_too(caplog):
    watched = HackingWatch("truth")
    with caplog.at_level(logging.WARNING):
        for n in range(watch.WINDOW):
            found = watched.add(n + 0.1 * (n % 3), 1 - 0.01 * n + 0.001 * (n % 2))
            assert found["watch/hacking_suspected"] == float(n == watch.WINDOW - 1)  # not from a few batches
    assert "may exploit the reward" in caplog.text and "makes it worse" in caplog.text
