"""`trl-ext bench serving`: what `RewardScorer` itself takes when a server runs the model.

A stub that answers at once stands in for the server, so that the CPU time of this process is our part: making token
ids, requests and scores. It is compared with the time that a real server takes for the same requests: give its `--url`
and the `--model` that it serves. Without them the case says how long a server must take for our part to be 5 %. The
case knows scorers. It runs no model.
"""

import argparse
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import check_counts, circumstances, formatted, in_turns, medians, plot_bars, timed
from trl_ext.bench.stub_server import stub_server
from trl_ext.bench.synthetic import random_words, tokenizer_of


SIDES = {"ids": "making token ids", "requests": "requests and answers", "all": "RewardScorer"}
WORDS = 2000  # different words in the texts
LEARNED_FROM = 500  # texts that the tokenizer is trained on
SHARE = 0.05  # our part of a server's time that we want to stay below


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench serving`."""
    parser.add_argument("--model", default=None, help="folder of a reward model (default: one of random words)")
    parser.add_argument(
        "--url", default=None, help="a server of this model, which scores the same texts for comparison"
    )
    parser.add_argument("--rows", type=int, default=64, help="texts in a request")
    parser.add_argument("--requests", type=int, default=16, help="requests in a run")
    parser.add_argument(
        "--prompt_words", type=int, default=128, help="words of the longest prompt; the shortest: half"
    )
    parser.add_argument("--completion_words", type=int, default=64, help="words of the longest completion, likewise")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/bench_serving", help="where bench.json and bench.png go")
    parser.set_defaults(dtype="float32", attn_implementation="none")  # no model runs here


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Score the same texts through the stub, and through a server if there is one.

    Returns:
        `dict` with `sides` (seconds and CPU seconds of a run: token ids alone, requests alone, the scorer), and of one
        request `cpu_milliseconds` (the scorer's), `five_percent_from` (seconds from which on our part is below 5 % of
        a server's time), `tokens`; with a server also `server_seconds` and `share` (ours over the server's); and the
        [`circumstances`].

    Raises:
        ValueError: an option is below its minimum, or `url` is given without `model`.
    """
    from trl_ext import RewardScorer
    from trl_ext.models.sidecar import read_sidecar

    check_counts(args, rows=1, requests=1, prompt_words=1, completion_words=1, repeats=1)
    if args.url is not None and args.model is None:
        raise ValueError("--url names a server; give --model too, the folder of the reward model that it serves.")
    prompts, completions = _texts(args)
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or _random_words(made, prompts, args.seed)
        sidecar = read_sidecar(folder)
        if sidecar is None or sidecar.kind != "scalar" or sidecar.probes is None:
            raise ValueError(f"--model {folder}; needed: a scalar reward model with probes in its reward_model.json.")
        with stub_server(folder, 1 << 20, sidecar.probes) as url:
            scorer = RewardScorer(url, folder, batch_size=args.rows)
            rows = list(zip(prompts, completions, strict=True))

            def ids() -> list[list[int]]:
                return [scorer.raw.encoder(place, *row, None, None).ids for place, row in enumerate(rows)]

            encoded = ids()
            calls = {
                "ids": ids,
                "requests": lambda: scorer.raw.runner.scores(None, encoded),
                "all": lambda: scorer(prompts, completions),
            }
            for call in calls.values():  # the warm-up
                assert len(call()) == len(rows)
            runs = in_turns({name: partial(timed, call) for name, call in calls.items()}, args.repeats)
        sides = {name: medians(found) for name, found in runs.items()}
        ours = sides["all"]["cpu_seconds"] / args.requests
        report = {
            "sides": sides,
            "cpu_milliseconds": ours * 1000,
            "five_percent_from": ours / SHARE,
            "tokens": sum(map(len, encoded)) / args.requests,
        }
        if args.url is not None:
            real = RewardScorer(args.url, folder, batch_size=args.rows)
            real(prompts[:1], completions[:1])
            start = time.perf_counter()
            real(prompts, completions)
            seconds = (time.perf_counter() - start) / args.requests
            report |= {"server_seconds": seconds, "share": ours / seconds}
    return {**report, **circumstances(args)}


def _texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and completions of random words, of between half and all of the longest length."""
    rng = random.Random(args.seed)

    def words(longest: int) -> str:
        return random_words(rng.randint((longest + 1) // 2, longest), WORDS, rng)

    size = range(args.rows * args.requests)
    return [f"{words(args.prompt_words)}\n" for _ in size], [words(args.completion_words) for _ in size]


def _random_words(folder: str, prompts: list[str], seed: int) -> str:
    """Save all that a scorer reads of a served model: a tokenizer of random words, and a description with probes."""
    from datasets import Dataset

    from trl_ext.data.tokenization import TokenizationSettings
    from trl_ext.models.sidecar import BaseModel, Sidecar, make_probes

    tokenizer = tokenizer_of(Dataset.from_list([{"prompt": prompt} for prompt in prompts[:LEARNED_FROM]]))
    tokenizer.save_pretrained(folder)
    probes = make_probes(len(tokenizer), seed=seed)
    Sidecar(
        base=BaseModel(id="random words", dtype="float32", vocab_size=len(tokenizer)),
        is_adapter=False,
        head_modules=["score"],
        token_policy=TokenizationSettings.for_training(tokenizer).to_dict(),
        probes={"input_ids": probes, "scores": list(map(float, range(len(probes))))},
    ).save(folder)
    return folder


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    requests, rows = report["arguments"]["requests"], report["arguments"]["rows"]
    cells = [["of a request", "ms", "CPU ms"]]
    for name, side in report["sides"].items():
        cells.append([SIDES[name], *(f"{side[key] / requests * 1000:.1f}" for key in ("seconds", "cpu_seconds"))])
    text = f"{formatted(cells)}\nA request has {rows} texts, {report['tokens']:,.0f} tokens; medians over runs.\n"
    if "share" in report:
        text += (
            f"The server takes {report['server_seconds']:.3f} s for a request; our part is {report['share']:.2%} of "
            "that.\n"
        )
    else:
        text += (
            f"Our part is below 5 % of the time of a server that takes {report['five_percent_from']:.2f} s or more "
            "for such a request.\n"
        )
    return text + report["machine"]


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot the milliseconds of a request as bars. Returns `False` if matplotlib is not installed."""
    requests = report["arguments"]["requests"]
    series = {
        name: [side[key] / requests * 1000 for side in report["sides"].values()]
        for name, key in (("wall", "seconds"), ("CPU", "cpu_seconds"))
    }
    title = f"Our part of a request with {report['arguments']['rows']} texts\n{report['machine']}"
    return plot_bars(path, [SIDES[name] for name in report["sides"]], series, "milliseconds", title)
