"""`trl-ext orm`, `prm` and `segment`: recipes of `configs/` with a tiny model in place of their own, then `score`."""

import json
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model
from tests.trainers.table import outcome_rows, segment_rows, step_rows
from trl_ext import RewardScorer
from trl_ext.cli import main as cli


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT = ["--max_steps", "2", "--eval_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--bf16", "false"]
SHORT += ["--gradient_accumulation_steps", "1", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
KINDS = {
    "orm": (outcome_rows, "outcome", "mean", 1),
    "prm": (step_rows, "process", "prod", 2),
    "segment": (lambda n, seed=0: segment_rows(n, binary=True, seed=seed), "segment", None, 2),
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_and_its_model_scores(kind, base, tmp_path, capsys):
    make, saved_as, aggregation, outputs = KINDS[kind]
    data, out, target = tmp_path / "data", tmp_path / "out", tmp_path / "scored.jsonl"
    data.mkdir()
    write(data / "train.jsonl", make(12))
    write(data / "test.jsonl", make(6, seed=1))
    command = [kind, "--config", str(CONFIGS / kind / f"{kind}_lora_0.6b.yaml"), "--model_name_or_path", str(base)]
    if kind == "segment":
        command += ["--categories", "tone", "length"]  # the recipe names those of its own data
    assert cli.main([*command, "--dataset_name", str(data), "--output_dir", str(out), *SHORT]) == 0
    described = json.loads((out / "reward_model.json").read_text())
    assert (described["kind"], described["num_labels"], described["is_adapter"]) == (saved_as, outputs, True)
    assert "eval_loss" in capsys.readouterr().out

    rows = [{"prompt": "Question 1:\n", "completion": text} for text in ("good. clear. bad.\n", "wrong wrong.\n")]
    source = write(tmp_path / "rows.jsonl", rows)
    weights = {"tone": 0.5, "length": 0.25} if kind == "segment" else aggregation
    said = json.dumps(weights) if kind == "segment" else weights
    command = ["score", "--model", str(out), "--input", str(source), "--output", str(target)]
    assert cli.main([*command, "--aggregation", said]) == 0
    found = [json.loads(line)["score"] for line in target.read_text().splitlines()]
    scorer = RewardScorer(out, aggregation=weights)
    want = scorer([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert found == pytest.approx(want, abs=1e-6)
    assert cli.main([*command, "--aggregation", said]) == 0  # goes on, with nothing left to do
    if kind == "prm":  # rows of its own data
        command[-1] = str(target := tmp_path / "steps.jsonl")
        write(source, rows := step_rows(3))
        assert cli.main([*command, "--aggregation", said]) == 0
        found = [json.loads(line)["step_scores"] for line in target.read_text().splitlines()]
        want = scorer.score_steps([row["prompt"] for row in rows], [row["completions"] for row in rows])
        assert [len(own) for own in found] == [len(row["completions"]) for row in rows]
        assert sum(found, []) == pytest.approx(sum(want, []), abs=1e-6)


def test_an_ensemble_from_the_recipe_of_one_model(base, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write(data / "train.jsonl", step_rows(12))
    write(data / "test.jsonl", step_rows(6, seed=1))
    command = ["ensemble", "--kind", "prm", "--config", str(CONFIGS / "prm" / "prm_lora_0.6b.yaml"), *SHORT]
    command += ["--model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(out)]
    assert cli.main([*command, "--num_members", "2", "--data_strategy", "bootstrap"]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]  # the console shows five metrics
    assert any("eval_loss_member_1" in entry for entry in history)
    assert {json.loads((out / f"member-{m}" / "reward_model.json").read_text())["kind"] for m in (0, 1)} == {"process"}
    with pytest.raises(SystemExit) as stop:
        cli.main(["ensemble", "--kind", "step"])
    assert stop.value.code == 2


def test_weights_that_are_not_json(base, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"completion": "good."}])
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["score", "--model", str(base), "--input", str(source), "--output", "-", "--aggregation", "{tone: 0.5}"]
        )
    assert stop.value.code == 2
    assert "not valid JSON" in capsys.readouterr().err
