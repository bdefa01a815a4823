"""`trl-ext bench evaluate`: time and memory of an evaluation beside the model's forward passes on the same pairs.

It answers three questions. How much longer does `evaluate_reward_model` take than the scorer alone, called on the same
chunks of pairs? How many tokens does the model process, compared with each prompt counted once? And does memory grow
with the number of pairs? For the last one, a reward function without a model scores two streams of pairs of different
length. Bias probes are off, because they are further forward passes of their own. The case knows the evaluation by its
call.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import (
    add_model_arguments,
    check_counts,
    circumstances,
    dtype_of,
    formatted,
    in_turns,
    medians,
    mib,
    place,
    plot_bars,
    ratios_of_turns,
    timed,
)
from trl_ext.bench.synthetic import VOCABULARY, random_words, save_model, words_tokenizer


SIDES = {"forward": "the scorer alone", "evaluate": "evaluate_reward_model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench evaluate`."""
    parser.add_argument("--num_rows", type=int, default=1_000, help="pairs that the model scores on both sides")
    parser.add_argument("--prompt_length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--completion_length", type=int, default=128, help="tokens of the longest completion")
    parser.add_argument(
        "--memory_rows",
        type=int,
        nargs=2,
        default=[2_000, 10_000],
        help="two numbers of pairs, scored without a model",
    )
    parser.add_argument("--resamples", type=int, default=2_000, help="resamples of the bootstrap")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, in turns")
    parser.add_argument("--output_dir", default="outputs/bench_evaluate", help="where bench.json and bench.png go")
    add_model_arguments(parser)


def synthetic_pairs(number: int, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Pairs, each with a prompt of its own; a completion has between half and all of `completion_length` words."""
    rng = random.Random(args.seed)
    longest = args.completion_length
    for _ in range(number):
        lengths = [rng.randint((longest + 1) // 2, longest) for _ in range(2)]
        chosen, rejected = (" " + random_words(length, VOCABULARY, rng) for length in lengths)
        yield {"prompt": random_words(args.prompt_length, VOCABULARY, rng), "chosen": chosen, "rejected": rejected}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Score the same pairs with the scorer alone and in an evaluation, then evaluate two streams without a model.

    Returns:
        `dict` with the [`circumstances`] and:

        - `sides`: seconds, CPU seconds and peak memory in MiB of both sides.
        - `overhead`, `cpu_overhead`: the median over turns of the evaluation's time over the scorer's, less 1.
        - `model_tokens`: tokens that the model processed in the evaluation, padding included; `tokens_once`: tokens of
          the pairs with each prompt counted once; `tokens_twice`: with the prompt counted for each completion.
        - `without_model`: for each of `memory_rows`, seconds, CPU seconds and peak memory in MiB of an evaluation
          whose reward function costs next to nothing.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from trl_ext import RewardScorer, evaluate_reward_model
    from trl_ext.evaluation.run import CHUNK

    check_counts(args, num_rows=20, prompt_length=1, completion_length=1, resamples=1, repeats=1)
    if min(args.memory_rows) < 20:
        raise ValueError(f"--memory_rows is {args.memory_rows}; needed: two numbers of 20 or more.")
    options = {"probes": False, "resamples": args.resamples}

    def by_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(sum(map(ord, text[:24])) % 97) for text in completions]

    # before a model is loaded, so that memory that it leaves in pieces does not count
    without = {}
    for number in (args.memory_rows[0], *args.memory_rows):  # the first run makes what later ones find there
        run = timed(partial(evaluate_reward_model, by_letters, synthetic_pairs(number, args), **options))
        without[str(number)] = {"seconds": run.wall[0], "cpu_seconds": run.cpu[0], "peak_memory_mib": run.peak}

    tokenizer = words_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args, args.prompt_length + args.completion_length, tokenizer)
        torch.manual_seed(args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=dtype_of(args),
            attn_implementation=args.attn_implementation,
            device_map="cuda" if torch.cuda.is_available() else None,
        ).eval()
    scorer = RewardScorer(model, tokenizer)
    rows = list(synthetic_pairs(args.num_rows, args))

    def forward() -> None:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            prompts = [row["prompt"] for row in chunk for _ in range(2)]
            scorer(prompts=prompts, completions=[row[name] for row in chunk for name in ("chosen", "rejected")])

    def evaluate() -> None:
        evaluate_reward_model(scorer, rows, **options)

    processed = 0

    def count(module: Any, given: tuple[Any, ...], output: Any) -> None:
        nonlocal processed
        processed += given[0].numel()

    handle = model.get_input_embeddings().register_forward_hook(count)
    evaluate()  # the warm-up
    handle.remove()
    calls = {"forward": forward, "evaluate": evaluate}
    runs = in_turns({name: partial(timed, call) for name, call in calls.items()}, args.repeats)
    ratios = ratios_of_turns(runs["evaluate"], runs["forward"])
    prompt_tokens, completion_tokens = (
        sum(len(tokenizer(row[name])["input_ids"]) for row in rows for name in names)
        for names in (("prompt",), ("chosen", "rejected"))
    )
    return {
        "sides": {name: medians(found) for name, found in runs.items()},
        "overhead": statistics.median(ratios["wall"]) - 1,
        "cpu_overhead": statistics.median(ratios["cpu"]) - 1,
        "model_tokens": processed,
        "tokens_once": prompt_tokens + completion_tokens,
        "tokens_twice": 2 * prompt_tokens + completion_tokens,
        "without_model": without,
        "rows": len(rows),
        **circumstances(args),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["", "s", "CPU s", "peak MiB"]]
    sides = {SIDES[name]: side for name, side in report["sides"].items()}
    sides |= {f"{int(number):,} pairs, no model": side for number, side in report["without_model"].items()}
    for name, side in sides.items():
        rows.append([name, f"{side['seconds']:.2f}", f"{side['cpu_seconds']:.2f}", mib(side["peak_memory_mib"])])
    return (
        f"{formatted(rows)}\nOver the scorer alone, {report['rows']:,} pairs take {report['overhead']:+.1%} of its "
        f"time and {report['cpu_overhead']:+.1%} of its CPU time (medians over turns).\nThe model processes "
        f"{report['model_tokens']:,} tokens; with each prompt counted once the pairs have {report['tokens_once']:,}, "
        f"counted for each completion {report['tokens_twice']:,}.\n{place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot the time of both sides over that of the scorer as bars. Returns `False` if matplotlib is not installed."""
    sides = report["sides"]
    series = {
        f"time ratio ({name})": [side[key] / sides["forward"][key] for side in sides.values()]
        for name, key in (("wall", "seconds"), ("CPU", "cpu_seconds"))
    }
    title = f"Evaluating {report['rows']:,} pairs: each side over the scorer alone\n{place(report)}"
    return plot_bars(path, [SIDES[name] for name in sides], series, "times as long", title)
