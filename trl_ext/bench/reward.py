"""`trl-ext bench reward`: training steps of our `RewardTrainer` beside the same steps on padded rows.

Pairs are trained by `trl.RewardTrainer` on the other side. It knows only pairs, so for larger groups the other side is
our trainer with `shared_prefix=False`: right-padded rows, as TRL lays pairs out, through the same ranking loss. Both
sides train in turns in one process, on the same batches. Knows trainers, and nothing of how either works.
"""

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.tools import (
    FIRST_WORD,
    VOCABULARY,
    CountTokens,
    add_model_arguments,
    check_counts,
    circumstances,
    differences,
    dtype_of,
    forget_peak,
    formatted,
    peak,
    plot_bars,
    save_model,
    step_clock,
    step_profiler,
    synthetic_groups,
    tokenizer_of,
    words_tokenizer,
)


if TYPE_CHECKING:
    from datasets import Dataset

GRID = ("64,64,2", "192,64,2", "256,64,4", "64,256,4", "512,128,8", "0,128,2")
PADDED_TOKENS = 2048
"""Padded tokens of a synthetic batch, if `--batch_size` does not say how many groups it has."""


@dataclass
class Case:
    """Groups to train on; `formula` is K(P + C) / (P + KC) where all have one shape."""

    name: str
    rows: "Dataset"
    batch_size: int
    formula: float | None = None

    @property
    def pairs(self) -> bool:
        """Whether TRL's trainer can train on them."""
        return all(len(ids) == 2 for ids in self.rows["candidate_ids"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench reward`."""
    parser.add_argument("--shapes", nargs="*", default=list(GRID), help="P,C,K: prompt and completion tokens, group")
    parser.add_argument("--dataset_name", help="also preference or ranked rows of a file, a folder or the Hub")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument(
        "--tokenizer_name", help="for --dataset_name; default: a byte-level BPE of 4,096 tokens trained on its rows"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="longest candidate of --dataset_name")
    parser.add_argument("--batch_size", type=int, help="groups in a batch; default: about 2,048 padded tokens, or 4")
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on all linear layers; 0: full weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 base (QLoRA)")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the start of a run that are not timed")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    parser.add_argument("--profile", action="store_true", help="also: the operators that the last step's time goes to")
    parser.add_argument("--output_dir", default="outputs/bench_reward", help="where bench.json and bench.png go")
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape and the data set.

    Returns:
        `dict` with `cases` and the circumstances. A case has `baseline` (what the other side is), `sides` (`"padded"`
        and `"trl_ext"`: seconds and CPU seconds of a step, sequence tokens per second, peak memory in MiB, tokens
        through the model, share of the batches that were flat rows), `speedup` and `cpu_speedup` (padded over ours,
        above 1 is faster: the median of `speedup_of_turns`), `token_bound` (padded tokens over tokens of ours),
        `fraction_of_bound`, and `loss_max_difference`; with `--profile` also `profile`, of each side `name`, `share`
        of the step and `calls` of its operators.
    """
    import datasets
    import transformers

    check_counts(args, warmup=1, steps=1, repeats=1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, tokenizer) in enumerate(_cases(args)):
            longest = max(len(ids) for group in case.rows["candidate_ids"] for ids in group)
            save_model(f"{folder}/{number}", args, longest, tokenizer)
            cases.append(_measure_case(case, f"{folder}/{number}", args))
            print(_line(cases[-1]), flush=True)
    return {"cases": cases, **circumstances(args)}


def _cases(args: argparse.Namespace) -> list[tuple[Case, Any]]:
    """The work to do, with the tokenizer that goes with it."""
    batches, cases = args.warmup + args.steps, []
    for shape in args.shapes:
        try:
            p, c, k = map(int, shape.split(","))
        except ValueError as error:
            raise ValueError(f"{shape!r} is no shape. Needed: P,C,K, e.g. 256,64,4.") from error
        if p < 0 or c < 1 or not 2 <= k <= VOCABULARY - FIRST_WORD:
            raise ValueError(f"{shape!r} is no shape. Needed: P >= 0, C >= 1 and K >= 2.")
        size = args.batch_size or max(1, PADDED_TOKENS // (k * (p + c)))
        rows = synthetic_groups(size * batches, p, c, k, args.seed)
        cases.append((Case(f"({p}, {c}, {k})", rows, size, k * (p + c) / (p + k * c)), words_tokenizer()))
    if args.dataset_name:
        size = args.batch_size or 4
        rows, tokenizer = _real_rows(args, size * batches)
        cases.append((Case(Path(args.dataset_name).name, rows, size), tokenizer))
    return cases


def _real_rows(args: argparse.Namespace, number: int) -> tuple["Dataset", Any]:
    """Token ids and ratings of rows drawn from a data set, as training would make them."""
    from transformers import AutoTokenizer

    from trl_ext.data.formats import prepare_groups
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.data.tokenization import TokenizationSettings

    rows = select_split(load_source(args.dataset_name), args.dataset_split, "--dataset_split")
    if "clean" in rows.column_names:  # marked by hand: irregular rows would be refused
        rows = rows.filter(lambda clean: clean, input_columns="clean")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name) if args.tokenizer_name else tokenizer_of(rows)
    prepared, _ = prepare_groups(
        rows.shuffle(seed=args.seed),
        tokenizer,
        tokenization=TokenizationSettings.for_training(tokenizer),
        max_length=args.max_length,
        dataset_name=args.dataset_name,
    )
    if len(prepared) < number:
        raise ValueError(f"{args.dataset_name} has {len(prepared)} rows; {number} are needed. Lower --batch_size.")
    prepared = prepared.select(range(number)).select_columns(["candidate_ids", "candidate_ratings"])
    return prepared.rename_column("candidate_ratings", "ratings"), tokenizer


def _measure_case(case: Case, model: str, args: argparse.Namespace) -> dict[str, Any]:
    sides = ("padded", "trl_ext")
    losses = {side: _run(case, side, model, args, logging_steps=1)["losses"] for side in sides}
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):  # neither is always first
            runs[side].append(_run(case, side, model, args, logging_steps=10))
    sequence_tokens = sum(len(ids) for group in case.rows["candidate_ids"] for ids in group)
    report = {side: _summary(runs[side], sequence_tokens / (args.warmup + args.steps)) for side in sides}
    padded, ours = report["padded"], report["trl_ext"]
    bound = padded["model_tokens"] / ours["model_tokens"]
    profiles = {}
    if args.profile:
        profiles["profile"] = {side: _run(case, side, model, args, 10, profiled=True)["operators"] for side in sides}
    turns = {clock: _ratios(runs, clock) for clock in ("wall", "cpu")}
    cpu_speedup = statistics.median(turns["cpu"])
    return {
        "name": case.name,
        "baseline": "trl.RewardTrainer"
        if case.pairs
        else "padded rows (trl_ext.RewardTrainer, shared_prefix=False, plackett_luce)",
        "groups_per_batch": case.batch_size,
        "sides": report,
        "speedup": statistics.median(turns["wall"]),
        "cpu_speedup": cpu_speedup,
        "speedup_of_turns": turns,
        "token_bound": bound,
        "formula": case.formula,
        "fraction_of_bound": cpu_speedup / bound,
        "loss_max_difference": max(abs(a - b) for a, b in zip(losses["padded"], losses["trl_ext"], strict=True)),
        "losses_compared": len(losses["padded"]),
        **profiles,
    }


def _run(
    case: Case, side: str, model: str, args: argparse.Namespace, logging_steps: int, profiled: bool = False
) -> dict[str, Any]:
    """Train once: seconds and CPU seconds of each timed step, losses, peak memory, tokens through the model."""
    import torch
    import trl
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PrinterCallback

    import trl_ext

    theirs = side == "padded" and case.pairs
    rows, own = case.rows, {}
    if case.pairs:
        rows = rows.map(_as_pair, remove_columns=rows.column_names, load_from_cache_file=False)
    if not theirs:
        own = {"shared_prefix": "auto" if side == "trl_ext" else False, "min_survival": 0.0}
        own["loss_type"] = "bradley_terry" if case.pairs else "plackett_luce"
    dtype = dtype_of(args)
    config = (trl.RewardConfig if theirs else trl_ext.RewardConfig)(
        output_dir=f"{model}/{side}",
        per_device_train_batch_size=case.batch_size,
        max_steps=args.warmup + args.steps,
        logging_steps=logging_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=dtype == "bfloat16",
        model_init_kwargs={"dtype": dtype, "attn_implementation": args.attn_implementation},
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
        **own,
    )
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.__dict__[dtype]
        )
    trainer = (trl.RewardTrainer if theirs else trl_ext.RewardTrainer)(
        model=model,
        args=config,
        train_dataset=rows,
        quantization_config=quantization,
        peft_config=LoraConfig(
            r=args.lora_r, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        )
        if args.lora_r
        else None,
    )
    trainer.remove_callback(PrinterCallback)
    counter = CountTokens(trainer.data_collator)
    trainer.data_collator = counter
    clock = step_clock()
    trainer.add_callback(clock)
    profiler = step_profiler(args.warmup + args.steps - 1) if profiled else None
    if profiler is not None:
        trainer.add_callback(profiler)
    forget_peak()
    trainer.train()
    skip = args.warmup - 1  # the first difference of two stamps belongs to the second step
    return {
        "wall": differences(clock.wall)[skip:],
        "cpu": differences(clock.cpu)[skip:],
        "peak": peak(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "model_tokens": counter.tokens / (args.warmup + args.steps),
        "flat_batches": counter.flat / (args.warmup + args.steps),
        "operators": [] if profiler is None else profiler.operators,
    }


def _as_pair(row: dict[str, Any]) -> dict[str, list[int]]:
    ids = [ids for _, ids in sorted(zip(row["ratings"], row["candidate_ids"], strict=True), reverse=True)]
    return {"chosen_ids": ids[0], "rejected_ids": ids[1]}


def _summary(runs: list[dict[str, Any]], sequence_tokens: float) -> dict[str, float | None]:
    """Medians of each step over the runs (its batch is the same in all), averaged over the steps."""
    wall, cpu = (
        statistics.fmean(map(statistics.median, zip(*(run[name] for run in runs), strict=True)))
        for name in ("wall", "cpu")
    )
    peaks = [run["peak"] for run in runs if run["peak"] is not None]
    return {
        "seconds_per_step": wall,
        "cpu_seconds_per_step": cpu,
        "tokens_per_second": sequence_tokens / wall,
        "peak_memory_mib": statistics.median(peaks) if peaks else None,
        "model_tokens": runs[0]["model_tokens"],
        "flat_batches": runs[0]["flat_batches"],
    }


def _ratios(runs: dict[str, list[dict[str, Any]]], clock: str) -> list[float]:
    """Their time over ours, turn by turn: the two runs of a turn meet the same load."""
    turns = zip(runs["padded"], runs["trl_ext"], strict=True)
    return [sum(theirs[clock]) / sum(ours[clock]) for theirs, ours in turns]


def _line(case: dict[str, Any]) -> str:
    ratios = f"{case['speedup']:.2f}x (CPU time {case['cpu_speedup']:.2f}x, bound {case['token_bound']:.2f})"
    return f"{case['name']}: {ratios}"


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""

    def memory(side: dict[str, Any]) -> str:
        return "-" if side["peak_memory_mib"] is None else f"{side['peak_memory_mib']:,.0f}"

    rows = [
        [
            "(P, C, K)",
            "beside",
            "groups",
            "flat",
            "TRL s",
            "ours s",
            "wall",
            "CPU",
            "bound",
            "CPU/bound",
            "tokens/s TRL",
        ]
    ]
    rows[0] += ["ours", "MiB TRL", "ours", "loss diff"]
    for case in report["cases"]:
        padded, ours = case["sides"]["padded"], case["sides"]["trl_ext"]
        rows.append(
            [
                case["name"],
                "TRL" if case["baseline"] == "trl.RewardTrainer" else "padded rows",
                str(case["groups_per_batch"]),
                f"{ours['flat_batches']:.0%}",
                f"{padded['seconds_per_step']:.3f}",
                f"{ours['seconds_per_step']:.3f}",
                f"{case['speedup']:.2f}x",
                f"{case['cpu_speedup']:.2f}x",
                f"{case['token_bound']:.2f}",
                f"{case['fraction_of_bound']:.0%}",
                f"{padded['tokens_per_second']:,.0f}",
                f"{ours['tokens_per_second']:,.0f}",
                memory(padded),
                memory(ours),
                f"{case['loss_max_difference']:.0e}",
            ]
        )
    return (
        f"{formatted(rows)}\nTRL: trl.RewardTrainer; for groups of more than two, padded rows through our "
        "Plackett-Luce loss. Medians of a whole optimizer step; wall and CPU: theirs / ours, above 1 is faster, the "
        "median of the turns.\n"
        f"{report['machine']}, {report['dtype']}, {report['attention']} attention, in flat rows sdpa by index, "
        f"memory {report['memory']}" + "".join(_profile_lines(case) for case in report["cases"] if "profile" in case)
    )


def _profile_lines(case: dict[str, Any], smallest: float = 0.02) -> str:
    lines = [f"\n\n{case['name']}: where the time of a step goes"]
    for side, operators in case["profile"].items():
        shown = [f"{op['name']} {op['share']:.0%} ({op['calls']})" for op in operators if op["share"] >= smallest]
        lines.append(f"  {side}: " + ", ".join(shown))
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> bool:
    """Time ratio and token bound of every case as bars; `False` where matplotlib is not installed."""
    cases = report["cases"]
    series = {
        "time ratio (wall)": [case["speedup"] for case in cases],
        "time ratio (CPU)": [case["cpu_speedup"] for case in cases],
        "token bound": [case["token_bound"] for case in cases],
    }
    title = f"Optimizer step, padded rows over shared prefix\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "times faster", title)
