"""The studies of a real language model: their measures, what the arms read, and that a run goes on and reports."""

import fcntl
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trl_ext.demo.model import tiny_reward_base


STUDIES = Path(__file__).resolve().parents[1] / "examples" / "studies"


@pytest.fixture
def studies(monkeypatch):
    """A function that gives the names of a module of the studies."""
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.syspath_prepend(str(STUDIES.parent))
    return lambda name: __import__(name)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a study as a script; what it printed, and what it said on the side."""

    def start(name: str, *arguments: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(STUDIES))
        capsys.readouterr()
        runpy.run_path(str(STUDIES / name), run_name="__main__")
        printed = capsys.readouterr()
        # bitsandbytes prints a line of its own
        return [line for line in printed.out.splitlines() if line.startswith("|")], printed.err

    return start


def test_auc_with_weights_is_that_of_scikit_learn(studies):
    draw = np.random.default_rng(0)
    scores, right = draw.integers(0, 6, 50).astype(float), draw.random(50) < 0.4  # with ties
    weights = draw.integers(0, 3, (4, 50)).astype(float)
    found = studies("real_measures").weighted_auc(scores, right, weights)
    assert found == pytest.approx([roc_auc_score(right, scores, sample_weight=own) for own in weights])


def test_the_order_of_a_row_counts_decided_pairs_and_ties_half(studies):
    in_order = studies("real_measures").in_order
    assert in_order([3.0, 1.0, 2.0], [1.0, 0.0, 0.0]) == 1.0
    assert in_order([1.0, 1.0, 2.0], [2.0, 1.0, 0.0]) == pytest.approx(0.5 / 3)


def test_rows_of_one_group_are_drawn_together(studies):
    measures = studies("real_measures")
    labels, scores = [[1.0, 0.0]] * 40, [[1.0, 0.0] if row % 2 else [0.0, 1.0] for row in range(40)]
    alone = measures.Judged(labels, [str(row) for row in range(40)], [""] * 40, "order").values(scores)
    by_ten = measures.Judged(labels, [str(row % 2) for row in range(40)], [""] * 40, "order").values(scores)
    assert alone[0] == by_ten[0] == 0.5
    assert alone[1:].std() == pytest.approx(0.5 / 40**0.5, rel=0.1)
    assert set(by_ten[1:].round(6)) == {0.0, 0.5, 1.0}


def test_auc_compares_steps_of_one_stratum(studies):
    judged = studies("real_measures").Judged([[1.0], [0.0], [1.0], [0.0]], list("abcd"), ["x", "x", "y", "y"], "auc")
    assert judged.values([[2.0], [1.0], [-5.0], [-6.0]])[0] == 1.0


def test_a_method_beats_all_only_if_every_interval_lies_above_zero(studies):
    compared = studies("real_measures").compared
    values = {"own": np.array([0.7, 0.68, 0.72]), "weak": np.array([0.5, 0.5, 0.5])}
    assert compared(values, "own", ["weak"])["beats all"]
    values["best"] = np.array([0.69, 0.70, 0.66])
    found = compared(values, "own", ["weak", "best"])
    assert found["over"] == "best" and not found["beats all"]
    assert found["gain"]["value"] == pytest.approx(0.01)


@pytest.mark.parametrize("candidates", [4, 5])
def test_pairs_of_a_ranking_read_as_many_texts(studies, candidates):
    sets, training = studies("real_sets"), studies("real_training")
    row = sets.Row("g", "p", [str(n) for n in range(candidates)], [float(n) for n in range(candidates)])
    draw = np.random.default_rng(0)
    found = [training.pairs_of(row, row.labels, draw, "pairs") for _ in range(400)]
    assert 2 * np.mean([len(pairs) for pairs in found]) == pytest.approx(candidates, rel=0.05)
    assert all(int(pair["chosen"]) > int(pair["rejected"]) for pairs in found for pair in pairs)


def test_a_quarter_of_the_pairs_is_turned_round_and_both_arms_read_the_same(studies):
    sets, training, arms = studies("real_sets"), studies("real_training"), studies("real_data").STUDIES["noise"].arms
    row = sets.Row("g", "p", [str(n) for n in range(4)], [float(n) for n in range(4)])
    found = {key: training.examples([row] * 800, sets.SETS["topical"], arm, seed=0) for key, arm in arms.items()}
    assert found["flipped"] == found["robust"]
    turned = [int(pair["chosen"]) < int(pair["rejected"]) for pair in found["flipped"]]
    assert np.mean(turned) == pytest.approx(0.25, abs=0.03) and len(turned) == 1600


def test_an_answer_is_right_if_it_is_rated_above_the_mean_of_its_row(studies):
    sets, training = studies("real_sets"), studies("real_training")
    rows = [
        sets.Row("g", "p", ["a", "b"], [1.0, 0.0]),
        sets.Row("h", "q", list("cdef"), [5.0, 1.0, 4.0, float("nan")]),
    ]
    arm = training.Arm("dense", data="answers")
    found = training.examples(rows, sets.SETS["harmless"], arm, seed=0)
    assert [(row["prompt"], row["completion"], bool(row["label"])) for row in found] == [
        ("p", "a", True),
        ("p", "b", False),
        ("q", "c", True),
        ("q", "d", False),
        ("q", "e", True),
    ]


def test_every_set_has_rows_with_something_to_compare(studies, data_dir):
    sets = studies("real_sets")
    for name, study in sets.SETS.items():
        rows = sets.load(name, data_dir, smoke=True)
        assert len(rows) == 25
        for row in rows:
            assert len(row.labels) == len(row.spans or row.texts)
            assert study.measure == "auc" or len(set(row.labels)) > 1
            assert all(row.texts[0][start:end].strip() for start, end in row.spans)


def test_prompts_of_one_conversation_are_one_group(studies, tmp_path):
    sets, judged = studies("real_sets"), {"completions": ["a", "b"], "scores": [2.0, 1.0], "ranks": [0, 1]}
    begun = "do you like films ?\n yes ."
    turns = [{"role": "user", "content": text} for text in ("first", "last")]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = {
        "topical": [{"prompt": begun}, {"prompt": begun + "\n which ?\n old ones ."}, {"prompt": "hello"}],
        "oasst": [{"prompt": turns, "tree": "t"}, {"prompt": turns[:1], "tree": "t"}, {"prompt": turns, "tree": "u"}],
        "harmless": [{"prompt": turns}, {"prompt": turns[:1]}, {"prompt": turns[1:]}],
    }
    for name, own in rows.items():
        (file,) = sets.SETS[name].files
        (tmp_path / file).parent.mkdir()
        lines = [json.dumps({**judged, **answers, "clean": True, **row}) + "\n" for row in own]
        (tmp_path / file).write_text("".join(lines))
        first, second, other = (row.group for row in sets.load(name, tmp_path))
        assert first == second != other


@pytest.mark.slow
def test_the_runner_reports_every_kind_of_labels(run, data_dir):
    lines, _ = run("real_data.py", "--smoke", "--sets", "topical", "gsm8k", "mistakes", "relevance")
    columns, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 4 and {"n-grams", "position", "likelihood", "hidden states"} <= set(columns)
    place = columns.index("LoRA, bf16")
    for row in rows:
        for cell in row[place : place + 2]:
            value, low, high = map(float, re.findall(r"[+-]?\d\.\d+", cell))
            assert low <= value <= high
    within = [row[place + 2] for row in rows]
    assert within[:2] == ["", ""] and all("rows" in cell for cell in within[2:])


@pytest.mark.slow
def test_members_are_trained_once_for_their_mean_and_their_merger(run, data_dir):
    lines, said = run("real_data.py", "--smoke", "--study", "options", "--sets", "topical", "--arms", "ensemble")
    assert [line.split("|")[1].strip() for line in lines[1:]] == [
        "three members, mean",
        "the same three, merged (WARM)",
    ]
    assert said.count("RewardTrainer:") == 3


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_keeps_to_its_hours(run, data_dir, tmp_path):
    model = tiny_reward_base(tmp_path / "model", hidden_size=16, num_layers=4)
    common = ["--study", "ties", "--sets", "topical", "--model", str(model), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="No fold is finished"):
        run("real_data.py", *common, "--hours", "0")
    with open(tmp_path / "out" / "topical.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="Another process works on topical"):
            run("real_data.py", *common)
    report = tmp_path / "report.json"
    lines, said = run("real_data.py", *common, "--folds", "1", "--epochs", "0.3", "--json", str(report))
    assert "rao_kupper" in said and len(lines) == 3
    (_, arm), _ = run("real_data.py", *common, "--folds", "1", "--epochs", "0.3", "--arms", "ties")
    assert arm.split("|")[2] == lines[2].split("|")[2]  # the one arm, from what is kept
    again, said = run("real_data.py", *common, "--folds", "2", "--epochs", "0.3", "--report")
    assert again == lines and "left" in said and "s)" not in said  # nothing ran
    found = json.loads(report.read_text())
    arm = found["figures"]["topical"]["arms"]["ties"]
    assert arm["low"] <= arm["value"] <= arm["high"] and arm["costs of a fold"]["tokens"] > 0
    assert {"title", "date", "machine", "command", "note", "columns", "rows"} <= set(found)


@pytest.mark.slow
def test_the_study_of_over_optimisation_compares_proxies(run):
    lines, _ = run("real_overoptimisation.py", "--smoke")
    names = [line.split("|")[1].strip() for line in lines]
    assert names[2:] == [
        "one model",
        "ensemble of four, mean",
        "ensemble of four, mean - std",
        "four merged (WARM)",
        "one model, mean - std (Laplace)",
    ]
