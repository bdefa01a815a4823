"""Two processes (gloo, CPU): the same losses as one process with twice the batch, every row counted
once, and a checkpoint that loads."""

import os
from functools import cache
from typing import Any, NamedTuple

import pytest
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file

from tests.models.helpers import max_change, scores_of
from tests.program import TORCHRUN, run_program
from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import history, lora, without_time
from tests.trainers.table import ENSEMBLES, TABLE, TOKEN, rows_of, tiny_trainer
from trl_ext import load_reward_model


class Run(NamedTuple):
    """A training on one process and on two."""

    kind: str
    rows: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    arguments: dict[str, Any]
    batch: int = 4
    """Rows a step, over all processes."""
    steps: int = 3
    """Log entries of the training."""
    peft: bool = False


SEQUENTIAL = {"train_sampling_strategy": "sequential"}
BOOTSTRAP = {"data_strategy": "bootstrap", "gradient_accumulation_steps": 2, **SEQUENTIAL}
LOGGED = {"max_steps": 6, "logging_steps": 2, **SEQUENTIAL}
MEMBERS = {"max_steps": 5, "max_grad_norm": 0.1}


def members(kind, **arguments):
    return Run(kind, rows_of(kind, 24), rows_of(kind, 9, seed=3), MEMBERS | arguments, steps=5)


def tokens(kind):
    arguments = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "averaging": "sequence" if kind == "segment" else "token",
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    return Run(kind, rows_of(kind, 24), rows_of(kind, 9, seed=3), SEQUENTIAL | arguments, peft=kind == "prm")


GROUPS = ranked_rows(9, k=4, ragged=True, seed=3)
RUNS = {
    "pairs": Run(
        "reward", pair_rows(24), ranked_rows(9, k=2, ragged=True, seed=3), LOGGED | {"loss_type": "bradley_terry"}, 8
    ),
    "rankings": Run(
        "reward",
        ranked_rows(24, k=4, ragged=True, ties=True),
        GROUPS,
        LOGGED | {"gradient_accumulation_steps": 2},
        peft=True,
    ),
    "by tokens": Run(  # two epochs of six batches
        "reward",
        ranked_rows(21, k=4, ragged=True, seed=7),
        GROUPS,
        LOGGED | {"max_tokens_per_batch": 190, "loss_type": "pairwise", "max_steps": -1, "num_train_epochs": 2},
    ),
    "members, shuffle": members("reward ensemble", data_strategy="shuffle"),
    "members, bootstrap": members("reward ensemble", branch_at=0.5, gradient_checkpointing=True, **BOOTSTRAP),
    "members of steps, shuffle": members("prm ensemble", data_strategy="shuffle"),
    "members of steps, bootstrap": members("prm ensemble", branch_at=0.5, **BOOTSTRAP),
    **{kind: tokens(kind) for kind in TOKEN},
}
SLOW = TOKEN
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUNS]
OF_GROUPS = ["pairs", "rankings", "by tokens"]


def train(folder, base, *names):
    """The runs of these names: what they log, which rows they see, how they evaluate. The models are saved."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {"processes": processes} | {name: train_one(folder / name, base, RUNS[name], processes) for name in names}


def train_one(folder, base, run, processes):
    arguments = {"per_device_train_batch_size": run.batch // processes, **run.arguments}
    if "max_tokens_per_batch" in arguments:  # a budget is per process, so that one process needs two batches
        arguments["gradient_accumulation_steps"] = 2 // processes
    data = Dataset.from_list(run.evaluated)
    kwargs = {"peft_config": lora()} if run.peft else {}
    trainer = tiny_trainer(run.kind, base, folder, run.rows, data, kwargs, **arguments)
    seen: list[list[int]] = []  # rows of each batch of this process
    collator = trainer.data_collator

    def noted(rows):
        batch = collator(rows)
        seen.append(batch["row_index"].tolist())
        return batch

    trainer.data_collator = noted
    trainer.train()
    trainer.data_collator = collator
    trainer.save_model()
    names = {name for entry in trainer.state.log_history for name in entry} - {"step", "epoch", "total_flos"}
    logged = {name: history(trainer, name) for name in names if not name.startswith(("train_", "data/"))}
    evaluations = []
    for size, shards in ((1, 1), (2, 2), (8, 3)):
        trainer.args.per_device_eval_batch_size = size
        stream = data.to_iterable_dataset(num_shards=shards)
        evaluations += [without_time(trainer.evaluate()), without_time(trainer.evaluate(stream))]
    predictions = trainer.predict(data).predictions.flatten().tolist()
    return {"logged": logged, "rows": gather_object([seen]), "evaluations": evaluations, "predictions": predictions}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Name of a run -> (what one process told of its group of runs, what two told, the folder of both)."""

    @cache
    def told(slow):
        folder = tmp_path_factory.mktemp("processes")
        names = [name for name in RUNS if (name in SLOW) == slow]
        one = train(folder / "one", base, *names)
        two = run_program(train, folder / "two", base, *names, launcher=TORCHRUN, timeout=400)
        return one, two, folder

    return lambda name: told(name in SLOW)


def tolerance(name):
    return 1e-4 if RUNS[name].kind in ENSEMBLES else 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_with_twice_the_batch(name, runs):
    one, two, _ = runs(name)
    assert (one["processes"], two["processes"]) == (1, 2)
    alone, together = one[name]["logged"], two[name]["logged"]
    assert len(alone["loss"]) == RUNS[name].steps
    wanted = {"loss", "grad_norm", "num_tokens"} | ({"accuracy"} if "segment" not in RUNS[name].kind else set())
    if name in OF_GROUPS:
        wanted |= {"kendall_tau", "margin", "min_reward", "mean_reward"}
    if RUNS[name].kind in ENSEMBLES:
        wanted |= {f"{what}_member_{member}" for what in ("loss", "accuracy") for member in range(3)}
    assert alone.keys() == together.keys() >= wanted
    for metric, values in alone.items():
        of_gradients = {"rel": 1e-4, "abs": 1e-4 if name not in SLOW else 1e-12} if metric == "grad_norm" else {}
        assert together[metric] == pytest.approx(values, **{"abs": tolerance(name), **of_gradients}, nan_ok=True), (
            metric
        )


@pytest.mark.parametrize("name", NAMES)
def test_nine_rows_evaluate_the_same_in_any_batches_and_processes(name, runs):
    one, two, _ = runs(name)
    evaluations = [*one[name]["evaluations"], *two[name]["evaluations"]]
    assert len(evaluations) == 12  # batch 1, 2, 8; a data set and a stream of 1, 2, 3 shards; one process and two
    for metrics in evaluations:
        assert len(metrics) >= (12 if name in OF_GROUPS else 6)
        assert metrics == pytest.approx(evaluations[0], abs=tolerance(name))
        if RUNS[name].kind in ENSEMBLES:
            assert {"eval_loss_member_2", "eval_disagreement"} <= metrics.keys()
    assert two[name]["predictions"] == pytest.approx(one[name]["predictions"], abs=tolerance(name))


def test_processes_have_their_own_batches_and_each_group_comes_once_an_epoch(runs):
    one, two, _ = runs("by tokens")
    (alone,) = one["by tokens"]["rows"]
    parts = two["by tokens"]["rows"]
    assert len(alone) == 12 and len(parts) == 2
    assert len({len(rows) for rows in alone}) > 1
    assert [rows for both in zip(*parts, strict=True) for rows in both] == alone
    for epoch in (alone[:6], alone[6:]):
        assert sorted(sum(epoch, [])) == list(range(21))


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_of_two_processes_loads(name, runs):
    _, _, folder = runs(name)
    one, two = folder / "one" / name, folder / "two" / name
    if RUNS[name].kind not in ENSEMBLES:
        limit = 1e-3 if name in OF_GROUPS else 1e-4
        assert max_change(scores_of(load_reward_model(one)), scores_of(load_reward_model(two))) < limit
        return
    for member in range(3):
        file = f"member-{member}/adapter_model.safetensors"
        alone, together = load_file(one / file), load_file(two / file)
        assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-4
    load_reward_model(two / "member-2")


def test_the_runs_cover_the_kinds_of_the_table():
    assert {run.kind for run in RUNS.values()} >= {*TABLE} - {"orm ensemble", "segment ensemble"}
