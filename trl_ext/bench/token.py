"""`trl-ext bench token`: compare training steps of our `ORMTrainer` on flat rows with the same steps on padded rows.

Each question has several answers. `group_by_prompt` keeps them in one batch, so both sides train on the same batches.
The case knows the trainer. It does not know how the trainer works.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.runner import (
    Run,
    add_model_arguments,
    add_run_arguments,
    apart,
    check_counts,
    circumstances,
    formatted,
    in_turns,
    medians,
    mib,
    place,
    plot_speedups,
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
        `dict` with `cases` and the [`circumstances`]. A case has `sides` (for `"padded"` and `"flat"` the seconds and
        CPU seconds of a step, peak memory in MiB, and tokens that the model processes), `speedup` and `cpu_speedup`
        (time of padded rows over flat rows; above 1: flat rows are faster), `token_bound` (tokens of padded rows over
        flat rows) and `loss_max_difference` (the largest difference between the two sides' losses).
    """
    check_counts(args, warmup=1, steps=1, repeats=1, questions=1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(args.shapes):
            p, c, k = shape_of(shape, "P,C,K", (1, 2, 1), "P >= 1, C >= 2 (EOS is one of them) and K >= 1")
            rows = labelled_rows("orm", args.questions * (args.warmup + args.steps), p, c, k, args.seed)
            save_model(f"{folder}/{number}", args, p + c, words_tokenizer())
            cases.append(_measure_case(rows, f"{folder}/{number}", args, p, c, k))
    return {"cases": cases, **circumstances(args)}


def _measure_case(rows: "Dataset", model: str, args: argparse.Namespace, p: int, c: int, k: int) -> dict[str, Any]:
    train = {side: partial(_train, rows, side, model, args, k) for side in SIDES}
    losses = {side: train[side](logging_steps=1).losses for side in SIDES}
    runs = in_turns(train, args.repeats)
    sides = {
        side: medians(runs[side], step="_per_step") | {"model_tokens": runs[side][0].model_tokens} for side in SIDES
    }
    padded, flat = sides["padded"], sides["flat"]
    return {
        "name": f"({p}, {c}, {k})",
        "rows_per_batch": k * args.questions,
        "sides": sides,
        "speedup": padded["seconds_per_step"] / flat["seconds_per_step"],
        "cpu_speedup": padded["cpu_seconds_per_step"] / flat["cpu_seconds_per_step"],
        "token_bound": padded["model_tokens"] / flat["model_tokens"],
        "loss_max_difference": apart(losses["padded"], losses["flat"]),
        "losses_compared": len(losses["padded"]),
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
    rows = [["(P, C, K)", "rows", "padded s", "flat s", "wall", "CPU", "bound", "MiB padded", "flat", "loss diff"]]
    for case in report["cases"]:
        padded, flat = case["sides"]["padded"], case["sides"]["flat"]
        rows.append(
            [
                case["name"],
                str(case["rows_per_batch"]),
                f"{padded['seconds_per_step']:.3f}",
                f"{flat['seconds_per_step']:.3f}",
                f"{case['speedup']:.2f}x",
                f"{case['cpu_speedup']:.2f}x",
                f"{case['token_bound']:.2f}",
                mib(padded["peak_memory_mib"]),
                mib(flat["peak_memory_mib"]),
                f"{case['loss_max_difference']:.0e}",
            ]
        )
    return (
        f"{formatted(rows)}\nORMTrainer with group_by_prompt. wall and CPU: time with shared_prefix=False / time with "
        f"'auto', medians of a whole optimizer step; above 1: 'auto' is faster.\n{place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot time ratio and token bound of every case as bars. Returns `False` if matplotlib is not installed."""
    return plot_speedups(report, "Optimizer step of ORMTrainer, padded over flat rows", path)
