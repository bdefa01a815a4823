"""R32: two processes (gloo, CPU) train an ensemble as one process with twice the batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainers import ensemble_process_program
from trl_ext import load_reward_model


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(what one process told, what two told, the folder of both)."""
    folder = tmp_path_factory.mktemp("ensemble_processes")
    one = ensemble_process_program.main(base, folder / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = subprocess.Popen(
        [*launch, "-m", "tests.trainers.ensemble_process_program", str(base), str(folder / "two")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    try:
        output, errors = started.communicate(timeout=180)
    finally:
        started.terminate()  # the launcher then ends its processes; nothing where all is over
        started.wait()
    assert started.returncode == 0, errors[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return one, json.loads(line.removeprefix("RESULT ")), folder


@pytest.mark.parametrize("run", ensemble_process_program.RUNS)
def test_two_processes_train_as_one_with_twice_the_batch(run, runs):
    one, two, folder = runs
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one[run]["loss"]) == 5
    for name, values in one[run].items():
        assert two[run][name] == pytest.approx(values, abs=1e-4), name
    for member in range(3):
        file = f"{run}/member-{member}/adapter_model.safetensors"
        alone, together = load_file(folder / "one" / file), load_file(folder / "two" / file)
        assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-4
    load_reward_model(folder / "two" / run / "member-2")
