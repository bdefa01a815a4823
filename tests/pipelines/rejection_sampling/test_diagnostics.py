"""Metrics of a round by hand, what evaluation averages, when the watch barks, and the plot."""

import builtins
import math

import pytest

from tests.pipelines.rejection_sampling.test_selection import scored
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.rejection_sampling.diagnostics import (
    evaluation_metrics,
    hacking_warning,
    no_gain_warning,
    plot_rounds,
    round_metrics,
)
from trl_ext.pipelines.rejection_sampling.selection import select


def test_metrics_of_a_round_by_hand():
    data = scored(
        [[1.0, 3.0, math.nan], [2.0, 2.0]],
        texts=[["a", "bbb", "c"], ["dd", "dd"]],
        finished=[[True, True, True], [False, True]],
    )
    metrics = round_metrics(data, select(data))
    assert metrics["samples"] == 5 and metrics["selected"] == 2 and metrics["duplicates"] == 1
    assert metrics["acceptance"] == 2 / 5
    assert metrics["unscorable_share"] == metrics["truncated_share"] == 1 / 5
    assert metrics["distinct_share"] == 4 / 5
    assert metrics["length"] == pytest.approx(9 / 5) and metrics["selected_length"] == 2.5
    assert metrics["reward"] == 2.0 and metrics["selected_reward"] == 2.5
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5))
    assert metrics["decidable"] == 0.5  # the second prompt has one score only
    assert metrics["reward_spread"] == 1.0
    assert metrics["length_correlation"] == pytest.approx(1.0)


def test_pairs_count_both_and_nothing_scored_gives_no_reward():
    data = scored([[1.0, 3.0], [2.0, 0.0]])
    pairs = round_metrics(data, select(data, "best_worst_pairs"))
    assert pairs["acceptance"] == 1.0 and pairs["selected_reward"] == 2.5
    data = scored([[math.nan] * 2])
    metrics = round_metrics(data, select(data))
    assert metrics["unscorable_share"] == 1.0 and "reward" not in metrics and "decidable" not in metrics


def sample(scores, length=3):
    return Sample("id", 0, "q", "text", list(range(length)), "stop", None, 0, scores=scores)


def test_evaluation_is_a_mean_over_prompts():
    groups = [
        [sample({"a": 1.0, "b": 0.0, "v": 1.0}), sample({"a": None, "b": 2.0, "v": None}, length=5)],
        [sample({"a": None, "b": None, "v": 0.0})],
        [sample({"a": 3.0, "b": 1.0, "v": 0.0})],
    ]
    metrics = evaluation_metrics(groups, {"a": 1.0, "b": 0.5}, "v")
    assert metrics["eval_reward"] == pytest.approx(((1.0 + 1.0) / 2 + 3.5) / 2)  # the second prompt has none
    assert metrics["eval_reward_error"] == pytest.approx(math.sqrt(2 * 1.25**2) / math.sqrt(2))
    assert metrics["eval_verifier"] == pytest.approx(1 / 3)
    assert metrics["eval_length"] == pytest.approx((4 + 3 + 3) / 3)
    assert "eval_verifier" not in evaluation_metrics(groups, {"a": 1.0}, None)


def history(rewards, truths, error=0.1):
    return [
        {"eval_reward": r, "eval_reward_error": error, "eval_verifier": t, "eval_verifier_error": error}
        for r, t in zip(rewards, truths, strict=True)
    ]


@pytest.mark.parametrize(
    ("rewards", "truths", "barks"),
    [
        ([0.0, 1.0], [0.5, 0.5], True),
        ([0.0, 1.0], [0.5, 0.2], True),
        ([0.0, 1.0], [0.5, 0.9], False),  # both rise
        ([0.0, 0.2], [0.5, 0.5], False),  # within the errors
        ([0.0, 2.0, 0.1], [0.5, 0.5, 0.5], False),  # the last counts
        ([1.0], [0.5], False),
    ],
)
def test_the_watch(rewards, truths, barks):
    warning = hacking_warning(history(rewards, truths))
    assert (warning is not None) == barks
    if barks:
        assert "rose from 0 to 1" in warning


def test_no_verifier_no_watch():
    assert hacking_warning([{"eval_reward": 0.0, "eval_reward_error": 0.1}] * 2) is None


def test_no_round_is_better():
    history = [{"round": 0, "eval_reward": 1.0}, {"round": 1, "eval_reward": 1.0}, {"round": 2, "eval_reward": 0.5}]
    assert "eval_reward 1 before training, 1 after round 1" in no_gain_warning(history, 1)
    history[1]["eval_reward"] = 2.0
    assert no_gain_warning(history, 1) is None and no_gain_warning([{"round": 0}, {"round": 1}], 1) is None
    rated = [{**row, "eval_verifier": 0.25} for row in history]  # the verifier decides
    assert "eval_verifier 0.25 before" in no_gain_warning(rated, 1)


def test_plot_and_no_matplotlib(tmp_path, monkeypatch):
    rows = [{"round": 0, "eval_reward": 0.1}, {"round": 1, "eval_reward": 0.2, "reward": 0.1, "decidable": 0.5}]
    pytest.importorskip("matplotlib")
    assert plot_rounds(rows, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not plot_rounds(rows, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
