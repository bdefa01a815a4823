"""Helpers of the studies: real data, folds, n-grams, quiet training, and a table of means with errors."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # download nothing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import PrinterCallback, Trainer


def data_folder(needed: Sequence[str]) -> Path:
    """The folder in TRL_EXT_DATA, or shared/data next to the project. Exits if a needed file is missing."""
    named = os.environ.get("TRL_EXT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        sys.exit(
            f"{folder} has no {', '.join(missing)}. Set TRL_EXT_DATA to a folder that has them; "
            "docs/results/real_data.md describes the data and their sources."
        )
    return folder


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    # split at line feeds only: str.splitlines would also split at other characters, which may be part of a text
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def folds(
    groups: Sequence[Hashable], number: int, of: int = 5, seed: int = 0
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield training and test row numbers of the first `number` of `of` folds; a group stays in one fold."""
    names = sorted(set(groups), key=str)
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[name]: place % of for place, name in enumerate(order)}
    for fold in range(number):
        test = [row for row, group in enumerate(groups) if fold_of[group] == fold]
        train = [row for row, group in enumerate(groups) if fold_of[group] != fold]
        yield train, test


def ngrams() -> TfidfVectorizer:
    """TF-IDF of words and pairs of words; numbers and punctuation count as words."""
    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True, min_df=2)


def train_quietly(trainer: Trainer) -> None:
    """Train without printing logs; print the time to standard error."""
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    print(
        f"{type(trainer).__name__}: {trainer.state.global_step} steps, {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )


class Results:
    """Collects values of methods from each fold and prints their table."""

    def __init__(self, title: str):
        self._title = title
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, method: str, **values: float) -> None:
        """Add one fold's values of a method."""
        for name, value in values.items():
            self._values.setdefault(method, {}).setdefault(name, []).append(value)

    def print(self) -> None:
        """Print means over the folds, with standard errors if there are several."""
        names = list(dict.fromkeys(name for values in self._values.values() for name in values))
        rows = [[self._title, *names]]
        rows += [[method, *(_cell(values.get(name, [])) for name in names)] for method, values in self._values.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for number, row in enumerate(rows):
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
            if number == 0:
                print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
        print(flush=True)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"
