"""The stage `weak_to_strong`: a smaller model labels pairs, and the policy's base learns from those labels.

The weak model starts from nothing; the strong one is the policy, which has written many solutions. Both learn to tell
a right answer from a wrong one to the same prompt. See [`~trl_ext.weak_to_strong`].
"""

from typing import Any

from datasets import Dataset

from trl_ext import RewardConfig, WeakToStrongArguments, weak_to_strong
from trl_ext.pipelines.cached_stages import StageContext

from .model import tiny_reward_base
from .policy_stages import read_rows
from .task import Problem
from .training import Rows, arguments


# The smaller model has one layer of half the width.
WEAK_SIZE = {"hidden_size": 48, "num_layers": 1}

EVAL_BATCH_SIZE = 64


def run_weak_to_strong(context: StageContext) -> dict[str, Any]:
    """
    Trains the weak model, the student and the ceiling, and judges all on pairs of other prompts.

    Returns:
        `dict`: the accuracies `weak`, `student` and `ceiling` on `test_pairs`, and what the student recovered, `pgr`
        with `pgr_interval`, or why that is undefined (`reason`).
    """
    settings, samples = context.settings, context.folders["samples"]
    args = arguments(context, EVAL_BATCH_SIZE) | {"output_dir": str(context.folder), "report_to": "none"}
    report = weak_to_strong(
        WeakToStrongArguments(
            [str(tiny_reward_base(context.folder / "weak", **WEAK_SIZE))],
            [str(context.folders["policy"].resolve())],
            student_loss="logconf",
            seeds=[settings["seed"]],
            weak_training={"learning_rate": 2 * settings["learning_rate"], "max_steps": settings["weak_steps"]},
            isolate="never",
        ),
        RewardConfig(**args),
        pairs(read_rows(samples, "train")),
        pairs(read_rows(samples, "held_out")),
        on_end=lambda stage, outcome: context.progress(0.3),
    )
    (pair,) = report.pairs
    return {
        "weak": pair.weak,
        "student": pair.weak_to_strong,
        "ceiling": pair.ceiling,
        "pgr": pair.pgr,
        "pgr_interval": pair.pgr_interval,
        "reason": pair.reason,
        "test_pairs": report.rows["test"],
    }


def pairs(rows: Rows) -> Dataset:
    """A right and a wrong sample of each prompt that has a wrong one; where none is right, the solution is."""
    found = []
    for row in rows:
        by_verdict = dict(zip(reversed(row["answer_right"]), reversed(row["completions"]), strict=True))
        if False in by_verdict:
            solution = Problem(tuple(map(int, row["prompt"].removesuffix(":\n")))).solution
            chosen = by_verdict.get(True, solution)
            found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": by_verdict[False]})
    return Dataset.from_list(found)
