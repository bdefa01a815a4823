"""`evaluate_reward_model`: rows in, a report out.

`run` reads, scores and reduces the rows of one data set. `comparisons`, `outcomes`, `steps`, `best_of_n` and `samples`
decide which numbers a family of rows has; intervals come from `statistics`, judgements from `verdicts`. It knows
reward functions by their call, and nothing of how they are trained.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.data.mapping import plain_rows
from trl_ext.evaluation.families.samples import Samples, Words
from trl_ext.evaluation.items import Item
from trl_ext.evaluation.measures import Measure, fewer
from trl_ext.evaluation.probes import PROBES, ProbeResult, eos_probe, run_probes
from trl_ext.evaluation.report.evaluation_report import EvaluationReport
from trl_ext.evaluation.report.verdicts import judge_report
from trl_ext.evaluation.run import WORST, Reservoir, Rows, Run, call
from trl_ext.evaluation.statistics import function_estimate, paired_test
from trl_ext.logs import follow_transformers
from trl_ext.scoring import RewardScorer
from trl_ext.scoring.ensemble import load_scorer


LOADED = (str, Path, PreTrainedModel, PeftModel)  # what a scorer is made of
RewardModel = str | Path | PreTrainedModel | PeftModel | Callable[..., list[float | None]]


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
    as_chat: bool = False,
    level: float = 0.95,
    resamples: int = 2_000,
    max_rows: int | None = None,
    **scorer_kwargs: Any,
) -> EvaluationReport:
    """
    Find out whether a reward model is any good, and what a policy could do to it.

    What is computed follows from the columns of the rows:

    - **preference** (`chosen`, `rejected`, each one completion or a list; `prompt`, `subset`): accuracy by subset and
      section beside length alone, and calibration. RewardBench, RewardBench 2 and RM-Bench are recognised. A pair
      with `preference_probability` below 1/2 counts the other way round. At 1/2 it has no order.
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
            A folder or Hub id of a reward model (with or without our `reward_model.json`) or of an ensemble, a model
            in memory, or any TRL reward function. Stepwise rows need a process reward model.
        dataset (iterable of rows, or a mapping from names to such):
            Rows as dictionaries: a `Dataset`, an `IterableDataset` or a list. With a mapping, names of metrics begin
            with the name of their data set, and samples are compared with the texts of the other data sets.
        output_dir (`str` or `Path`, *optional*):
            Folder for `evaluation.json`, `.md`, `.html` and pictures.
        compare (as `model_or_function`, *optional*):
            A second model, scored on the same rows; differences are tested pair by pair.
        seed (`int`, *optional*, defaults to `0`): seed of the bootstrap and of the rows that the probes get.
        probes (`bool`, *optional*, defaults to `True`): whether to run the bias probes.
        probe_rows (`int`, *optional*, defaults to `200`): rows that the probes change, drawn at random.
        cluster_column (`str`, *optional*):
            Column that says which rows are not independent, e.g. a conversation. By default `cluster`,
            `conversation_id` or `prompt_id`, else rows with the same prompt belong together. With several data sets,
            one without the column is grouped by the default.
        as_chat (`bool`, *optional*, defaults to `False`):
            Make messages of a user and an assistant of text prompts and completions, so that the model's chat template
            is applied, as the code of the public benchmarks does. Stepwise rows stay texts.
        level (`float`, *optional*, defaults to `0.95`): confidence level of the intervals.
        resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap resamples for the interval of a mean. Numbers that are no means, such as an AUC, get a quarter of
            them, but at least 200.
        max_rows (`int`, *optional*): take only the first rows of each data set.
        **scorer_kwargs:
            Arguments of [`RewardScorer`] for those of `model_or_function` and `compare` that are paths or models.

    Returns:
        [`EvaluationReport`]: also written to `output_dir`.

    Raises:
        [`DataError`]: the columns are those of no family, a row cannot be read, or no row has a score.
        `ValueError`: an argument is out of its range, or stepwise rows and a function without `score_steps`.

    Example:

    ```python
    >>> report = evaluate_reward_model("outputs/reward", load_dataset("allenai/reward-bench", split="filtered"))
    >>> report.metrics["accuracy"], report.intervals["accuracy"], report.flags
    (0.7312, (0.7149, 0.7471), ['length_bias'])
    ```
    """
    follow_transformers()
    started = time.perf_counter()
    _check(level, {"probe_rows": probe_rows, "resamples": resamples, "max_rows": max_rows})
    named = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    model, other = _load(model_or_function, compare, scorer_kwargs)
    report = EvaluationReport(model=_name(model, model_or_function))
    drawn = Reservoir(probe_rows, seed) if probes else None
    words = {name: Words() for name in named} if len(named) > 1 else {}
    families: dict[str, Any] = {}
    rows, seconds = 0, 0.0
    for name, data in named.items():
        data = plain_rows(data)
        run = Run(name, model, other, report, drawn, words.get(name), as_chat)
        run.read(itertools.islice(data, max_rows) if max_rows else data, cluster_column)
        families[name] = run.family
        rows, seconds = rows + run.rows, seconds + run.seconds
        for measure in run.family.measures():
            _enter(report, run.prefix, measure, level, resamples, seed)
        if run.second is not None:
            _compare(report, run, level, resamples, seed)
    _enter_words(report, families, words)
    if drawn is not None and drawn.items:
        report.probes, spent = _probe(model, drawn.items, level, resamples, seed)
        seconds += spent
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


def _check(level: float, counts: dict[str, int | None]) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}; needed: a number between 0 and 1, 0.95 for example.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r}; needed: 1 or more.")


def as_reward_function(model: RewardModel, **scorer_kwargs: Any) -> Callable[..., list[float | None]]:
    """A reward function of what a user may pass as a reward model; see [`evaluate_reward_model`]."""
    if isinstance(model, (str, Path)):
        return load_scorer(model, **scorer_kwargs)
    if isinstance(model, LOADED):
        return RewardScorer(model, **scorer_kwargs)
    if not callable(model):
        raise TypeError(
            f"The reward model is a {type(model).__name__}; needed: a path, a Hub id, a model, or a function "
            "(prompts, completions, **columns) -> scores."
        )
    if scorer_kwargs:
        raise TypeError(f"{sorted(scorer_kwargs)} are for models that are loaded here, but a function was given.")
    return model


def _load(
    model: RewardModel, compare: RewardModel | None, scorer_kwargs: dict[str, Any]
) -> tuple[Callable, Callable | None]:
    """Both reward functions. The arguments are for those that are loaded here, and refused where none is."""
    some = isinstance(model, LOADED) or isinstance(compare, LOADED)
    first, second = (scorer_kwargs if isinstance(given, LOADED) or not some else {} for given in (model, compare))
    loaded = as_reward_function(model, **first)
    return loaded, None if compare is None else as_reward_function(compare, **second)


def _probe(
    model: Callable, items: list[Item], level: float, resamples: int, seed: int
) -> tuple[list[ProbeResult], float]:
    """The results of all probes, and the seconds that the model took."""
    tokenizer = getattr(model, "processing_class", None)
    eos = getattr(tokenizer, "eos_token", None)
    probes = [*PROBES, eos_probe(eos)] if eos else list(PROBES)
    spent = 0.0

    def score(*given: Any) -> list[float | None]:
        nonlocal spent
        started = time.perf_counter()
        scores = call(model, *given)
        spent += time.perf_counter() - started
        return scores

    return run_probes(score, items, probes, level, resamples, seed), spent


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


def _compare(report: EvaluationReport, run: Run, level: float, resamples: int, seed: int) -> None:
    """Differences of all metrics over the same units: means by a paired test, others by a paired bootstrap."""
    differences = report.compared.setdefault("differences", {})
    second = {measure.name: measure for measure in run.second.measures()}
    for measure in run.family.measures():
        twin = second.get(measure.name)
        size = measure.size if measure.values is None else len(measure.values)
        if twin is None or size < 2 or size != (twin.size if twin.values is None else len(twin.values)):
            continue
        if measure.values is not None:
            test = paired_test(measure.values, twin.values, measure.clusters, level, resamples, seed)
            estimate, p_value = test.difference, test.p_value
        else:
            both = (measure.function, twin.function)
            estimate = function_estimate(
                lambda drawn, both=both: both[0](drawn) - both[1](drawn),
                size,
                measure.clusters,
                level,
                fewer(resamples),
                seed,
            )
            p_value = math.nan  # an interval without a test
        differences[run.prefix + measure.name] = {
            "difference": estimate.value,
            "interval": estimate.interval,
            "reason": estimate.reason,
            "detectable": estimate.detectable,
            "p_value": p_value,
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


def _name(model: Callable, given: RewardModel) -> str:
    if isinstance(given, (str, Path)):
        return str(given)
    return getattr(model, "__name__", type(model).__name__)
