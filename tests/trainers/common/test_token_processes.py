"""Token-level trainers with two processes (gloo, CPU): the same steps, every row counted once."""

import pytest

from tests.models.helpers import max_change, scores_of
from tests.trainers import token_process_program
from tests.trainers.helpers import run_in_two_processes, torchrun
from tests.trainers.table import KINDS
from trl_ext import load_reward_model


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(what one process told, what two told, the folder of both)."""
    folder = tmp_path_factory.mktemp("processes")
    one = token_process_program.main(base, folder / "one")
    two = run_in_two_processes(torchrun("tests.trainers.token_process_program", base, folder / "two"), timeout=400)
    return one, two, folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_twice_the_batch(kind, runs):
    one, two, _ = runs
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one[kind]["loss"]) == 3
    for metric in ("loss", "accuracy", "num_tokens"):
        assert two[kind][metric] == pytest.approx(one[kind][metric], abs=1e-5), metric
    assert two[kind]["grad_norm"] == pytest.approx(one[kind]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nine_rows_evaluate_the_same_in_any_batches_and_processes(kind, runs):
    one, two, _ = runs
    evaluations = [*one[kind]["evaluations"], *two[kind]["evaluations"]]
    assert len(evaluations) == 12  # batch 1, 2, 8; a data set and a stream of 1, 2, 3 shards; one process and two
    for metrics in evaluations:
        assert len(metrics) >= 6
        assert metrics == pytest.approx(evaluations[0], abs=1e-5)
    assert two[kind]["predictions"] == pytest.approx(one[kind]["predictions"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_of_two_processes_loads(kind, runs):
    _, _, folder = runs
    one, two = (load_reward_model(folder / name / kind) for name in ("one", "two"))
    assert max_change(scores_of(one), scores_of(two)) < 1e-4
