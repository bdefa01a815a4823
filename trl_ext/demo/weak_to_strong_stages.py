"""The stage `weak_to_strong`: a smaller model generates solutions, and the policy learns from them.

The weak supervisor starts untrained and learns from right solutions. The strong student is the policy, which knows the
task but is mediocre at it. See [`~trl_ext.weak_to_strong`].
"""

from typing import Any

from datasets import Dataset

from trl_ext import WeakToStrongArguments, WeakToStrongConfig, weak_to_strong
from trl_ext.demo.model import tiny_reward_base
from trl_ext.demo.task import make_problems
from trl_ext.demo.training import arguments
from trl_ext.pipelines.stages.cached_stages import StageContext


# The smaller model has one layer of half the width. Its learning rate is higher because it starts untrained.
WEAK_SIZE = {"hidden_size": 48, "num_layers": 1}
WEAK_LEARNING_RATE = 2e-3

EVAL_BATCH_SIZE = 64
MAX_COMPLETION_LENGTH = 24  # eight lines and some room


def run_weak_to_strong(context: StageContext) -> dict[str, Any]:
    """
    Trains the weak supervisor, the student and the ceiling. All three then solve the same held-out problems,
    with greedy decoding.

    Returns:
        `dict`: the exact match of `weak`, `student` and `ceiling` on `test_rows` problems, their 95 % `intervals`, and
        the performance gap recovered (`pgr` with `pgr_interval`). If `pgr` is undefined, `reason` says why.
    """
    settings = context.settings
    done: list[str] = []  # the finished runs, of three
    args = arguments(context, EVAL_BATCH_SIZE) | {"output_dir": str(context.folder), "report_to": "none"}
    report = weak_to_strong(
        WeakToStrongArguments(
            [str(tiny_reward_base(context.folder / "weak", **WEAK_SIZE))],
            [str(context.folders["policy"].resolve())],
            task="generation",
            student_loss="sft",
            seeds=[settings["seed"]],
            weak_training={"learning_rate": WEAK_LEARNING_RATE, "max_steps": settings["weak_steps"]},
            max_completion_length=MAX_COMPLETION_LENGTH,
            isolate="never",
        ),
        WeakToStrongConfig(**args),
        _solutions("train", settings["train_prompts"], settings["seed"]),
        _solutions("held_out", settings["held_out_prompts"], settings["seed"]),
        on_progress=lambda stage, share: context.progress((len(done) + share) / 3),
        on_end=lambda stage, outcome: done.append(stage.name),
    )
    (pair,) = report.pairs
    bounds = pair.intervals or {}
    return {
        "weak": pair.weak,
        "student": pair.weak_to_strong,
        "ceiling": pair.ceiling,
        "pgr": pair.pgr,
        "pgr_interval": pair.pgr_interval,
        "reason": pair.reason,
        "intervals": {"student" if name == "weak_to_strong" else name: ends for name, ends in bounds.items()},
        "test_rows": report.rows["test"],
    }


def _solutions(split: str, number: int, seed: int) -> Dataset:
    problems = make_problems(number, split, seed)
    return Dataset.from_list([{"prompt": problem.prompt, "completion": problem.solution} for problem in problems])
