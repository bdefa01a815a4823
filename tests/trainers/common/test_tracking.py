"""One W&B run per trainer, no point dropped, and no failure of W&B stops training."""

import json
import re
import struct
from pathlib import Path

import pytest
import wandb
from datasets import Dataset
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.wandb_run import Run

from tests.program import run_offline_wandb
from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import SMALL, config, lora, trainer_for
from tests.trainers.table import TOKEN, rows_of, tiny_trainer
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.trainers.common import tracking


REPORTED = (*TOKEN, "reward ensemble", "orm ensemble")
SUMMARY_ONLY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def records_of(directory):
    """The records of an offline run's file: blocks of 32 KiB with pieces of (checksum, length, kind, bytes)."""
    (path,) = Path(directory).parent.glob("*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # too little for a piece: filled up
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def points_of(directory):
    """The logged rows of a run as dictionaries."""
    rows = [record.history for record in records_of(directory) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def finished(directory):
    return any(record.HasField("exit") for record in records_of(directory))


def policy_trainer(base, folder):
    """PPO with dense rewards, a checkpoint at step 2 of 3, and completions that are kept."""

    def thirds(completions, **columns):
        return [[(n, n + 1, n / 3) for n in range(min(3, len(text)))] for text in completions]

    args = PPOConfig(
        str(folder),
        **SMALL | {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "report_to": "wandb"},
        run_name="policy",
        num_generations=4,
        max_completion_length=6,
        log_completions=True,
        num_completions_to_print=0,
    )
    prompts = Dataset.from_list([{"prompt": text} for text in ("one", "two", "three", "four")])
    lengths = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    return PPOTrainer(str(base), lengths, thirds, args, train_dataset=prompts, peft_config=lora(r=2))


def report(folder):
    """Run in a process of its own: trainers of the table that report to W&B offline.

    W&B keeps one run per process and TRL decides at import whether it is there, so none of this can run inside pytest.
    """
    base = save_tiny_model(folder / "base")
    steps_given: list = []
    log = Run.log

    def watched(run, data, step=None, commit=None):
        steps_given.append(step)
        return log(run, data, step=step, commit=commit)

    Run.log = watched

    def trainer(name, **kwargs):
        args = config(
            folder / name,
            run_name=name,
            report_to="wandb",
            eval_strategy="steps",
            eval_steps=2,
            log_table_size=3,
            save_strategy="steps",
            save_steps=2,
            **kwargs,
        )
        return trainer_for(base, args, eval_dataset=Dataset.from_list(pair_rows(9)))

    told: dict = {"stages": [], "user": {}, "failures": {}}

    # three stages in one process
    first = None
    for name in ("one", "two", "three"):
        stage = trainer(name)
        stage.train()
        run = wandb.run
        stage.evaluate()
        stage.predict(Dataset.from_list(pair_rows(4)))
        told["stages"].append(
            {
                "name": run.name,
                "group": run.group,
                "id": run.id,
                "same_run_after_training": wandb.run is run,
                "directory": run.dir,
                "history": list(stage.state.log_history),
            }
        )
        first = first or stage
        del stage  # the next trainer may get its address
    third = wandb.run.id
    first.evaluate()  # an earlier trainer is used again: its own run, not that of the third
    told["again"] = {"id": wandb.run.id, "third": third, "directory": wandb.run.dir}

    # a run that the user opened
    wandb.finish()
    mine = wandb.init(project="mine", name="by hand")
    for name in ("four", "five"):
        trainer(name).train()
        told["user"][name] = wandb.run is mine
    mine.log({"after": 1.0})  # raises if it was closed
    told["user"]["directory"] = mine.dir
    mine.finish()

    # failures: of logging, of opening, of a missing package
    def fails(*args, **kwargs):
        raise OSError("no space left")

    messages: list[str] = []
    tracking.logger.warning = lambda message, *args: messages.append(message)
    Run.log = fails
    failing = trainer("six")
    failing.train()
    told["failures"]["log"] = {"steps": failing.state.global_step, "messages": messages.copy()}
    Run.log = watched
    wandb.finish()

    messages.clear()
    init, wandb.init = wandb.init, fails
    failing = trainer("seven")
    failing.train()
    told["failures"]["init"] = {
        "steps": failing.state.global_step,
        "messages": messages.copy(),
        "report_to": failing.args.report_to,
    }
    wandb.init = init

    messages.clear()
    tracking.is_wandb_available = lambda: False
    missing = trainer("eight")
    missing.train()
    told["failures"]["missing"] = {
        "steps": missing.state.global_step,
        "messages": messages.copy(),
        "report_to": missing.args.report_to,
        "run": wandb.run is not None,
    }
    tracking.is_wandb_available = lambda: True

    for kind in REPORTED:
        entry = tiny_trainer(
            kind,
            base,
            folder / kind,
            eval_rows=rows_of(kind, 9),
            run_name=kind,
            report_to="wandb",
            eval_strategy="steps",
            eval_steps=2,
            log_table_size=3,
            per_device_eval_batch_size=2,
            max_grad_norm=0.75,
        )
        entry.train()
        assert entry.args.max_grad_norm == 0.75
        told[kind] = {"name": wandb.run.name, "id": wandb.run.id, "directory": wandb.run.dir}

    policy = policy_trainer(save_tiny_model(folder / "language model", "qwen2"), folder / "policy")
    policy.train()
    told["policy"] = {"directory": wandb.run.dir, "history": policy.state.log_history}

    last = trainer("last")
    last.train()  # and the program ends
    told["last"] = {"directory": wandb.run.dir}
    told["steps_given"] = sorted({str(step) for step in steps_given})
    told["points"] = len(steps_given)
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    environment = {"WANDB_RUN_GROUP": "three stages", "WANDB_PROJECT": "testing"}
    return run_offline_wandb(report, tmp_path_factory.mktemp("wandb"), **environment)


def test_three_trainers_give_three_runs_in_one_group(told):
    stages = told["stages"]
    assert [stage["name"] for stage in stages] == ["one", "two", "three"]
    assert {stage["group"] for stage in stages} == {"three stages"}
    assert len({stage["id"] for stage in stages}) == 3
    assert all(stage["same_run_after_training"] for stage in stages)
    assert all(finished(stage["directory"]) for stage in stages)


def test_a_trainer_that_is_used_again_gets_its_own_run_back(told):
    assert told["again"]["id"] == told["stages"][0]["id"] != told["again"]["third"]
    (point,) = [point for point in points_of(told["again"]["directory"]) if "eval/accuracy" in point]
    assert point["train/global_step"] == 4


def test_no_point_is_dropped(told):
    """Every value of every entry of the trainer's own history is in the run's file, at its step."""
    for stage in told["stages"]:
        found = points_of(stage["directory"])
        wanted = [entry for entry in stage["history"] if set(entry) - {"step"}]
        assert len(wanted) >= 8
        for entry in wanted:
            values = {}
            for name, value in entry.items():
                if name != "step" and name not in SUMMARY_ONLY:
                    inside = name.startswith("eval_")
                    values[f"eval/{name[5:]}" if inside else f"train/{name}"] = value
            matches = [
                point
                for point in found
                if point.get("train/global_step") == entry["step"]
                and all(point.get(name) == pytest.approx(value, nan_ok=True) for name, value in values.items())
            ]
            assert len(matches) == 1 if len(values) > 1 else matches, (
                entry,
                found,
            )  # the last entry has an epoch only


def test_no_step_number_is_passed(told):
    assert told["points"] > 30
    assert told["steps_given"] == ["None"]


def test_tables_are_capped_and_scores_have_a_histogram(told):
    for stage in told["stages"]:
        found = points_of(stage["directory"])
        evaluations = [point for point in found if "eval/scores/_type" in point or "eval/scores" in point]
        assert len(evaluations) == 3  # steps 2 and 4, and by hand
        files = sorted(Path(stage["directory"], "media", "table", "eval").glob("samples_*.table.json"))
        assert len(files) == 3
        for file in files:
            table = json.loads(file.read_text())
            assert table["columns"] == ["group", "prompt", "completion", "score", "rank", "rating"]
            assert len(table["data"]) == 6  # 3 groups of 2, of 9
            for group in range(3):
                rows = [row for row in table["data"] if row[0] == group]
                assert sorted(row[4] for row in rows) == [1, 2]
                assert max(rows, key=lambda row: row[3])[4] == 1
                assert rows[0][1].startswith("<|begin_of_text|>Question")
                assert sorted(row[5] for row in rows) == [0.0, 1.0]


def test_a_run_of_the_user_is_used_and_left_open(told):
    assert told["user"]["four"] and told["user"]["five"]
    found = points_of(told["user"]["directory"])
    assert any("after" in point for point in found)
    assert len([point for point in found if "train/loss" in point]) == 8


def test_failures_never_stop_training(told):
    failures = told["failures"]
    assert all(failure["steps"] == 4 for failure in failures.values())
    assert len([message for message in failures["log"]["messages"] if "training continues" in message]) == 1
    assert "no space left" in failures["log"]["messages"][0]
    assert len(failures["init"]["messages"]) == 1
    assert "could not be started" in failures["init"]["messages"][0]
    assert failures["init"]["report_to"] == []
    assert len(failures["missing"]["messages"]) == 1
    assert "is not installed, or WANDB_DISABLED is set" in failures["missing"]["messages"][0]
    assert failures["missing"]["report_to"] == []
    assert failures["missing"]["run"] is False


def test_the_last_run_is_finished_when_the_program_ends(told):
    assert finished(told["last"]["directory"])


def test_one_line_says_that_nothing_is_reported(base, tmp_path, caplog):
    trainer = trainer_for(base, config(tmp_path))
    trainer.train()
    assert len([record for record in caplog.records if "Metrics are not reported" in record.message]) == 1


# ------------------------------------------------------------------------------------------- trainers of the table
METRICS = {
    "orm": {"train/loss", "train/accuracy", "eval/auc", "eval/best_of_n", "eval/scores"},
    "prm": {"train/loss", "train/accuracy", "eval/balanced_accuracy", "eval/processbench_f1", "eval/scores"},
    "segment": {"train/loss", "eval/tone_r2", "eval/length_spearman", "eval/scores"},
}


@pytest.mark.parametrize("kind", TOKEN)
def test_metrics_and_scores_are_logged(kind, told):
    assert told[kind]["name"] == kind
    points = points_of(told[kind]["directory"])
    names = {name.split("/_type")[0] for point in points for name in point}
    found = {wanted for wanted in METRICS[kind] for name in names if name.startswith(wanted)}
    assert found == METRICS[kind]
    steps = [point["train/global_step"] for point in points if "train/global_step" in point]
    assert steps == sorted(steps)


def test_each_trainer_has_a_run(told):
    runs = [told[kind] for kind in REPORTED]
    assert len({run["id"] for run in runs}) == len(REPORTED)
    assert all(finished(run["directory"]) for run in runs)


@pytest.mark.parametrize("kind", TOKEN)
def test_the_table_has_the_text_with_its_scores(kind, told):
    paths = sorted(Path(told[kind]["directory"]).glob("media/table/eval/samples_*.json"))
    assert len(paths) == 2  # of the evaluations after steps 2 and 4
    tables = [json.loads(path.read_text()) for path in paths]
    for table in tables:
        assert table["columns"] == ["row", "prompt", "completion", "scores", "labels"]
        assert len(table["data"]) == 3
    rows = rows_of(kind, 9)
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


@pytest.mark.parametrize("kind", REPORTED[3:])
def test_disagreement_is_logged_as_histogram_and_by_decile_and_the_config_as_given(kind, told):
    folder = Path(told[kind]["directory"])
    points = [point for point in points_of(folder) if "disagreement_histogram" in str(sorted(point))]
    assert len(points) == 2  # of the evaluations after steps 2 and 4
    assert any("disagreement_deciles" in name for name in points[0])
    assert list(folder.rglob("*disagreement_deciles*.table.json"))
    noted = [u for record in records_of(folder) if record.HasField("config") for u in record.config.update]
    assert {json.loads(update.value_json) for update in noted if update.key == "max_grad_norm"} == {0.75}


# --------------------------------------------------------------------------------------------------------- policies
def test_a_policy_shows_its_completions_and_pictures(told):
    directory = Path(told["policy"]["directory"])
    pages = sorted(directory.glob("media/html/train/completions/advantages_*.html"))
    assert len(pages) == 3  # of each step
    text = pages[-1].read_text(encoding="utf-8")
    assert text.count('<p class="note">Completion ') == 4 and "piece rewarded" in text and "value before it" in text
    for name in ("reward", "dense", "critic", "kl", "steps", "first_low"):
        found = list(directory.glob(f"media/images/train/pictures/policy_{name}_*.png"))
        assert len(found) == 2, name  # of the checkpoint and of the end
    points = points_of(directory)
    names = {name.split("/_type")[0] for point in points for name in point}
    assert {"train/completions/advantages", "train/pictures/policy_first_low"} <= {n.split("/size")[0] for n in names}
    (last,) = [point for point in points if any("pictures/" in name for name in point)][1:]
    assert last["train/global_step"] == 3
    assert {f"train/{name}" for name in told["policy"]["history"][0] if name.startswith("dense/")} <= names
