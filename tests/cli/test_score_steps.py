"""`trl-ext score` with rows of steps: the numbers of `RewardScorer.score_steps`, and what does not fit a model."""

import json
import math
import shutil

import pytest

from tests.scoring.conftest import save_reward_model
from tests.scoring.ensemble_helpers import save_members
from tests.tiny import save_tiny_model
from tests.trainers.table import outcome_rows, segment_rows, step_rows, tiny_trainer
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.cli import main as cli
from trl_ext.cli import score


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of each kind; of the process models one has two classes and one three."""
    base = save_tiny_model(tmp_path_factory.mktemp("base"))
    rows = {"orm": outcome_rows(8), "prm": step_rows(8), "segment": segment_rows(8)}
    made = {}
    for name, kind, more in (
        ("orm", "orm", {}),
        ("prm", "prm", {}),
        ("three classes", "prm", {"num_labels": 3, "label_placement": "all"}),
        ("segment", "segment", {}),
    ):
        own = step_rows(8, classes=3) if more else rows[kind]
        trainer = tiny_trainer(kind, base, tmp_path_factory.mktemp(kind), own, max_steps=2, learning_rate=2e-2, **more)
        trainer.train()
        trainer.save_model()
        made[name] = trainer.args.output_dir
    made["scalar"] = save_reward_model(tmp_path_factory.mktemp("scalar"))
    folder = tmp_path_factory.mktemp("ensemble")
    RewardEnsemble(save_members(folder)).save(folder / "saved")
    return made | {"ensemble": folder / "saved"}


def run(model, rows, folder, *more):
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cli.main(
        ["score", "--model", str(model), "--input", str(source), "--output", str(folder / "o.jsonl"), *more]
    )


def read(folder):
    return [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]


ODD = [
    {"prompt": "Question 1:\n", "completions": ["good", "", "bad.\n\nclear", " "], "labels": [True, None, 0, 1]},
    {"prompt": [{"role": "user", "content": "Say."}], "completions": ["grün 🙂", "wrong"], "labels": [1, 0.5]},
    {"prompt": None, "completions": ["kind"], "labels": [1]},
    {"prompt": "Question 2:\n", "completions": [], "labels": []},
]


@pytest.mark.parametrize("name", ["prm", "three classes"])
@pytest.mark.parametrize("flags", [{}, {"aggregation": "prod"}, {"max_length": 14}])
def test_scores_are_those_of_the_scorer(name, flags, models, tmp_path, capsys):
    rows = [*step_rows(9, seed=3), *ODD, {"prompt": "Question 3:\n", "completion": "good.\nbad.\n"}]
    said = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    assert run(models[name], rows, tmp_path, *said) == 0
    scored = read(tmp_path)
    assert [{k: v for k, v in row.items() if k not in score.SCORE_COLUMNS} for row in scored] == rows
    scorer, *stepwise = RewardScorer(models[name], **flags), *rows[:-1]
    steps = scorer.score_steps([row["prompt"] for row in stepwise], [row["completions"] for row in stepwise])
    for row, own, together in zip(scored, steps, scorer.combine(steps), strict=False):
        assert len(row["step_scores"]) == len(row["completions"])
        assert [s is None for s in row["step_scores"]] == [s is None for s in own]
        assert [s for s in row["step_scores"] if s is not None] == pytest.approx([s for s in own if s is not None])
        assert row["score"] == (None if together is None else pytest.approx(together))
    (last,) = scorer([rows[-1]["prompt"]], [rows[-1]["completion"]])
    assert scored[-1]["score"] == pytest.approx(last) and "step_scores" not in scored[-1]
    # the row without a step has no score; with 14 tokens some steps have none, and that is counted
    assert scored[len(rows) - 2]["step_scores"] == [] and scored[len(rows) - 2]["score"] is None
    missing = sum(own.count(None) for own in steps)
    assert (missing > 0) == ("max_length" in flags)
    assert (f", {missing} steps without a score because max_length cut them off." in capsys.readouterr().err) == (
        missing > 0
    )


def test_the_score_is_that_of_the_joined_completion(models, tmp_path):
    """Of steps as a policy writes them, it is what the scalar call gives, normalised as that is."""
    model, rows = shutil.copytree(models["prm"], tmp_path / "model"), step_rows(6, seed=4)
    prompts, joined = zip(*((row["prompt"], "\n".join([*row["completions"], ""])) for row in rows), strict=True)
    scorer = RewardScorer(model)
    raw = scorer(prompts, joined)
    scorer.fit_normalizer(prompts, joined)
    assert run(model, rows, tmp_path) == 0
    found = [row["score"] for row in read(tmp_path)]
    assert found == pytest.approx(scorer(prompts, joined), abs=1e-5) and found != pytest.approx(raw, abs=0.1)


def test_an_infinite_score_is_refused_because_json_has_none(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RewardScorer, "combine", lambda self, scores: [0.5, -math.inf])
    assert run(models["prm"], step_rows(2, seed=4), tmp_path, "--aggregation", "sum_log") != 0
    assert "line 2: the score is -inf; needed: a finite number" in capsys.readouterr().err


def test_steps_in_a_column_of_another_name_and_resumed(models, tmp_path, monkeypatch):
    """As in ProcessBench, whose rows have `problem` and `steps`."""
    monkeypatch.setattr(score, "CHUNK_ROWS", 3)
    rows = [
        {"problem": row["prompt"], "steps": row["completions"], "label": -1, "id": i}
        for i, row in enumerate(step_rows(8, seed=5))
    ]
    named = ["--prompt_column", "problem", "--steps_column", "steps"]
    assert run(models["prm"], rows, tmp_path, *named) == 0
    whole = (tmp_path / "o.jsonl").read_bytes()
    want = RewardScorer(models["prm"]).score_steps([row["problem"] for row in rows], [row["steps"] for row in rows])
    for row, own in zip(read(tmp_path), want, strict=True):
        assert row["step_scores"] == pytest.approx(own, abs=1e-6)
    (tmp_path / "o.jsonl").write_bytes(whole[: len(whole) // 2])
    assert run(models["prm"], rows, tmp_path, *named) == 0
    assert [row["id"] for row in read(tmp_path)] == list(range(8))
    assert run(models["prm"], rows, tmp_path, "--prompt_column", "problem") == 1  # other options


STEPS = {"prompt": "a", "completions": ["good", "bad"], "labels": [1, 0]}
NO_LABELS = {"prompt": "a", "completions": ["good", "bad"]}


@pytest.mark.parametrize(
    ("model", "row", "flags", "complaint"),
    [
        ("prm", NO_LABELS, [], "may be the steps of one completion or several completions. Give --steps_column"),
        ("prm", STEPS | {"labels": [1]}, [], "found 1 `labels` for 2 steps; needed: one label for each step"),
        ("prm", STEPS | {"completions": ["good", {"content": "bad"}]}, [], "needed: a list of steps, each a string"),
        ("prm", STEPS | {"completions": "good"}, [], "found 'good' in 'completions'; needed: a list of steps"),
        ("prm", STEPS | {"step_scores": []}, [], "found a column 'step_scores', which the scores would overwrite"),
        ("prm", {"prompt": "a", "steps": ["b"]}, [], "of steps with --steps_column"),
        ("orm", STEPS, [], "is a model of kind 'outcome', which does not score steps. Use a model of `trl-ext prm`"),
        ("segment", STEPS, [], "is a model of kind 'segment'"),
        ("scalar", STEPS, [], "is a model of kind 'scalar'"),
        ("scalar", NO_LABELS, ["--steps_column", "completions"], "found steps ('completions'); needed: completions"),
        ("ensemble", STEPS, [], "is an ensemble, which does not score steps. Give the folder of one member"),
    ],
)
def test_what_does_not_fit_is_said_with_its_line(model, row, flags, complaint, models, tmp_path, capsys):
    assert run(models[model], [{"completion": "good."}, row], tmp_path, *flags) == 1
    said = capsys.readouterr().err
    assert "line 2: " in said and complaint in said


@pytest.mark.parametrize("model", ["orm", "prm", "segment", "scalar", "ensemble"])
@pytest.mark.parametrize("row", [STEPS, NO_LABELS], ids=["labels", "no labels"])
def test_candidates_are_scored_where_that_is_said(model, row, models, tmp_path):
    assert run(models[model], [row], tmp_path, "--completion_column", "completions") == 0
    (scored,) = read(tmp_path)
    assert len(scored["scores"]) == 2 and "step_scores" not in scored
