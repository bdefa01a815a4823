"""`trl-ext bench data`: N pairs made ready for training by `RewardTrainer` and by `trl.RewardTrainer`.

Both trainers do what they do when they are constructed: check, tokenize, filter by length, and write the result to
disk. Pairs of texts and of chats are measured apart, and the token ids of both sides are compared. The pairs are
random words, or yours. The case knows trainers and data sets. It runs no model.
"""

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.runner import (
    Run,
    check_counts,
    circumstances,
    formatted,
    in_turns,
    medians,
    mib,
    plot_bars,
    ratios_of_turns,
    timed,
)
from trl_ext.bench.synthetic import random_words, save_model, tokenizer_of


if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("text", "chat")
SIDES = {"trl": "trl.RewardTrainer", "trl_ext": "RewardTrainer"}
WORDS = 2000  # different words in the texts
LEARNED_FROM = 500  # pairs that the tokenizer is trained on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench data`."""
    parser.add_argument("--num_pairs", type=int, default=5000)
    parser.add_argument("--prompt_words", type=int, default=40, help="words of the longest prompt; the shortest: half")
    parser.add_argument("--completion_words", type=int, default=80, help="words of the longest completion, likewise")
    parser.add_argument("--dataset_file", help="JSON lines with prompt, chosen and rejected; default: random words")
    parser.add_argument("--tokenizer", help="folder or Hub id; default: byte-level BPE that is trained on the pairs")
    parser.add_argument(
        "--large", type=int, default=0, help="also prepare this many short pairs once, ours only, and watch the memory"
    )
    parser.add_argument("--num_proc", type=int, help="dataset_num_proc of --large")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/bench_data", help="where bench.json and bench.png go")
    # of the model that the trainers are constructed with; it is not run
    parser.set_defaults(
        hidden_size=32, num_layers=1, num_heads=2, dtype="float32", attn_implementation="sdpa", max_positions=2048
    )


def synthetic_pairs(kind: str, args: argparse.Namespace) -> "Dataset":
    """Pairs of random words, as texts or as chats."""
    from datasets import Dataset

    rng = random.Random(args.seed)

    def words(longest: int) -> str:
        return random_words(rng.randint((longest + 1) // 2, longest), WORDS, rng)

    def row() -> dict[str, Any]:
        prompt, chosen, rejected = words(args.prompt_words), *(words(args.completion_words) for _ in range(2))
        if kind == "text":
            return {"prompt": f"{prompt}\n", "chosen": chosen, "rejected": rejected}
        answers = {"chosen": chosen, "rejected": rejected}
        messages = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        return {"prompt": [{"role": "user", "content": prompt}], **messages}

    return Dataset.from_list([row() for _ in range(args.num_pairs)])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Prepare the same pairs on both sides.

    Returns:
        `dict` with `cases`, one for each kind of pair: `sides` (seconds, CPU seconds, pairs per second, peak memory in
        MiB), `ratio` and `cpu_ratio` (ours over TRL's, the median over the turns), `cpu_ratios` (of each turn) and
        `same_ids`; with `--large` the report of [`measure_large`] as `large`; and the circumstances.
    """
    check_counts(args, num_pairs=2, prompt_words=1, completion_words=1, repeats=1, large=0)
    pairs = (
        {kind: synthetic_pairs(kind, args) for kind in KINDS} if args.dataset_file is None else _pairs_of_file(args)
    )
    cases = [_measure_kind(kind, rows, args) for kind, rows in pairs.items()]
    large = {"large": measure_large(args)} if args.large else {}
    return {"cases": cases, **large, **circumstances(args)}


def measure_large(args: argparse.Namespace) -> dict[str, Any]:
    """
    Prepare many short pairs that lie on disk, and watch the memory.

    Returns:
        `dict` with `pairs`, `seconds`, `cpu_seconds` and, where the system reports it, `own_memory_mib`: by how much
        the process's own memory (without files that are mapped) rose at its peak.
    """
    from datasets import Dataset, load_from_disk

    def rows() -> Iterator[dict[str, str]]:
        rng = random.Random(args.seed)
        for _ in range(args.large):
            texts = {name: random_words(8, WORDS, rng) for name in ("chosen", "rejected")}
            yield {"prompt": f"{random_words(6, WORDS, rng)}\n", **texts}

    with tempfile.TemporaryDirectory() as folder:
        made = Dataset.from_generator(rows, cache_dir=f"{folder}/made")
        made.save_to_disk(f"{folder}/rows")
        stored = load_from_disk(f"{folder}/rows")
        tokenizer = _tokenizer(stored, args)
        trainer = _trainers(stored.select(range(2)), tokenizer, args)["trl_ext"]
        trainer.args.dataset_num_proc = args.num_proc
        seen, done = [], threading.Event()
        watcher = threading.Thread(target=_watch_own_memory, args=(seen, done))
        watcher.start()
        before = _cpu_of_children()
        try:
            run = timed(lambda: trainer._prepare_dataset(stored, tokenizer, trainer.args, "train"))
        finally:
            done.set()
            watcher.join()
    rise = {"own_memory_mib": max(seen) - seen[0]} if seen else {}
    cpu = run.cpu[0] + _cpu_of_children() - before
    return {"pairs": args.large, "seconds": run.wall[0], "cpu_seconds": cpu, **rise}


def _cpu_of_children() -> float:
    """CPU seconds of processes that have ended, such as those of `dataset_num_proc`."""
    times = os.times()
    return times.children_user + times.children_system


def _watch_own_memory(seen: list[float], done: threading.Event) -> None:
    """Note the process's anonymous memory in MiB ten times a second, as far as the system reports it."""
    status = Path("/proc/self/status")
    while status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        seen += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
        if done.wait(0.1):
            return


def _pairs_of_file(args: argparse.Namespace) -> "dict[str, Dataset]":
    """Up to `num_pairs` rows of the file, by the name of the file."""
    from datasets import Dataset

    rows = []
    with open(args.dataset_file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("prompt", "chosen", "rejected") if name in row})
            if len(rows) == args.num_pairs:
                break
    return {Path(args.dataset_file).stem: Dataset.from_list(rows)}


def _tokenizer(rows: "Dataset", args: argparse.Namespace) -> Any:
    """A tokenizer that has met no text yet."""
    from transformers import AutoTokenizer

    if args.tokenizer is None:
        return tokenizer_of(rows.select(range(min(LEARNED_FROM, len(rows)))))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _measure_kind(kind: str, rows: "Dataset", args: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_from_disk

    tokenizer = _tokenizer(rows, args)
    trainers = _trainers(rows.select(range(2)), tokenizer, args)
    ids: dict[str, list[list[list[int]]]] = {}

    def prepare(side: str) -> Run:
        trainer, prepared = trainers[side], []
        with tempfile.TemporaryDirectory() as folder:  # a new one each time: `datasets` would read its cache
            rows.save_to_disk(folder)
            stored, unused = load_from_disk(folder), copy.deepcopy(tokenizer)  # a used one knows words already
            run = timed(lambda: prepared.append(trainer._prepare_dataset(stored, unused, trainer.args, "train")))
            if side not in ids:
                ids[side] = [prepared[0][column][:] for column in ("chosen_ids", "rejected_ids")]
        return run

    runs = in_turns({side: lambda side=side: prepare(side) for side in SIDES}, args.repeats)
    sides = {side: medians(found) for side, found in runs.items()}
    for side in sides.values():
        side["pairs_per_second"] = len(rows) / side["seconds"]
    ratios = ratios_of_turns(runs["trl_ext"], runs["trl"])
    return {
        "name": kind,
        "pairs": len(rows),
        "tokens": sum(len(row) for column in ids["trl"] for row in column),
        "sides": sides,
        "ratio": statistics.median(ratios["wall"]),
        "cpu_ratio": statistics.median(ratios["cpu"]),
        "cpu_ratios": ratios["cpu"],
        "same_ids": ids["trl"] == ids["trl_ext"],
    }


def _trainers(rows: "Dataset", tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A trainer of each side, over a small model."""
    import trl
    from transformers import AutoModelForSequenceClassification

    from trl_ext import RewardConfig, RewardTrainer

    classes = {"trl": (trl.RewardTrainer, trl.RewardConfig), "trl_ext": (RewardTrainer, RewardConfig)}
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args, args.max_positions, tokenizer)
        for side, (trainer_class, config_class) in classes.items():
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32")
            limits = {"max_length": args.max_positions, "report_to": "none", "disable_tqdm": True, "bf16": False}
            config = config_class(output_dir=folder, **limits)
            trainers[side] = trainer_class(model=model, args=config, processing_class=tokenizer, train_dataset=rows)
    return trainers


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["", "s", "CPU s", "pairs/s", "peak MiB", "wall", "CPU"]]
    for case in report["cases"]:
        for name, side in case["sides"].items():
            ours = name == "trl_ext"
            rows.append(
                [
                    f"{case['name']}, {SIDES[name]}",
                    f"{side['seconds']:.2f}",
                    f"{side['cpu_seconds']:.2f}",
                    f"{side['pairs_per_second']:,.0f}",
                    mib(side["peak_memory_mib"]),
                    f"{case['ratio']:.2f}" if ours else "",
                    f"{case['cpu_ratio']:.2f}" if ours else "",
                ]
            )
    large = ""
    if "large" in report:
        found = report["large"]
        memory = f", own memory +{mib(found['own_memory_mib'])} MiB" if "own_memory_mib" in found else ""
        large = f"\n{found['pairs']:,} short pairs: {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s CPU{memory}"
    same = all(case["same_ids"] for case in report["cases"])
    sizes = ", ".join(f"{case['tokens']:,} tokens of {case['name']}" for case in report["cases"])
    return (
        f"{formatted(rows)}\nwall and CPU: time of RewardTrainer over that of trl.RewardTrainer; "
        f"{report['cases'][0]['pairs']:,} pairs, {sizes}\n"
        f"token ids of both sides: {'equal' if same else 'DIFFERENT'}; {report['machine']}{large}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Our time over TRL's as bars; `False` where matplotlib is not installed."""
    cases = report["cases"]
    series = {
        "time ratio (wall)": [case["ratio"] for case in cases],
        "time ratio (CPU)": [case["cpu_ratio"] for case in cases],
    }
    title = f"Preparing {cases[0]['pairs']:,} pairs: RewardTrainer over trl.RewardTrainer\n{report['machine']}"
    return plot_bars(path, [case["name"] for case in cases], series, "time over TRL's", title)
