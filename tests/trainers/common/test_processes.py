"""Two processes (gloo, CPU): the same losses as one process with twice the batch, every row counted
once, and a checkpoint that loads."""

import pytest
import torch

from tests.trainers import process_program
from tests.trainers.helpers import run_in_two_processes, torchrun
from trl_ext import load_reward_model
from trl_ext.models.heads import candidate_scores


NAMES = ["pairs", "rankings", "by tokens"]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(what one process told, what two told, the folder of the two)."""
    folder = tmp_path_factory.mktemp("processes")
    one = process_program.main(base, folder / "one")
    two = run_in_two_processes(torchrun("tests.trainers.process_program", base, folder / "two"), timeout=180)
    return one, two, folder / "two"


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_with_twice_the_batch(name, runs):
    one, two, _ = runs
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one[name]["loss"]) == 3
    for metric in ("loss", "accuracy", "kendall_tau", "margin", "min_reward", "mean_reward", "num_tokens"):
        assert two[name][metric] == pytest.approx(one[name][metric], abs=1e-5), metric
    assert two[name]["grad_norm"] == pytest.approx(one[name]["grad_norm"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nine_rows_evaluate_the_same_in_any_batches_and_processes(name, runs):
    one, two, _ = runs
    evaluations = [*one[name]["evaluations"], *two[name]["evaluations"]]
    assert len(evaluations) == 12  # batch 1, 2, 8; a data set and a stream of 1, 2, 3 shards; one process and two
    for metrics in evaluations:
        assert len(metrics) >= 12
        assert metrics == pytest.approx(evaluations[0], abs=1e-5)
    for alone, together in zip(one[name]["predictions"], two[name]["predictions"], strict=True):
        assert together == pytest.approx(alone, abs=1e-5)


def test_processes_have_their_own_batches_and_each_group_comes_once_an_epoch(runs):
    one, two, _ = runs
    (alone,) = one["by tokens"]["rows"]
    parts = two["by tokens"]["rows"]
    assert len(alone) == 12 and len(parts) == 2
    assert len({len(rows) for rows in alone}) > 1
    assert [rows for both in zip(*parts, strict=True) for rows in both] == alone
    for epoch in (alone[:6], alone[6:]):
        assert sorted(sum(epoch, [])) == list(range(21))


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_of_two_processes_loads(name, runs):
    _, _, folder = runs
    ids = torch.tensor([[5, 9, 7, 30]])
    found = [
        candidate_scores(load_reward_model(path / name).eval(), ids, torch.ones_like(ids)).item()
        for path in (folder, folder.parent / "one")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
