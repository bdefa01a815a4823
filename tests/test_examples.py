"""The examples run offline with --smoke, and the swap example is a TRL script with one line changed."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SWAPPED = "from trl_ext import RewardConfig, RewardTrainer"
FILES = sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("studies/*.py")])


def run(path: Path, monkeypatch, capsys, *arguments: str) -> list[str]:
    """Run an example as a script with --smoke and return what it printed."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--smoke"])
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does for a script
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
    named |= {"real_data.py", "real_overoptimisation.py"}
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


def test_ranked_dpo_example_learns(monkeypatch, capsys):
    lines = run(EXAMPLES / "ranked_dpo.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    (shares,) = [line.split()[5:] for line in lines if line.startswith("pairs in the right order:")]
    assert float(shares[-1]) > max(0.7, float(shares[0]))


def test_outcome_example_picks_the_right_sample(monkeypatch, capsys):
    lines = run(EXAMPLES / "orm_gsm8k.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    metrics = values(lines)
    assert metrics["question_auc"] > 0.8  # of four seeds the worst was 0.92
    assert metrics["best_of_n"] > 0.7 > metrics["mean_of_n"]
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


def tables(lines: list[str]) -> list[list[list[str]]]:
    """Rows of cells of each table that was printed, its head first."""
    found: list[list[list[str]]] = []
    for line in lines:
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif not line:
            found.append([])
    return [table for table in found if table]


def test_rejection_sampling_example_improves(monkeypatch, capsys):
    lines = run(EXAMPLES / "rejection_sampling.py", monkeypatch, capsys)
    found = rewards(lines)
    assert len(found) == 3 and found == sorted(found)
    assert len([line for line in lines if line.startswith("round ")]) == 2


def test_best_of_n_example_rises_with_n(monkeypatch, capsys):
    lines = run(EXAMPLES / "best_of_n.py", monkeypatch, capsys)
    curve = [float(line.split()[5].rstrip(",")) for line in lines if line.startswith("best of")]
    assert len(curve) == 5 and curve == sorted(curve)
    picked = [float(line.split()[0]) for line in lines if line.startswith("+0.")]
    assert sum(picked) / len(picked) == pytest.approx(curve[-1], abs=1e-3)


def test_judge_example_removes_the_position_bias_and_trains(monkeypatch, capsys):
    lines = run(EXAMPLES / "label_preferences.py", monkeypatch, capsys)
    assert "accuracy: 0.500 in one order, 1.000 in both" in lines
    assert losses(lines)[-1] < losses(lines)[0]


@pytest.mark.slow
def test_judge_study_asks_in_every_way(data_dir, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EXT_DATA", str(data_dir))
    (table,) = tables(["", *run(EXAMPLES / "studies/judge.py", monkeypatch, capsys)])
    assert [row[0] for row in table] == [
        "asked",
        "---",
        "which does less harm",
        "grade from 1 to 5",
        "which is better",
        "the shorter answer wins",
    ]
    assert all(0 <= float(row[1].split()[0]) <= 1 for row in table[2:])


def test_dpo_example_trains_on_pairs(monkeypatch, capsys):
    lines = run(EXAMPLES / "dpo_from_rejection_sampling.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    assert any("pairs, mean margin" in line for line in lines)


@pytest.mark.slow
def test_rejection_sampling_study(monkeypatch, capsys, data_dir):
    monkeypatch.setenv("TRL_EXT_DATA", str(data_dir))
    picks = run(EXAMPLES / "studies/rejection_sampling.py", monkeypatch, capsys, "picks")
    right = {line.split()[0]: float(line.split()[1]) for line in picks[2:]}
    assert right["random"] == pytest.approx(0.379, abs=1e-3) and right["oracle"] == pytest.approx(0.672, abs=1e-3)
    assert right["random"] < right["majority"] < right["oracle"]
    rounds = run(EXAMPLES / "studies/rejection_sampling.py", monkeypatch, capsys, "rounds")
    arms = [line.split()[1] for line in rounds if line.split()[:1] in (["0"], ["1"])]
    assert arms == ["before", "verifier", "random"]


def test_studies_say_which_data_are_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRL_EXT_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="has no orm_gsm8k/model_solutions.jsonl. Set TRL_EXT_DATA"):
        run(EXAMPLES / "studies/real_data.py", monkeypatch, capsys, "--sets", "gsm8k")


def test_ensemble_example_scores_with_its_interval(monkeypatch, capsys):
    lines = run(EXAMPLES / "reward_ensemble.py", monkeypatch, capsys)
    assert losses(lines)[-1] < losses(lines)[0]
    (fusion,) = [line.split()[1:] for line in lines if line.startswith("fusion:") and "+" not in line]
    assert len(fusion) == 3
    ranges = [re.findall(r"[+-]\d\.\d{3}", line) for line in lines if line.startswith("3+4=")]
    assert len(ranges) == 3
    assert all(float(lower) <= float(reward) <= float(upper) for reward, lower, upper in ranges)


def test_policy_and_reward_models_share_one_base(monkeypatch, capsys):
    lines = run(EXAMPLES / "grpo_shared_base.py", monkeypatch, capsys)
    (memory,) = [line for line in lines if line.startswith("MB: ")]
    base, policy, members, together, apart = (float(number) for number in re.findall(r"\d+\.\d+", memory))
    assert together == pytest.approx(base + policy + members, abs=2e-3)
    assert apart - together == pytest.approx(base, abs=2e-3)
    assert sum(line.startswith("reward=") for line in lines) == 2


def test_overoptimisation_example_runs(monkeypatch, capsys):
    lines = run(EXAMPLES / "studies/overoptimisation.py", monkeypatch, capsys)
    table = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert {"oracle", "mean", "min (WCO)", "mean - 0.5 var (UWO)"} <= set(table)


@pytest.mark.slow
def test_weak_to_strong_example_reports_four_experiments(monkeypatch, capsys):
    found = tables(["", *run(EXAMPLES / "weak_to_strong.py", monkeypatch, capsys)])
    assert len(found) == 4
    for _, row in found:
        assert all(0 <= float(cell.split()[0]) <= 1 for cell in row[2:5]) and row[-1] == "1"


@pytest.mark.slow
def test_selection_study_keeps_and_trains(monkeypatch, capsys):
    (table,) = tables(["", *run(EXAMPLES / "studies/weak_supervision.py", monkeypatch, capsys, "selection")])
    assert [row[0] for row in table] == ["kept", "25%", "50%", "70%", "100%"]
    assert all(0 <= float(cell) <= 1 for row in table[1:] for cell in row[1:])
    with pytest.raises(SystemExit, match="has no runs"):
        run(EXAMPLES / "studies/weak_supervision.py", monkeypatch, capsys, "cascade", "--output_dir", "nowhere")


@pytest.mark.slow
def test_ppo_example_shares_a_base_and_reads_its_critic(monkeypatch, capsys):
    lines = run(EXAMPLES / "ppo_shared_base.py", monkeypatch, capsys)
    assert len([line for line in lines if re.match(r"reward=-?\d", line)]) == 3
    (line,) = [line for line in lines if line.startswith("values:")]
    assert len(line.split()) >= 2


@pytest.mark.slow
def test_dense_grpo_example_reports_steps_and_credit(monkeypatch, capsys):
    lines = run(EXAMPLES / "dense_grpo_steps.py", monkeypatch, capsys)
    assert len([line for line in lines if re.match(r"verifier=\d", line)]) == 2
    assert any(line.startswith("report:") and line.endswith("policy.html") for line in lines)


@pytest.mark.slow
def test_study_of_policies_compares_every_arm(monkeypatch, capsys):
    lines = run(EXAMPLES / "studies/policies.py", monkeypatch, capsys)
    rows = [line for line in lines if re.match(r"\| [\w, .-]+ \| \d", line)]
    assert len(rows) == 10  # before, and nine arms


def test_dense_credit_wins_on_a_chain_where_the_outcome_is_rare(monkeypatch, capsys):
    """Six steps with four choices: one of 4,096 random answers is right, so the outcome alone says nothing."""
    chain = runpy.run_path(str(EXAMPLES / "studies/chain.py"))
    learnt = {
        name: chain["train"](chain["ARMS"][name], length=6, steps=40, learning_rate=8.0, seed=0)
        for name in ("outcome", "process", "shaped, lambda 0")
    }
    assert learnt["outcome"] < 0.01
    assert learnt["process"] > 0.9 and learnt["shaped, lambda 0"] > 0.9
    assert len(run(EXAMPLES / "studies/chain.py", monkeypatch, capsys)) == 7


def test_active_choice_example_labels_in_rounds(monkeypatch, capsys):
    lines = [line for line in run(EXAMPLES / "active_choice.py", monkeypatch, capsys) if line.startswith("round ")]
    assert [re.search(r": (\w+), (\d+) labelled, (\d+) left", line).groups() for line in lines] == [
        ("random", "8", "92"),
        ("fisher", "16", "84"),
        ("fisher", "24", "76"),
    ]


@pytest.mark.slow
def test_study_of_choice_compares_strategies(monkeypatch, capsys, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--json", str(tmp_path / "choice.json")]
    (table,) = tables(["", *run(EXAMPLES / "studies/choice.py", monkeypatch, capsys, *arguments)])
    assert [row[0] for row in table[2:]][:2] == ["random", "entropy"] and len(table) == 9
    assert all(0.5 < float(cell) <= 1 for row in table[2:] for cell in row[1:7])
    result = json.loads((tmp_path / "choice.json").read_text())
    assert len(result["columns"]) == len(result["rows"][0])
    runs = (tmp_path / "runs.jsonl").read_text()
    run(EXAMPLES / "studies/choice.py", monkeypatch, capsys, *arguments)  # nothing is left to do
    assert (tmp_path / "runs.jsonl").read_text() == runs


@pytest.mark.slow
def test_label_steps_example_labels_and_trains(monkeypatch, capsys):
    lines = run(EXAMPLES / "label_steps.py", monkeypatch, capsys)
    (counts,) = [re.findall(r"\d+", line) for line in lines if line.endswith("generated tokens")]
    assert 40 < int(counts[0]) <= 80 and int(counts[1]) > 0
    assert sum(line.startswith("'") for line in lines) == 3
    assert any(re.match(r"P\(correct\): \[0\.\d+", line) for line in lines)


@pytest.mark.slow
def test_study_of_step_labels_compares_every_arm(monkeypatch, capsys):
    (table,) = tables(["", *run(EXAMPLES / "studies/step_labels.py", monkeypatch, capsys)])
    rows = [row for row in table if row[0] != "---"]
    assert [row[0] for row in rows[:3]] == ["labels", "exact labels", "full, 8 rollouts, hard"] and len(rows) == 12
    assert all(0 <= float(row[4]) <= 1 for row in rows[1:-1]) and rows[3][8] and not rows[4][8]
