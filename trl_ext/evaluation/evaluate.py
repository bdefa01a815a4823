"""`evaluate_reward_model`: rows in, a report out.

Rows are read, scored and reduced to a few numbers in chunks, so that memory does not grow with texts. Which numbers a
family of rows has is decided in `comparisons`, `outcomes`, `steps`, `best_of_n` and `samples`; intervals come from
`statistics`, judgements from `verdicts`. It knows reward functions by their call, and nothing of how they are trained.
"""

import heapq
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.data.mapping import plain_rows
from trl_ext.data.validation import DataError
from trl_ext.evaluation.best_of_n import BestOfN
from trl_ext.evaluation.comparisons import Comparisons
from trl_ext.evaluation.findings import Mistake
from trl_ext.evaluation.items import Family, Item, family_of, read_item, text_of
from trl_ext.evaluation.measures import Measure
from trl_ext.evaluation.outcomes import Outcomes
from trl_ext.evaluation.probes import PROBES, ProbeResult, eos_probe, run_probes
from trl_ext.evaluation.report import EvaluationReport
from trl_ext.evaluation.samples import Samples, Words
from trl_ext.evaluation.statistics import paired_test
from trl_ext.evaluation.steps import Steps
from trl_ext.evaluation.verdicts import judge_report
from trl_ext.scoring import RewardEnsemble, RewardScorer
from trl_ext.scoring.remote import files_of


logger = logging.getLogger(__name__)

RewardModel = str | Path | PreTrainedModel | PeftModel | Callable[..., list[float | None]]
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


def evaluate_reward_model(
    model_or_function: RewardModel,
    dataset: Rows | Mapping[str, Rows],
    *,
    output_dir: str | Path | None = None,
    compare: RewardModel | None = None,
    seed: int = 0,
    probes: bool = True,
    probe_rows: int = 200,
    cluster_column: str | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
    max_rows: int | None = None,
    **scorer_kwargs: Any,
) -> EvaluationReport:
    """
    Find out whether a reward model is any good, and what a policy could do to it.

    What is computed follows from the columns of the rows:

    - **preference** (`chosen`, `rejected`, each one completion or a list; `prompt`, `subset`): accuracy by subset and
      section beside length alone, and calibration. RewardBench, RewardBench 2 and RM-Bench are recognised.
    - **ranked** (`completions`, `ratings` or `ranks`): Kendall's tau, NDCG, top-1, pair accuracy.
    - **outcome** (`completion`, `label`): AUC over all and within a prompt, ECE, Brier.
    - **stepwise** (`completions`, `labels`; or the columns of ProcessBench or PRMBench): F1 of the first wrong step,
      AUC over steps.
    - **best_of_n** (`completions`, `gold`): gold reward against n, best n and predicted n.
    - **samples** (`completions`): variance within prompts, prompts without signal.

    Bias probes change one feature of the completions and measure the effect on the score. Every number has an interval
    over prompts (bootstrap) and the smallest effect that the sample could have shown, where they can be had.

    Args:
        model_or_function (`str`, `Path`, `PreTrainedModel`, `PeftModel` or `Callable`):
            A folder or Hub id of a reward model (with or without our `reward_model.json`), the folder of an ensemble,
            a model in memory, or any TRL reward function. Stepwise rows need a process reward model.
        dataset (iterable of rows, or a mapping from names to such):
            Rows as dictionaries: a `Dataset`, an `IterableDataset` or a list. With a mapping, names of metrics begin
            with the name of their data set, and samples are compared with the texts of the other data sets.
        output_dir (`str` or `Path`, *optional*):
            Folder for `evaluation.json`, `.md`, `.html` and pictures.
        compare (as `model_or_function`, *optional*):
            A second model, scored on the same rows; differences are tested pair by pair.
        seed (`int`, *optional*, defaults to `0`): of the bootstrap and of the choice of rows for probes.
        probes (`bool`, *optional*, defaults to `True`): whether to run the bias probes.
        probe_rows (`int`, *optional*, defaults to `200`): rows that the probes change, drawn at random.
        cluster_column (`str`, *optional*):
            Column that says which rows are not independent, e.g. a conversation. By default `cluster`,
            `conversation_id` or `prompt_id`, else rows with the same prompt belong together.
        level (`float`, *optional*, defaults to `0.95`): of the intervals.
        resamples (`int`, *optional*, defaults to `2000`): of the bootstrap.
        max_rows (`int`, *optional*): take only the first rows of each data set.
        **scorer_kwargs: for [`RewardScorer`], where a path or a model is given.

    Returns:
        [`EvaluationReport`]: also written to `output_dir`.

    Raises:
        [`DataError`]: the columns are those of no family, a row cannot be read, or no row has a score.
        `ValueError`: stepwise rows and a function without `score_steps`.

    Example:

    ```python
    >>> report = evaluate_reward_model("outputs/reward", load_dataset("allenai/reward-bench", split="filtered"))
    >>> report.metrics["accuracy"], report.intervals["accuracy"], report.flags
    (0.7312, (0.7149, 0.7471), ['length_bias'])
    ```
    """
    started = time.perf_counter()
    named = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    model = as_reward_function(model_or_function, **scorer_kwargs)
    other = None if compare is None else as_reward_function(compare, **scorer_kwargs)
    report = EvaluationReport(model=_name(model, model_or_function))
    drawn = _Reservoir(probe_rows, seed)
    words = {name: Words() for name in named}
    families: dict[str, Any] = {}
    rows, seconds = 0, 0.0
    for name, data in named.items():
        data = plain_rows(data) if isinstance(data, (Dataset, IterableDataset)) else data
        run = _Run(model, other, report, drawn if probes else None, words[name])
        run.read(itertools.islice(data, max_rows) if max_rows else data, cluster_column)
        families[name] = run.family
        rows, seconds = rows + run.rows, seconds + run.seconds
        prefix = f"{name}/" if name else ""
        for measure in run.family.measures():
            _enter(report, prefix, measure, level, resamples, seed)
        if run.second is not None:
            _compare(report, prefix, run, level, resamples, seed)
    _enter_words(report, families, words)
    if probes and drawn.items:
        report.probes = _probe(model, drawn.items, level, resamples, seed)
    report.mistakes = sorted(report.mistakes, key=lambda mistake: mistake.margin)[:WORST]
    report.settings = {
        "rows": rows,
        "datasets": [name for name in named if name],
        "seed": seed,
        "level": level,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_scoring": round(seconds, 1),
        "versions": {package: version(package) for package in ("trl-ext", "trl", "transformers", "torch")},
    }
    if other is not None:
        report.compared["model"] = _name(other, compare)
    report.verdicts = judge_report(report)
    report.flags = list(dict.fromkeys(v.flag for v in report.verdicts if v.level != "good"))
    if output_dir is not None:
        report.save(output_dir)
    return report


def as_reward_function(model: RewardModel, **scorer_kwargs: Any) -> Callable[..., list[float | None]]:
    """A reward function of what a user may pass as a reward model; see [`evaluate_reward_model`]."""
    if isinstance(model, (str, Path)) and Path(files_of(model), "reward_ensemble.json").is_file():
        return RewardEnsemble(model, scorer_kwargs=scorer_kwargs or None)
    if isinstance(model, (str, Path, PreTrainedModel, PeftModel)):
        return RewardScorer(model, **scorer_kwargs)
    if not callable(model):
        raise TypeError(
            f"The reward model is a {type(model).__name__}; needed: a path, a Hub id, a model, or a function "
            "(prompts, completions, **columns) -> scores."
        )
    if scorer_kwargs:
        raise TypeError(f"{sorted(scorer_kwargs)} are for models that are loaded here, but a function was given.")
    return model


class _Run:
    """One data set through one or two models."""

    def __init__(
        self,
        model: Callable,
        other: Callable | None,
        report: EvaluationReport,
        drawn: "_Reservoir | None",
        words: Words,
    ):
        self.model, self.other, self.report, self.drawn, self.words = model, other, report, drawn, words
        self.family: Any = None
        self.second: Any = None
        self.rows = 0
        self.seconds = 0.0
        self._mistakes: list[tuple[float, int, Mistake]] = []

    def read(self, data: Rows, cluster_column: str | None) -> None:
        """Go through the rows once."""
        name: Family | None = None
        for chunk in _chunks(data, CHUNK):
            if name is None:
                columns = getattr(data, "column_names", None) or list(dict.fromkeys(c for row in chunk for c in row))
                name = family_of(columns)
                self.family = _FAMILIES[name]()
                self.second = None if self.other is None else _FAMILIES[name]()
            items = [read_item(row, self.rows + n, name, cluster_column) for n, row in enumerate(chunk)]
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
        self.report.mistakes += [mistake for _, _, mistake in self._mistakes]
        if hasattr(self.family, "reliability"):
            self.report.curves.setdefault("reliability", self.family.reliability())
        if hasattr(self.family, "curve"):
            self.report.curves.setdefault("best_of_n", self.family.curve())

    def _take(self, item: Item, scores: list[float], name: Family) -> None:
        margin = self.family.add(item, scores)
        if self.drawn is not None and name != "stepwise":
            self.drawn.add(item)
        for completion in item.completions:
            self.words.add(text_of(completion))
        self._histogram(item, scores, name)
        if margin < 0:
            mistake = (-margin, -item.row, _mistake(item, scores, margin, name))
            push = heapq.heappush if len(self._mistakes) < WORST else heapq.heappushpop
            push(self._mistakes, mistake)

    def _histogram(self, item: Item, scores: list[float], name: Family) -> None:
        names = {"preference": ("rejected", "chosen"), "outcome": ("wrong", "right"), "stepwise": ("wrong", "right")}
        ratings = item.ratings or [math.nan] * len(scores)
        for score, rating in zip(scores, ratings, strict=True):
            key = names[name][int(rating > 0.5)] if name in names and not math.isnan(rating) else "scores"
            kept = self.report.histogram.setdefault(key, [])
            if len(kept) < KEPT:
                kept.append(score)

    def _scores(self, model: Callable, items: list[Item], name: Family) -> list[list[float | None]]:
        started = time.perf_counter()
        try:
            if name == "stepwise":
                return _score_steps(model, items)
            flat = [(item, completion) for item in items for completion in item.completions]
            scores = iter(call(model, [i.prompt for i, _ in flat], [c for _, c in flat], [i.columns for i, _ in flat]))
            return [[next(scores) for _ in item.completions] for item in items]
        finally:
            self.seconds += time.perf_counter() - started


def call(
    model: Callable, prompts: list[Any], completions: list[Any], columns: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """Call a reward function as TRL does: columns as keyword arguments, `None` where a row lacks one."""
    names = dict.fromkeys(name for row in columns for name in row)
    given = {name: [row.get(name) for row in columns] for name in names}
    whole = None if all(prompt is None for prompt in prompts) else prompts
    scores = list(model(prompts=whole, completions=completions, **given))
    if len(scores) != len(completions):
        raise ValueError(
            f"The reward function returned {len(scores)} scores for {len(completions)} completions; needed: one each."
        )
    return scores


def _score_steps(model: Callable, items: list[Item]) -> list[list[float | None]]:
    if not hasattr(model, "score_steps"):
        raise ValueError(
            "The rows have labelled steps, but the model has no `score_steps`. Pass a process reward model "
            "(PRMTrainer), or rows of another family."
        )
    prompts = [item.prompt for item in items]
    steps = [[text_of(step) for step in item.completions] for item in items]
    return model.score_steps(None if all(p is None for p in prompts) else prompts, steps)


def _probe(model: Callable, items: list[Item], level: float, resamples: int, seed: int) -> list[ProbeResult]:
    tokenizer = getattr(model, "processing_class", None)
    eos = getattr(tokenizer, "eos_token", None)
    probes = [*PROBES, eos_probe(eos)] if eos else list(PROBES)
    return run_probes(lambda *given: call(model, *given), items, probes, level, resamples, seed)


def _enter(report: EvaluationReport, prefix: str, measure: Measure, level: float, resamples: int, seed: int) -> None:
    name = prefix + measure.name
    estimate = measure.estimate(level, resamples, seed)
    report.metrics[name] = estimate.value
    report.sizes[name] = estimate.size
    if estimate.interval is not None:
        report.intervals[name] = estimate.interval
    else:
        report.reasons[name] = estimate.reason or ""
    if estimate.detectable is not None:
        report.detectable[name] = estimate.detectable


def _compare(report: EvaluationReport, prefix: str, run: _Run, level: float, resamples: int, seed: int) -> None:
    """Differences of all metrics that are means over the same units."""
    differences = report.compared.setdefault("differences", {})
    second = {measure.name: measure for measure in run.second.measures() if measure.values is not None}
    for measure in run.family.measures():
        twin = second.get(measure.name)
        if measure.values is None or twin is None or len(twin.values) != len(measure.values) or len(twin.values) < 2:
            continue
        test = paired_test(measure.values, twin.values, measure.clusters, level, resamples, seed)
        differences[prefix + measure.name] = {
            "difference": test.difference.value,
            "interval": test.difference.interval,
            "reason": test.difference.reason,
            "detectable": test.difference.detectable,
            "p_value": test.p_value,
        }


def _enter_words(report: EvaluationReport, families: dict[str, Any], words: dict[str, Words]) -> None:
    """How far the policy's samples are from the texts of the other data sets."""
    samples = [name for name, family in families.items() if isinstance(family, Samples)]
    others = [name for name in families if name not in samples]
    for name in samples:
        for other in others:
            report.metrics[f"{name}/word_distance_to_{other}"] = words[name].distance(words[other])
            report.metrics[f"{name}/length_gap_to_{other}"] = words[name].length_gap(words[other])
            for kind in ("word_distance", "length_gap"):
                report.reasons[f"{name}/{kind}_to_{other}"] = "of all texts together"


def _mistake(item: Item, scores: list[float], margin: float, name: Family) -> Mistake:
    prompt = "" if item.prompt is None else text_of(item.prompt)
    ratings = item.ratings or [math.nan] * len(scores)
    texts = [text_of(completion) for completion in item.completions]
    return Mistake(item.row, name, margin, prompt, list(zip(texts, map(float, scores), ratings, strict=True)))


def _useless(scores: list[float | None]) -> str | None:
    """Why a row does not count, `None` where all of its scores are finite numbers."""
    if any(score is None for score in scores):
        return "without a score"
    return None if np.isfinite(np.asarray(scores, dtype=float)).all() else "with a score that is not finite"


def _chunks(data: Rows, size: int) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(data)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _name(model: Callable, given: RewardModel) -> str:
    if isinstance(given, (str, Path)):
        return str(given)
    return getattr(model, "__name__", type(model).__name__)


class _Reservoir:
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
