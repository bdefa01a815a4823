"""`trl-ext bench score`: time `RewardScorer` on N completions of each prompt against two ways of padding rows.

The first baseline is TRL's way: rows keep the given order, are tokenized and padded, and run in batches of a fixed
size. The second is our scorer with `shared_prefix=False`: it sorts rows by length and fills batches up to a token
budget. A fourth side uses the same weights as an outcome model and scores every token. The case knows scorers. It does
not know how they work.
"""

import argparse
import copy
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import (
    add_model_arguments,
    apart,
    check_counts,
    circumstances,
    dtype_of,
    formatted,
    in_turns,
    medians,
    mib,
    place,
    plot_bars,
    timed,
)
from trl_ext.bench.synthetic import VOCABULARY, random_words, save_model, words_tokenizer


SIDES = {
    "given_order": "padded, given order",
    "sorted": "padded, sorted by length",
    "shared": "shared prompts",
    "tokens": "padded, sorted, every token",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench score`."""
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--num_completions", type=int, default=16, help="completions of each prompt")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion_length", type=int, default=64, help="tokens of the longest completion")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in a batch of the side in given order")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    parser.add_argument("--output_dir", default="outputs/bench_score", help="where bench.json and bench.png go")
    add_model_arguments(parser)


def synthetic_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and completions in random order; a completion has between half and all of `completion_length` words."""
    rng = random.Random(args.seed)

    longest = args.completion_length
    rows = []
    for _ in range(args.num_prompts):
        prompt = random_words(args.prompt_length, VOCABULARY, rng)
        lengths = [rng.randint((longest + 1) // 2, longest) for _ in range(args.num_completions)]
        rows += [(prompt, " " + random_words(length, VOCABULARY, rng)) for length in lengths]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Score the same rows on all sides.

    Returns:
        `dict` with the [`circumstances`] and:

        - `sides`: seconds, CPU seconds, sequence tokens per second, peak memory in MiB, and `score_max_difference`,
          the largest difference from the scores in the given order (for `tokens`: of the last token's score).
        - `speedup`, `cpu_speedup`: time of each side over the time with shared prompts.
        - `token_bound`: real tokens of all rows over the tokens when each prompt counts once; `fraction_of_bound`: the
          CPU speedup over sorted rows, divided by this bound.
        - `token_cost`: CPU time of scoring every token over that of one score per row, both in sorted rows.
        - `rows`: the number of rows.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from trl_ext import RewardScorer
    from trl_ext.data.tokenization import TokenizationSettings
    from trl_ext.models.bases import describe_base
    from trl_ext.models.sidecar import Sidecar, set_sidecar

    check_counts(args, num_prompts=1, num_completions=1, prompt_length=1, completion_length=1, batch_size=1, repeats=1)
    prompts, completions = synthetic_texts(args)
    tokenizer = words_tokenizer()
    rows = [tokenizer(p + c)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    sequence_tokens = sum(map(len, rows))
    repeated = (args.num_completions - 1) * args.num_prompts * args.prompt_length
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
    verifier = copy.deepcopy(model)  # the same weights, declared as an outcome model, which scores every token
    tokenization = TokenizationSettings.without_sidecar().to_dict()
    set_sidecar(
        verifier, Sidecar(describe_base(model), False, ["score"], tokenization, kind="outcome", loss_type="bce")
    )

    def given_order() -> list[float]:
        scores: list[float] = []
        for start in range(0, len(prompts), args.batch_size):
            texts = [p + c for p, c in zip(prompts, completions, strict=True)][start : start + args.batch_size]
            batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
            with torch.no_grad():
                scores += (
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
                )
        return scores

    scorers = {
        "sorted": RewardScorer(model, tokenizer, shared_prefix=False),
        "shared": RewardScorer(model, tokenizer, shared_prefix="auto"),
    }
    calls = {"given_order": given_order, **{name: lambda s=s: s(prompts, completions) for name, s in scorers.items()}}
    by_token = RewardScorer(verifier, tokenizer)
    calls["tokens"] = lambda: [row[-1] for row in by_token.score_tokens(prompts, completions)]
    scores = {name: call() for name, call in calls.items()}  # the warm-up
    runs = in_turns({name: partial(timed, call) for name, call in calls.items()}, args.repeats)
    sides = {
        name: medians(found, sequence_tokens) | {"score_max_difference": apart(scores[name], scores["given_order"])}
        for name, found in runs.items()
    }
    bound = sequence_tokens / (sequence_tokens - repeated)
    shared = sides["shared"]
    return {
        "sides": sides,
        "speedup": {name: side["seconds"] / shared["seconds"] for name, side in sides.items()},
        "cpu_speedup": {name: side["cpu_seconds"] / shared["cpu_seconds"] for name, side in sides.items()},
        "token_bound": bound,
        "fraction_of_bound": sides["sorted"]["cpu_seconds"] / shared["cpu_seconds"] / bound,
        "token_cost": sides["tokens"]["cpu_seconds"] / sides["sorted"]["cpu_seconds"],
        "rows": len(rows),
        **circumstances(args),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["", "s", "CPU s", "tokens/s", "peak MiB", "wall", "CPU", "score diff"]]
    for name, side in report["sides"].items():
        rows.append(
            [
                SIDES[name],
                f"{side['seconds']:.3f}",
                f"{side['cpu_seconds']:.3f}",
                f"{side['tokens_per_second']:,.0f}",
                mib(side["peak_memory_mib"]),
                f"{report['speedup'][name]:.2f}x",
                f"{report['cpu_speedup'][name]:.2f}x",
                f"{side['score_max_difference']:.0e}",
            ]
        )
    return (
        f"{formatted(rows)}\nwall and CPU: time of that side / time with shared prompts. Medians over runs of "
        f"{report['rows']} rows.\nToken bound without padding: {report['token_bound']:.2f}. Shared prompts reach "
        f"{report['fraction_of_bound']:.0%} of it over sorted rows.\nScoring every token takes "
        f"{report['token_cost']:.2f} times the CPU time of one score per row, both in sorted rows.\n{place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot each side's time over that of shared prompts as bars. Returns `False` if matplotlib is not installed."""
    labels = [SIDES[name] for name in report["sides"]]
    series = {
        "time ratio (wall)": list(report["speedup"].values()),
        "time ratio (CPU)": list(report["cpu_speedup"].values()),
    }
    title = f"Scoring {report['rows']} rows: each side over shared prompts\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, labels, series, "times as long", title)
