"""`trl-ext bench token`: compare training steps of our `ORMTrainer` on flat rows with the same steps on padded rows.

Each question has several answers. `group_by_prompt` keeps them in one batch, so both sides train on the same batches.
The case knows the trainer. It does not know how the trainer works.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.padded import line_of, padded_beside_ours, plot_speedups, table_of
from trl_ext.bench.runner import (
    Run,
    add_model_arguments,
    add_run_arguments,
    check_counts,
    circumstances,
    shape_of,
    timed_training,
    training_arguments,
)
from trl_ext.bench.synthetic import labelled_rows, save_model, words_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset

SIDES = {"padded": False, "flat": "auto"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench token`."""
    parser.add_argument(
        "--shapes", nargs="*", default=["256,64,4", "64,256,4"], help="P,C,K: question tokens, answer tokens, answers"
    )
    parser.add_argument("--questions", type=int, default=2, help="questions in a batch, with all their answers")
    parser.add_argument("--output_dir", default="outputs/bench_token", help="where bench.json and bench.png go")
    add_run_arguments(parser)
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the [`circumstances`]. A case has what [`padded_beside_ours`] returns for the sides
        `"padded"` and `"flat"`.
    """
    check_counts(args, warmup=1, steps=1, repeats=1, questions=1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(args.shapes):
            p, c, k = shape_of(shape, "P,C,K", (1, 2, 1), "P >= 1, C >= 2 (EOS is one of them) and K >= 1")
            rows = labelled_rows("orm", args.questions * (args.warmup + args.steps), p, c, k, args.seed)
            save_model(f"{folder}/{number}", args, p + c, words_tokenizer())
            cases.append(_measure_case(rows, f"{folder}/{number}", args, p, c, k))
            print(line_of(cases[-1]), flush=True)
    return {"cases": cases, **circumstances(args)}


def _measure_case(rows: "Dataset", model: str, args: argparse.Namespace, p: int, c: int, k: int) -> dict[str, Any]:
    train = {side: partial(_train, rows, side, model, args, k) for side in SIDES}
    return {
        "name": f"({p}, {c}, {k})",
        "rows_per_batch": k * args.questions,
        **padded_beside_ours(train, args.repeats, args.questions * k * (p + c)),
    }


def _train(rows: "Dataset", side: str, model: str, args: argparse.Namespace, k: int, **more: Any) -> Run:
    """Train one side once; `more` holds further arguments of its config."""
    from peft import LoraConfig

    from trl_ext import ORMConfig, ORMTrainer

    grouped = {"group_by_prompt": True, "shared_prefix": SIDES[side]}
    config = ORMConfig(**training_arguments(args, f"{model}/{side}", k * args.questions, **grouped, **more))
    adapter = LoraConfig(r=args.lora_r, target_modules="all-linear") if args.lora_r else None
    trainer = ORMTrainer(model=model, args=config, train_dataset=rows, peft_config=adapter)
    return timed_training(trainer, args.warmup)


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    return table_of(report, ("rows_per_batch", "rows"), ("padded", "flat"), "ORMTrainer with group_by_prompt.")


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot time ratio and token bound of every case as bars. Returns `False` if matplotlib is not installed."""
    return plot_speedups(report, "Optimizer step of ORMTrainer, padded over flat rows", path)
