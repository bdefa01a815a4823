"""One data set through one or two models: rows are read, scored, and reduced to a few numbers chunk by chunk.

What stays of a row are the numbers that its family keeps, so that memory does not grow with texts; of a few rows the
texts stay too, for probes and for the list of mistakes. It knows reward functions by their call.
"""

import heapq
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trl_ext.data.validation import DataError, shown
from trl_ext.evaluation.families.benchmarks import is_benchmark
from trl_ext.evaluation.families.best_of_n import BestOfN
from trl_ext.evaluation.families.comparisons import Comparisons
from trl_ext.evaluation.families.outcomes import Outcomes
from trl_ext.evaluation.families.samples import Samples, Words
from trl_ext.evaluation.families.steps import Steps
from trl_ext.evaluation.items import Family, Item, as_chat, family_of, has_signed_labels, read_item, text_of
from trl_ext.evaluation.report.evaluation_report import EvaluationReport
from trl_ext.evaluation.report.findings import Mistake
from trl_ext.scoring.members import GIVEN
from trl_ext.scoring.scales import changing_options


logger = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, Any]]

# Rows that are scored at a time: enough for a scorer to sort by length, few enough for texts to stay small.
CHUNK = 512
# Scores kept for the histogram, and mistakes for the page.
KEPT = 2_000
WORST = 20

_FAMILIES: dict[Family, Callable[[], Any]] = {
    "preference": lambda: Comparisons(ranked=False),
    "ranked": lambda: Comparisons(ranked=True),
    "outcome": Outcomes,
    "stepwise": Steps,
    "best_of_n": BestOfN,
    "samples": Samples,
}


class Run:
    """
    One data set through one or two models.

    Args:
        name (`str`): of the data set; empty where there is only one.
        model, other (`Callable`): reward functions, the second for a comparison.
        report ([`EvaluationReport`]): gets mistakes, curves, histograms and omitted rows.
        drawn ([`Reservoir`], *optional*): gets rows for the probes.
        words ([`~trl_ext.evaluation.families.samples.Words`], *optional*):
            Gets the texts, where data sets are compared.
        chats (`bool`): whether texts become chat messages.
    """

    def __init__(
        self,
        name: str,
        model: Callable,
        other: Callable | None,
        report: EvaluationReport,
        drawn: "Reservoir | None",
        words: Words | None,
        chats: bool = False,
    ):
        self.model, self.other, self.report, self.drawn, self.words = model, other, report, drawn, words
        self.chats = chats
        self.prefix = f"{name}/" if name else ""
        self.family: Any = None
        self.second: Any = None
        self.rows = 0
        self.seconds = 0.0
        self._signed = False
        # heaps with the least bad row first; outcomes have one for each label, as their margins are known at the end
        self._worst: dict[bool, list[tuple[float, int, Item, list[float]]]] = {}

    def read(self, data: Rows, cluster_column: str | None) -> None:
        """Go through the rows once."""
        name: Family | None = None
        for chunk in _chunks(data, CHUNK):
            if name is None:
                columns = getattr(data, "column_names", None) or list(dict.fromkeys(c for row in chunk for c in row))
                name = family_of(columns)
                cluster_column = self._cluster_column(cluster_column, columns, name)
                self.family = _family(name, self.model)
                self.second = None if self.other is None else _family(name, self.other)
                self._signed = name == "stepwise" and has_signed_labels(chunk)
            items = [read_item(row, self.rows + n, name, cluster_column, self._signed) for n, row in enumerate(chunk)]
            if self.chats and name != "stepwise":
                items = [as_chat(item) for item in items]
            elif not self.rows:
                _advise_chats(self.model, items)
            self.rows += len(chunk)
            scored = self._scores(self.model, items, name)
            others = None if self.other is None else self._scores(self.other, items, name)
            for n, (item, scores) in enumerate(zip(items, scored, strict=True)):
                reason = _useless(scores) or (None if others is None else _useless(others[n]))
                if reason:
                    self.report.omitted[reason] = self.report.omitted.get(reason, 0) + 1
                    continue
                self._take(item, scores, name)
                if others is not None:
                    self.second.add(item, others[n])
        if name is None:
            raise DataError("no rows", "at least one row", "Check the data set and its split.", dataset="evaluation")
        if not len(self.family.units):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.report.omitted.items())
            raise DataError(
                f"{self.rows} rows of which none has a score ({reasons})",
                "at least one row with a finite score",
                "Check what the reward function returns.",
                dataset="evaluation",
            )
        self._finish(name)

    def _cluster_column(self, column: str | None, columns: Sequence[str], name: Family) -> str | None:
        """The column that groups rows; of several data sets one may lack it, as samples of a policy do."""
        if column is None or column in columns or not self.prefix:
            return column
        level = logging.INFO if name == "samples" else logging.WARNING
        logger.log(level, f"The data set {self.prefix[:-1]} has no column {column!r}: it is grouped by the default.")
        return None

    def _finish(self, name: Family) -> None:
        worst = self._mistakes(name)
        started = time.perf_counter()
        tokens = _token_scores(self.model, [item for _, item, _ in worst]) if name != "stepwise" else None
        self.seconds += time.perf_counter() - started
        for place, (margin, item, scores) in enumerate(worst):
            self.report.mistakes.append(_mistake(item, scores, margin, name, tokens[place] if tokens else None))
        for key, method in (("reliability", "reliability"), ("best_of_n", "curve")):
            if hasattr(self.family, method):
                self.report.curves[self.prefix + key] = getattr(self.family, method)()
        if hasattr(self.family, "calibrations") and _can_calibrate(self.model) and not self.report.calibrations:
            self.report.calibrations = self.family.calibrations()
            for calibration in self.report.calibrations.values():
                calibration["normalizer"] = getattr(self.model, "normalizer", None)  # of RewardScorer

    def _take(self, item: Item, scores: list[float], name: Family) -> None:
        margin = self.family.add(item, scores)
        if not math.isnan(margin):
            kept = self._worst.setdefault(name == "outcome" and item.ratings[0] > 0.5, [])
            push = heapq.heappush if len(kept) < WORST else heapq.heappushpop
            push(kept, (-margin, -item.row, item, scores))
        if self.drawn is not None and name != "stepwise":
            self.drawn.add(item)
        if self.words is not None:
            for completion in item.completions:
                self.words.add(text_of(completion))
        self._histogram(item, scores, name)

    def _mistakes(self, name: Family) -> list[tuple[float, Item, list[float]]]:
        """The rows that the model gets wrong with their margins, the worst first."""
        found = [(-size, item, scores) for kept in self._worst.values() for size, _, item, scores in kept]
        if name == "outcome":
            found = [(self.family.margin(item, scores), item, scores) for _, item, scores in found]
        found = [one for one in found if one[0] < 0]
        return sorted(found, key=lambda one: (one[0], one[1].row))[:WORST]

    def _histogram(self, item: Item, scores: list[float], name: Family) -> None:
        names = {"preference": ("rejected", "chosen"), "outcome": ("wrong", "right"), "stepwise": ("wrong", "right")}
        ratings = item.ratings or [math.nan] * len(scores)
        for score, rating in zip(scores, ratings, strict=True):
            key = names[name][int(rating > 0.5)] if name in names and not math.isnan(rating) else "scores"
            kept = self.report.histogram.setdefault(self.prefix + key, [])
            if len(kept) < KEPT:
                kept.append(score)

    def _scores(self, model: Callable, items: list[Item], name: Family) -> list[list[float | None]]:
        started = time.perf_counter()
        try:
            if name == "stepwise":
                return _score_steps(model, items, self._signed)
            flat = [(item, completion) for item in items for completion in item.completions]
            scores = iter(call(model, [i.prompt for i, _ in flat], [c for _, c in flat], [i.columns for i, _ in flat]))
            return [[next(scores) for _ in item.completions] for item in items]
        finally:
            self.seconds += time.perf_counter() - started


def call(
    model: Callable, prompts: list[Any], completions: list[Any], columns: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """Call a reward function as TRL does: columns as keyword arguments, `None` where a row lacks one."""
    names = dict.fromkeys(name for row in columns for name in row if name not in GIVEN)
    given = {name: [row.get(name) for row in columns] for name in names}
    whole = None if all(prompt is None for prompt in prompts) else prompts
    returned = model(prompts=whole, completions=completions, **given)
    if returned is None or isinstance(returned, (str, Mapping)) or not hasattr(returned, "__iter__"):
        raise ValueError(
            f"The reward function returned {shown(returned)}; needed: a list with one score for each completion, None "
            "where it has none."
        )
    scores = list(returned)
    if len(scores) != len(completions):
        raise ValueError(
            f"The reward function returned {len(scores)} scores for {len(completions)} completions; needed: one each."
        )
    return scores


def _family(name: Family, model: Callable) -> Any:
    """What collects the scores of a model. Its steps have probabilities, unless its loss gives margins."""
    views = getattr(getattr(model, "raw", None), "views", None)  # of RewardScorer
    return Steps(views.gives_probabilities) if name == "stepwise" and views is not None else _FAMILIES[name]()


def _can_calibrate(model: Callable) -> bool:
    """Whether a calibration of these scores can be stored: it is for scores that a scorer changes in no other way."""
    return not changing_options(getattr(model, "__dict__", {}))  # of RewardScorer


def _score_steps(model: Callable, items: list[Item], signed: bool) -> list[list[float | None]]:
    if not hasattr(model, "score_steps"):
        raise ValueError(
            "The rows have labelled steps, but the model has no `score_steps`. Pass a process reward model "
            "(PRMTrainer), or rows of another family."
        )
    prompts = [item.prompt for item in items]
    steps = [[text_of(step) for step in item.completions] for item in items]
    prompts = None if all(prompt is None for prompt in prompts) else prompts
    sidecar = getattr(getattr(model, "raw", None), "sidecar", None)  # of RewardScorer
    if signed and sidecar is not None and sidecar.outputs_per_category == 3:
        return model.score_steps(prompts, steps, neutral="positive")  # as a neutral step counts in the labels
    return model.score_steps(prompts, steps)


def _token_scores(model: Callable, items: list[Item]) -> list[list[list[tuple[str, float]]]] | None:
    """Of each item and completion the tokens with their scores, where the model gives one number for each token."""
    if not items or getattr(getattr(model, "raw", None), "kind", "scalar") == "scalar":  # of RewardScorer
        return None
    flat = [(item.prompt, completion) for item in items for completion in item.completions]
    prompts, completions = [prompt for prompt, _ in flat], [completion for _, completion in flat]
    prompts = None if all(prompt is None for prompt in prompts) else prompts
    texts, scores = model.token_texts(prompts, completions), model.score_tokens(prompts, completions)
    if any(isinstance(score, list) for row in scores for score in row[:1]):
        return None  # several classes or categories have no one colour
    rows = iter([list(zip(*pair, strict=True)) for pair in zip(texts, scores, strict=True)])
    return [[next(rows) for _ in item.completions] for item in items]


def _mistake(
    item: Item,
    scores: list[float],
    margin: float,
    name: Family,
    tokens: list[list[tuple[str, float]]] | None,
) -> Mistake:
    prompt = "" if item.prompt is None else text_of(item.prompt)
    ratings = item.ratings or [math.nan] * len(scores)
    texts = [text_of(completion) for completion in item.completions]
    completions = list(zip(texts, map(float, scores), ratings, strict=True))
    return Mistake(item.row, name, margin, prompt, completions, tokens)


def _advise_chats(model: Callable, items: list[Item]) -> None:
    """Warn where a benchmark's texts are scored without the chat template, which the benchmark's own code applies."""
    tokenizer = getattr(model, "processing_class", None)  # of RewardScorer; functions have none
    if (
        getattr(tokenizer, "chat_template", None)
        and isinstance(items[0].prompt, str)
        and is_benchmark(items[0].subset)
    ):
        logger.warning(
            "The rows are those of a public benchmark and hold texts, which are scored without the model's chat "
            "template. The benchmark's own code applies it: pass as_chat=True (--as_chat true) for numbers that can "
            "be compared with published ones."
        )


def _useless(scores: list[float | None]) -> str | None:
    """Why a row does not count, `None` where all of its scores are finite numbers."""
    if any(score is None for score in scores):
        return "without a score"
    return None if np.isfinite(np.asarray(scores, dtype=float)).all() else "with a score that is not finite"


def _chunks(data: Rows, size: int) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(data)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


class Reservoir:
    """A random sample of the items, of one size however many there are."""

    def __init__(self, size: int, seed: int):
        self.size, self.items, self.seen = size, [], 0
        self._random = random.Random(seed)

    def add(self, item: Item) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self._random.randrange(self.seen)) < self.size:
            self.items[place] = item
