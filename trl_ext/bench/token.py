"""`trl-ext bench token`: training steps of our `ORMTrainer` on flat rows beside the same steps on padded rows.

Several answers to each question, kept together by `group_by_prompt`, so that both sides train on the same batches, in
turns in one process. Knows the trainer, and nothing of how it works.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.tools import (
    CountTokens,
    add_model_arguments,
    check_counts,
    circumstances,
    differences,
    dtype_of,
    forget_peak,
    formatted,
    labelled_rows,
    peak,
    plot_bars,
    save_model,
    step_clock,
    words_tokenizer,
)


if TYPE_CHECKING:
    from datasets import Dataset

SIDES = {"padded": False, "flat": "auto"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench token`."""
    parser.add_argument(
        "--shapes", nargs="*", default=["256,64,4", "64,256,4"], help="P,C,K: tokens of question, answer; answers"
    )
    parser.add_argument("--questions", type=int, default=2, help="questions in a batch, with all their answers")
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on all linear layers; 0: full weights")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the start of a run that are not timed")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    parser.add_argument("--output_dir", default="outputs/bench_token", help="where bench.json and bench.png go")
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the circumstances. A case has `sides` (`"padded"` and `"flat"`: seconds and CPU seconds
        of a step, peak memory in MiB, tokens through the model), `speedup` and `cpu_speedup` (padded over flat: above
        1 is faster), `token_bound` (padded tokens over flat ones) and `loss_max_difference`.
    """
    import datasets
    import transformers

    check_counts(args, warmup=1, steps=1, repeats=1, questions=1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(args.shapes):
            try:
                p, c, k = map(int, shape.split(","))
            except ValueError as error:
                raise ValueError(f"{shape!r} is no shape. Needed: P,C,K, e.g. 256,64,4.") from error
            if min(p, k) < 1 or c < 2:
                raise ValueError(f"{shape!r} is no shape. Needed: P >= 1, C >= 2 (EOS is one of them) and K >= 1.")
            rows = labelled_rows("orm", args.questions * (args.warmup + args.steps), p, c, k, args.seed)
            save_model(f"{folder}/{number}", args, p + c, words_tokenizer())
            cases.append(_measure_case(rows, f"{folder}/{number}", args, p, c, k))
    return {"cases": cases, **circumstances(args)}


def _measure_case(rows: "Dataset", model: str, args: argparse.Namespace, p: int, c: int, k: int) -> dict[str, Any]:
    losses = {side: _run(rows, side, model, args, k, logging_steps=1)["losses"] for side in SIDES}
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):  # neither is always first
            runs[side].append(_run(rows, side, model, args, k, logging_steps=100))
    sides = {side: _summary(runs[side]) for side in SIDES}
    padded, flat = sides["padded"], sides["flat"]
    return {
        "name": f"({p}, {c}, {k})",
        "rows_per_batch": k * args.questions,
        "sides": sides,
        "speedup": padded["seconds_per_step"] / flat["seconds_per_step"],
        "cpu_speedup": padded["cpu_seconds_per_step"] / flat["cpu_seconds_per_step"],
        "token_bound": padded["model_tokens"] / flat["model_tokens"],
        "loss_max_difference": max(abs(a - b) for a, b in zip(losses["padded"], losses["flat"], strict=True)),
        "losses_compared": len(losses["padded"]),
    }


def _run(
    rows: "Dataset", side: str, model: str, args: argparse.Namespace, k: int, logging_steps: int
) -> dict[str, Any]:
    """Train once: seconds and CPU seconds of each timed step, losses, peak memory, tokens through the model."""
    from peft import LoraConfig
    from transformers import PrinterCallback

    from trl_ext import ORMConfig, ORMTrainer

    dtype = dtype_of(args)
    config = ORMConfig(
        output_dir=f"{model}/{side}",
        per_device_train_batch_size=k * args.questions,
        group_by_prompt=True,
        shared_prefix=SIDES[side],
        max_steps=args.warmup + args.steps,
        logging_steps=logging_steps,
        gradient_checkpointing=False,
        bf16=dtype == "bfloat16",
        model_init_kwargs={"dtype": dtype, "attn_implementation": args.attn_implementation},
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    adapter = LoraConfig(r=args.lora_r, target_modules="all-linear") if args.lora_r else None
    trainer = ORMTrainer(model=model, args=config, train_dataset=rows, peft_config=adapter)
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = counter = CountTokens(trainer.data_collator)
    clock = step_clock()
    trainer.add_callback(clock)
    forget_peak()
    trainer.train()
    skip = args.warmup - 1  # the first difference of two stamps belongs to the second step
    return {
        "wall": differences(clock.wall)[skip:],
        "cpu": differences(clock.cpu)[skip:],
        "peak": peak(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "model_tokens": counter.tokens / (args.warmup + args.steps),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians of each step over the runs (its batch is the same in all), averaged over the steps."""
    wall, cpu = (
        statistics.fmean(map(statistics.median, zip(*(run[name] for run in runs), strict=True)))
        for name in ("wall", "cpu")
    )
    peaks = [run["peak"] for run in runs if run["peak"] is not None]
    return {
        "seconds_per_step": wall,
        "cpu_seconds_per_step": cpu,
        "peak_memory_mib": statistics.median(peaks) if peaks else None,
        "model_tokens": runs[0]["model_tokens"],
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["(P, C, K)", "rows", "padded s", "flat s", "wall", "CPU", "bound", "MiB padded", "flat", "loss diff"]]
    for case in report["cases"]:
        padded, flat = case["sides"]["padded"], case["sides"]["flat"]
        memory = [
            "-" if side["peak_memory_mib"] is None else f"{side['peak_memory_mib']:,.0f}" for side in (padded, flat)
        ]
        rows.append(
            [
                case["name"],
                str(case["rows_per_batch"]),
                f"{padded['seconds_per_step']:.3f}",
                f"{flat['seconds_per_step']:.3f}",
                f"{case['speedup']:.2f}x",
                f"{case['cpu_speedup']:.2f}x",
                f"{case['token_bound']:.2f}",
                *memory,
                f"{case['loss_max_difference']:.0e}",
            ]
        )
    return (
        f"{formatted(rows)}\nORMTrainer, shared_prefix=False over 'auto', both with group_by_prompt. Medians of a "
        "whole optimizer step; above 1 is faster.\n"
        f"{report['machine']}, {report['dtype']}, {report['attention']} attention, memory {report['memory']}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Time ratio and token bound of every case as bars; `False` where matplotlib is not installed."""
    cases = report["cases"]
    series = {
        "time ratio (wall)": [case["speedup"] for case in cases],
        "time ratio (CPU)": [case["cpu_speedup"] for case in cases],
        "token bound": [case["token_bound"] for case in cases],
    }
    title = f"Optimizer step of ORMTrainer, padded over flat rows\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "times faster", title)
