"""The examples run offline with --smoke, and the swap example is a TRL script with one line changed."""

import re
import runpy
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SWAPPED = "from trl_ext import RewardConfig, RewardTrainer"
FILES = sorted(EXAMPLES.glob("*.py"))


def run(path: Path, monkeypatch, capsys) -> list[str]:
    """Run an example as a script with --smoke and return what it printed."""
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    capsys.readouterr()
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def losses(lines: list[str]) -> list[float]:
    (line,) = [line for line in lines if line.startswith("losses:")]
    return [float(word) for word in line.split()[1:]]


def values(lines: list[str]) -> dict[str, float]:
    """The line of metrics, `name=value` each."""
    (line,) = [line for line in lines if re.match(r"\w+=\d", line)]
    return {name: float(value) for name, value in (word.split("=") for word in line.split())}


def rewards(lines: list[str]) -> list[float]:
    (line,) = [line for line in lines if line.startswith("rewards:")]
    return [float(word) for word in line.split()[1:]]


def test_there_are_examples():
    named = {"reward_trl_swap.py", "reward_rankings.py", "orm_gsm8k.py", "prm_stepwise.py", "segment_rewards.py"}
    assert named <= {path.name for path in FILES}


def test_swap_gives_the_losses_of_trl(monkeypatch, capsys, tmp_path):
    path = EXAMPLES / "reward_trl_swap.py"
    source = path.read_text()
    assert source.count(SWAPPED) == 1
    original = tmp_path / "original.py"
    original.write_text(source.replace(SWAPPED, "from trl import RewardConfig, RewardTrainer", 1))
    assert original.read_text() != source
    ours, theirs = (losses(run(script, monkeypatch, capsys)) for script in (path, original))
    assert len(ours) == 5
    assert ours == pytest.approx(theirs, abs=2e-6)  # printed with six digits


def test_rankings_example_learns_and_reloads(monkeypatch, capsys):
    lines = run(EXAMPLES / "reward_rankings.py", monkeypatch, capsys)
    values = losses(lines)
    assert values[-1] < values[0]
    ranked = [line.split() for line in lines if "3+4=" in line]
    assert len(ranked) == 3
    assert [float(score) for score, _ in ranked] == sorted((float(score) for score, _ in ranked), reverse=True)


def test_outcome_example_picks_the_right_sample(monkeypatch, capsys):
    lines = run(EXAMPLES / "orm_gsm8k.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    metrics = values(lines)
    assert metrics["question_auc"] > 0.9
    assert metrics["best_of_n"] > 0.9 > metrics["mean_of_n"]
    assert "best of 3: #### 0" in lines
    (logits,) = [line for line in lines if line.startswith("logits:")]
    assert len(logits.split()) == 1 + len("#### 0") + 1  # bytes, and EOS


def test_stepwise_example_finds_the_first_wrong_step(monkeypatch, capsys):
    lines = run(EXAMPLES / "prm_stepwise.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    metrics = values(lines)
    assert metrics["auc_to_first_error"] > max(0.9, metrics["step_index_auc"])
    assert metrics["processbench_f1"] > 0.8
    steps = [line.split() for line in lines if re.match(r"[01]\.\d{3}  ", line)]
    assert [step for _, step in steps] == ["2", "3", "x", "5"]
    assert float(steps[2][0]) < 0.5 < min(float(steps[0][0]), float(steps[1][0]))
    good, bad = rewards(lines)
    assert bad < 0.5 < good


def test_segment_example_tells_the_categories_apart(monkeypatch, capsys):
    lines = run(EXAMPLES / "segment_rewards.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    assert min(values(lines).values()) > 0.9
    right, wrong = rewards(lines)
    assert right > wrong + 0.2
