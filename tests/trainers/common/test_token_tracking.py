"""W&B for token-level trainers: metrics, histograms and a table of completions with the score behind each span."""

import json
import re
from pathlib import Path

import pytest

from tests.trainers.common.test_tracking import finished, points_of
from tests.trainers.helpers import run_offline_wandb
from tests.trainers.table import KINDS


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    return run_offline_wandb(folder, "-m", "tests.trainers.token_tracking_program", str(folder))


METRICS = {
    "orm": {"train/loss", "train/accuracy", "eval/auc", "eval/best_of_n", "eval/scores"},
    "prm": {"train/loss", "train/accuracy", "eval/balanced_accuracy", "eval/processbench_f1", "eval/scores"},
    "segment": {"train/loss", "eval/tone_r2", "eval/length_spearman", "eval/scores"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_scores_are_logged(kind, told):
    assert told[kind]["name"] == kind
    points = points_of(told[kind]["directory"])
    names = {name.split("/_type")[0] for point in points for name in point}
    found = {wanted for wanted in METRICS[kind] for name in names if name.startswith(wanted)}
    assert found == METRICS[kind]
    steps = [point["train/global_step"] for point in points if "train/global_step" in point]
    assert steps == sorted(steps)


def test_each_trainer_has_a_run(told):
    assert len({run["id"] for run in told.values()}) == 3
    assert all(finished(run["directory"]) for run in told.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_the_text_with_its_scores(kind, told):
    paths = sorted(Path(told[kind]["directory"]).glob("media/table/eval/samples_*.json"))
    assert len(paths) == 2  # of the evaluations after steps 2 and 4
    tables = [json.loads(path.read_text()) for path in paths]
    for table in tables:
        assert table["columns"] == ["row", "prompt", "completion", "scores", "labels"]
        assert len(table["data"]) == 3
    rows = KINDS[kind][2](9)
    for (number, prompt, completion, scores, labels), row in zip(tables[0]["data"], rows, strict=False):
        assert row["prompt"].strip() in prompt
        text = re.sub(r"\[(\w+ )?[+-]\d+\.\d\d\]", "", completion)
        given = row["completion"] if kind != "prm" else "\n".join(row["completions"])
        assert given.strip() in text
        scores = json.loads(scores)
        written = [float(score) for score in re.findall(r"([+-]\d+\.\d\d)\]", completion)]
        assert written == pytest.approx(scores, abs=0.0051)
        assert len(scores) == len(json.loads(labels)) == {"orm": 1}.get(kind, len(row.get("labels", scores)))
        assert rows[number] is row
    if kind == "segment":
        assert "[tone " in tables[0]["data"][0][2]
        assert "[length " in tables[0]["data"][1][2]
