"""Two processes (gloo, CPU) train an ensemble as one process with twice the batch does."""

import pytest
from safetensors.torch import load_file

from tests.trainers import ensemble_process_program
from tests.trainers.helpers import run_in_two_processes, torchrun
from trl_ext import load_reward_model


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(what one process told, what two told, the folder of both)."""
    folder = tmp_path_factory.mktemp("ensemble_processes")
    one = ensemble_process_program.main(base, folder / "one")
    two = run_in_two_processes(torchrun("tests.trainers.ensemble_process_program", base, folder / "two"), timeout=180)
    return one, two, folder


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
