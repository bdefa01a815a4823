"""One W&B run per trainer, no point dropped, and no failure of W&B stops training."""

import json
import struct
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from tests.trainers.helpers import config, run_offline_wandb, trainer_for


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


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    program = ("-m", "tests.trainers.tracking_program", str(folder))
    return run_offline_wandb(folder, *program, WANDB_RUN_GROUP="three stages", WANDB_PROJECT="testing")


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
