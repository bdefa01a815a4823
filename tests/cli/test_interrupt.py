"""Ctrl-C: one line that says how to go on, no traceback and no warnings of Python's; the same command then goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import pair_rows, save_tiny_model


ROOT = Path(__file__).resolve().parents[2]
TRAINING = ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture
def here(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    prompts = [{"prompt": f"say {number}:"} for number in range(200)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "slowly.py").write_text(
        "import time\n\ndef score(completions, **columns):\n    time.sleep(0.2)\n    return [1.0] * len(completions)\n"
    )
    return tmp_path


def start(here, *argv):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trl_ext.cli.main", *argv],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def interrupted(here, pattern, *argv):
    """Start a command, press Ctrl-C when there is a file of this pattern, and return what it said."""
    process = start(here, *argv)
    try:
        deadline = time.monotonic() + 400
        while not list(here.glob(pattern)):
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in errors and "semaphore" not in errors and "KeyboardInterrupt" not in errors
    assert errors.rstrip().splitlines()[-1].startswith(f"trl-ext {argv[0]}: interrupted.")
    return errors


def finished(here, *argv):
    process = start(here, *argv)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-2000:]
    return output, errors


def report_of(output):
    """The JSON that a command prints; a package may print a line before it (WANDB_MODE=offline)."""
    return json.loads(output[output.index("{") :])


@pytest.mark.slow
def test_weak_to_strong_goes_on(base, here):
    argv = ["weak-to-strong", "--weak_model_name_or_path", base, "--strong_model_name_or_path", base]
    argv += ["--dataset_name", "pairs.jsonl", "--output_dir", "out", *TRAINING, "--max_steps", "40", "--seeds", "0"]
    argv += ["--weak_training", '{"max_steps": 2}', "--dtype", "float32"]
    errors = interrupted(here, "out/student-*.partial", *argv)
    assert "Run the same command again" in errors
    before = {path: path.stat().st_mtime_ns for path in (here / "out").glob("*-seed-0/model.safetensors")}
    output, errors = finished(here, *argv)
    assert len(before) == 2 and {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((here / "out" / "report.json").read_text())["pairs"]
    assert (output + errors).count("kept from an earlier run") == 2


@pytest.mark.slow
def test_rejection_sampling_goes_on(base, here):
    argv = ["rejection-sample", "--model_name_or_path", base, "--reward_funcs", "slowly.py:score"]
    argv += ["--dataset_name", "prompts.jsonl", "--output_dir", "out", "--num_generations", "2"]
    argv += ["--max_completion_length", "4", "--shard_size", "4"]
    assert "Run the same command again" in interrupted(here, "out/scores/**/*00003*", *argv)
    before = {path: path.stat().st_mtime_ns for path in (here / "out" / "rollouts").rglob("*.jsonl*")}
    output, _ = finished(here, *argv)
    assert before and {path: path.stat().st_mtime_ns for path in before} == before
    assert report_of(output)["rows"] == 200


@pytest.mark.slow
def test_best_of_n_goes_on(base, here):
    argv = ["best-of-n", "--model_name_or_path", base, "--reward_funcs", "slowly.py:score", "--input", "prompts.jsonl"]
    argv += ["--output", "best.jsonl", "--n", "2", "--max_completion_length", "4"]
    assert "Run the same command again" in interrupted(here, "best.jsonl", *argv)
    output, _ = finished(here, *argv)
    found = report_of(output)
    assert found["rows"] == 200 and found["earlier"] > 0


@pytest.mark.slow
def test_training_says_how_to_resume(base, here):
    argv = ["reward", "--model_name_or_path", base, "--dataset_name", "pairs.jsonl", "--output_dir", "out", *TRAINING]
    argv += ["--max_steps", "600", "--save_steps", "5"]
    errors = interrupted(here, "out/checkpoint-5/trainer_state.json", *argv)
    assert "--resume_from_checkpoint true" in errors
