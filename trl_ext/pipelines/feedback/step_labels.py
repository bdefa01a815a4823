"""Labels for process reward models without annotators: rollouts from each step, judged by a verifier (`label_steps`).

This module knows data sets, where results are kept, and the report. `step_rollouts` labels a chunk of solutions, and
`rejection_sampling` generates solutions where only prompts are given.
"""

import hashlib
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.mapping import plain_rows
from trl_ext.data.segmentation import CharSpan, segmenters
from trl_ext.data.segmentation import steps as split_steps
from trl_ext.data.span_rows import SpanFormat, check_span_row
from trl_ext.data.validation import DataError, RowChecks
from trl_ext.pipelines.feedback.step_methods import Method, StepSettings
from trl_ext.pipelines.feedback.step_rollouts import Solution, StepLabeller
from trl_ext.pipelines.generation.backends import make_generator, model_of_backend
from trl_ext.pipelines.generation.records import TEMPLATE_COLUMNS, Sample, prompt_id, prompt_of, text_of
from trl_ext.pipelines.generation.sampling import Backend, Sampling
from trl_ext.pipelines.rejection_sampling.generate_and_score import length_of
from trl_ext.pipelines.rejection_sampling.prompts import NOT_PASSED
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler, check_request
from trl_ext.pipelines.reward_functions import (
    RewardFunc,
    check_rewards,
    identity_in_run,
    load_reward,
    reward_name,
    warn_of_unseen,
)
from trl_ext.pipelines.stages.cache_key import canonical
from trl_ext.pipelines.stages.one_process import SERVERS, check_one_process
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows
from trl_ext.pipelines.stages.store import ShardStore, write_json, write_lines
from trl_ext.pipelines.stages.values import plain


logger = logging.getLogger(__name__)

SHOWN_ROWS = 50  # solutions in the table for W&B
FORMAT = 2  # format of the stored labels; other formats are in other folders
Segmenter = Callable[[str], list[CharSpan]]


@dataclass
class StepLabels:
    """
    The result of [`label_steps`] with its report.

    Args:
        dataset (`Dataset`): `prompt`, `completions` (the steps), `labels`.
        report (`dict`): `method`, counts of solutions, prefixes and rollouts, generated tokens, shares; see the guide
            to process labels.
        path (`Path`): the JSON lines of the rows; `report.json` is beside it.
    """

    dataset: Dataset
    report: dict[str, Any]
    path: Path

    def log_to_wandb(self) -> None:
        """Put the numbers and a table of steps on the W&B run that is open; nothing happens without one."""
        import wandb

        if wandb.run is None:
            return
        logged = {f"steps/{name}": value for name, value in self.report.items() if isinstance(value, (int, float))}
        logged |= {f"steps/omitted/{reason}": count for reason, count in self.report["omitted"].items()}
        data = [
            [number, str(row["prompt"]), place, step, label]
            for number, row in enumerate(self.dataset.select(range(min(SHOWN_ROWS, len(self.dataset)))))
            for place, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True))
        ]
        logged["steps/rows"] = wandb.Table(columns=["row", "prompt", "place", "step", "label"], data=data)
        wandb.run.log(logged)


def label_steps(
    model: str | Path | PreTrainedModel,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
    verifier: RewardFunc,
    num_rollouts: int = 8,
    method: Method = "full",
    *,
    output_dir: str | Path | None = None,
    **options: Any,
) -> Dataset:
    """
    Label the steps of solutions by rollouts: from a prefix that ends with a right step, the model can reach a right
    answer.

    `method="full"` is Monte-Carlo estimation as in *Math-Shepherd* by P. Wang et al.
    (https://huggingface.co/papers/2312.08935): `num_rollouts` completions from every prefix. `"binary"` searches for
    the first wrong step of each wrong solution. `"adaptive"` does the same, and stops the rollouts of a prefix as soon
    as they decide. The label of the last step is the verifier's verdict on the whole solution. The guide to process
    labels compares the methods.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Writes the rollouts: folder or Hub id, full model or adapter; in memory only with `"transformers"`. For
            `"openai"` its name on the server.
        dataset (`Dataset`, `IterableDataset` or list of rows):
            Rows with a `prompt` (text or messages) and the columns that the verifier needs. With a column
            `completions` (a list of steps) these solutions are labelled. Without it the model generates
            `num_solutions` for each prompt.
        verifier (reward function):
            Judges whole solutions: a function, `file.py:function`, a name of `trl.rewards`, a reward model or scorer.
            `None` for an answer that it cannot judge: such rollouts do not count.
        num_rollouts (`int`, *optional*, defaults to `8`):
            Rollouts of a prefix, as in Math-Shepherd; for `"adaptive"` the largest number.
        method (`str`, *optional*, defaults to `"full"`):
            `"full"`, `"binary"` or `"adaptive"`.
        output_dir (`str` or `Path`, *optional*):
            Folder of all results. Kill the run at any moment and call it again: it continues. Without it nothing is
            kept.
        options:
            Labels: `labels` (`"soft"`: the share of right rollouts, the default of `"full"`; `"hard"`: 1 if the share
            is above `threshold`); `threshold` (0: any right rollout makes a prefix right, as in Math-Shepherd);
            `error` (0.1: with a positive threshold, `"adaptive"` stops a prefix when a confidence sequence with this
            error excludes the threshold); `right_above` (0.5: a score above it means a right answer); `reuse` (`True`:
            solutions of a prompt share the rollouts of equal prefixes, and a text counts for every prefix that it
            passes through; `False`: every prefix gets new rollouts, as in Math-Shepherd). Rows with one prompt and
            other columns, such as another answer, count as different prompts.

            Denoising: `denoise` (`False`; `True` follows SCAN, https://huggingface.co/papers/2509.16548: the
            confidence of a prompt is the share of right solutions among at least `num_rollouts`; prompts at or below
            `min_confidence` (0) are left out; right solutions get no rollouts and the label 1 for every step; of wrong
            ones, steps before the first wrong one get 1, except the last `tolerance` (2) before it, which get
            `min(share / confidence, 1)`).

            Steps: `step_separator` (`"\\n"`, as in `PRMConfig`); `segmenter` (`"steps"`, a name or function of
            `trl_ext.data.segmentation`: splits generated solutions); `num_solutions` (4); `label_end` (`False`; `True`
            adds an empty last step to generated solutions, which stands for their end and has the verdict, and makes
            the step before it a prefix like the others).

            Running: `seed` (0); `backend` (`"transformers"`, `"vllm"`, `"openai"`); `chunk_size` (64: prompts, or
            given solutions, that are labelled together and stored at a time); `generation_batch_size` (32: rollouts in
            a batch in this process); `processing_class`; `model_init_kwargs`; `server` (`dict`); and the fields of
            [`Sampling`]: `max_completion_length`, `temperature`, `top_p` ...

    Returns:
        `Dataset` for [`PRMTrainer`]: `prompt`, `completions`, `labels` (from 0 to 1; `None` for an empty step inside a
        solution, and where no rollout could be judged), and `tools` and `chat_template_kwargs` where the rows have
        them. Solutions without labels are left out; the report counts them by reason.

    Raises:
        [`DataError`]: a row cannot be used; names row and column.
        ValueError: an option is out of its range, or no solution got labels.
        [`GenerationError`], [`RewardError`], [`StoreError`]: a backend, the verifier or the disk fails. Finished
            chunks are kept.

    Example:

    ```python
    >>> rows = label_steps("Qwen/Qwen3-0.6B", prompts, "accuracy_reward", method="adaptive", output_dir="steps")
    >>> PRMTrainer("Qwen/Qwen3-0.6B", PRMConfig("outputs/prm"), train_dataset=rows).train()
    ```
    """
    options = {"num_rollouts": num_rollouts, "method": method, **options}
    if output_dir is not None:
        return label_steps_with_report(model, dataset, verifier, output_dir, **options).dataset
    with tempfile.TemporaryDirectory() as folder:
        found = label_steps_with_report(model, dataset, verifier, folder, **options).dataset
        return Dataset.from_list(found.to_list(), features=found.features)


def label_steps_with_report(
    model: str | Path | PreTrainedModel,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
    verifier: RewardFunc,
    output_dir: str | Path,
    *,
    num_solutions: int = 4,
    step_separator: str = "\n",
    segmenter: str | Segmenter = "steps",
    label_end: bool = False,
    right_above: float = 0.5,
    seed: int = 0,
    backend: Backend = "transformers",
    chunk_size: int = 64,
    generation_batch_size: int = 32,
    processing_class: PreTrainedTokenizerBase | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    **options: Any,
) -> StepLabels:
    """[`label_steps`], which explains the arguments, with the report of the run."""
    check_one_process("label-steps", SERVERS)
    settings, sampling = _settings(options)
    check_request(settings.num_rollouts, backend, sampling)
    for name, value in (("num_solutions", num_solutions), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}={value}; needed: a whole number >= 1.")
    started = time.perf_counter()
    rows = list(plain_rows(dataset))
    if not rows:
        raise DataError("no row", "at least one prompt or solution", "Give another data set or split.")
    folder = Path(output_dir)
    in_process = backend == "transformers"
    if in_process and server:
        raise ValueError(f"server={server} is for the backends 'vllm' and 'openai'.")
    kwargs = {"generation_batch_size": generation_batch_size} if in_process else dict(server or {})
    if backend != "openai":
        kwargs["model_init_kwargs"] = plain(model_init_kwargs or {})
    if any("completions" in row for row in rows):
        check_rewards([verifier], {name for row in rows for name in row} - NOT_PASSED)
        groups = [[_given(row, number, step_separator)] for number, row in enumerate(rows)]
        if settings.reuse or settings.denoise:
            _warn_of_columns(sum(groups, []))
        solution_tokens = 0
    else:
        sampler = RejectionSampler(
            model,
            verifier,
            rows,
            folder / "solutions",
            num_solutions,
            seed=seed,
            backend=backend,
            shard_size=chunk_size,
            processing_class=processing_class,
            generation_batch_size=generation_batch_size,
            model_init_kwargs=model_init_kwargs,
            server=server,
            **asdict(sampling),
        )
        sampler.generate()
        sampler.score()
        split = _splitter(segmenter, step_separator)
        samples = list(sampler.samples())
        groups = [
            [_sampled(sample, row, split, label_end, right_above) for sample in group]
            for row, group in enumerate(samples)
        ]
        solution_tokens = sum(length_of(sample) for group in samples for sample in group)
    identity = identity_in_run(verifier)
    chunks = [sum(groups[first : first + chunk_size], []) for first in range(0, len(groups), chunk_size)]
    manifest = {
        "format": FORMAT,
        "backend": backend,
        "model": model_of_backend(model, backend, model_init_kwargs or {}, processing_class),
        "sampling": asdict(sampling),
        "settings": asdict(settings),
        "verifier": identity,
        "right_above": right_above,
        "step_separator": step_separator,
        "seed": seed,
        "chunk_size": chunk_size,
        "solutions": _content_key(groups),
    }
    if in_process:  # the batch size changes the rollouts
        manifest["generation_batch_size"] = generation_batch_size
    store = ShardStore(folder / "labels", manifest, [len(chunk) for chunk in chunks])
    store.create()
    missing = store.missing()
    if len(missing) < len(chunks):
        warn_of_unseen(identity, "Stored labels are", f"delete {store.folder}")
    if missing:
        generator = make_generator(model, backend, sampling, processing_class=processing_class, **kwargs)
        function, name = load_reward(verifier), reward_name(verifier)
        label = StepLabeller(generator, function, name, settings, step_separator, right_above, seed)
        for done, number in enumerate(missing, start=1):
            store.write(number, label(chunks[number]))
            logger.info(f"{done} of {len(missing)} chunks are labelled.")
    records = [record for number in range(len(chunks)) for record in store.read(number)]
    return _finish(records, sum(chunks, []), settings, solution_tokens, store.folder, time.perf_counter() - started)


def _settings(options: dict[str, Any]) -> tuple[StepSettings, Sampling]:
    """Divides the options of labelling and those of sampling. Raises `TypeError` for an unknown one."""
    known = StepSettings.__dataclass_fields__
    return (
        StepSettings(**{name: value for name, value in options.items() if name in known}),
        Sampling.of(**{name: value for name, value in options.items() if name not in known}),
    )


def _given(row: dict[str, Any], number: int, separator: str) -> Solution:
    """The solution of a row with steps. Raises [`DataError`] for a row that cannot be used."""
    checks = RowChecks(number, "dataset")
    prompt = prompt_of(row, number)
    steps = row.get("completions")
    layout = SpanFormat("stepwise", "last", step_separator=separator)
    labels = [None] * len(steps) if isinstance(steps, (list, tuple)) else None
    steps = check_span_row({**row, "completions": steps, "labels": labels}, layout, checks).steps
    for step in steps:
        if separator and separator in step.strip():
            raise checks.error(
                "completions",
                f"a step with the separator {separator!r} in it: {step[:60]!r}",
                "steps without it",
                "Split the step there, or give another step_separator.",
            )
    if not any(step.strip() for step in steps):
        raise checks.error("completions", "only empty steps", "a step with text", "Remove the row.")
    columns = {name: value for name, value in row.items() if name not in NOT_PASSED}
    try:
        name = hashlib.sha256(canonical([prompt, columns])).hexdigest()[:16]  # the verifier may read any column
    except (TypeError, ValueError) as error:
        raise checks.error(
            "completions",
            f"a column beside it that is not JSON ({error})",
            "texts, numbers, lists",
            "Remove the column.",
        ) from error
    written = steps if steps[-1].strip() else steps[:-1]  # an empty last step stands for the end
    return Solution(number, name, prompt, columns, steps, separator.join(written))


def _warn_of_columns(solutions: Sequence[Solution]) -> None:
    """Warn where solutions share no rollouts although their prompts are equal."""
    first: dict[str, dict[str, Any]] = {}
    differing: set[str] = set()
    for one in solutions:
        other = first.setdefault(prompt_id(one.prompt, one.columns), one.columns)
        differing |= {name for name in {*one.columns, *other} if one.columns.get(name) != other.get(name)}
    if differing:
        logger.warning(
            f"Solutions of one prompt have different values in {sorted(differing)}. They share no rollouts and no "
            "confidence, because the verifier may read these columns. Remove those that it does not need."
        )


def _sampled(
    sample: Sample, row: int, split: Callable[[str], list[str]], label_end: bool, right_above: float
) -> Solution:
    """The solution that the model generated."""
    text = text_of(sample.completion)
    steps = split(text)
    right = None if sample.score is None else sample.score > right_above
    omitted = "unscored_solution" if right is None else None
    if sample.finish_reason == "length":
        omitted = "truncated_solution"
    if not text.strip():
        omitted = "empty_solution"
    steps = [*steps, ""] if label_end else steps
    return Solution(
        row, sample.prompt_id, sample.prompt, sample.columns, steps, text, right, sampled=True, omitted=omitted
    )


def _splitter(segmenter: str | Segmenter, separator: str) -> Callable[[str], list[str]]:
    """Splits a text into steps that give the text again if they are joined by the separator."""
    if segmenter == "steps" and separator:
        spans: Segmenter = lambda text: split_steps(text, separator=separator)  # noqa: E731
    else:
        spans = segmenters.get(segmenter) if isinstance(segmenter, str) else segmenter

    def split(text: str) -> list[str]:
        pieces = [text[start:end] for start, end in spans(text)]
        if not all(piece.endswith(separator) for piece in pieces[:-1]):
            raise ValueError(
                f"The segmenter {segmenter!r} ends steps at places other than the separator {separator!r}, so the "
                "joined steps would be another text. Give step_separator='' here and in PRMConfig, or another "
                "segmenter."
            )
        return [piece.removesuffix(separator) if separator else piece for piece in pieces]

    return split


def _content_key(groups: Iterable[Sequence[Solution]]) -> str:
    """A hash of all solutions, with what the verifier sees."""
    digest = hashlib.sha256()
    for group in groups:
        for one in group:
            digest.update(
                canonical([one.prompt, one.columns, one.steps, one.text, one.right, one.sampled, one.omitted])
            )
    return digest.hexdigest()[:16]


def _finish(
    records: list[dict[str, Any]],
    solutions: list[Solution],
    settings: StepSettings,
    solution_tokens: int,
    folder: Path,
    seconds: float,
) -> StepLabels:
    """Write the rows and the report."""
    rows = []
    for record, solution in zip(records, solutions, strict=True):
        if record["labels"] is not None:
            template = {name: solution.columns[name] for name in TEMPLATE_COLUMNS if solution.columns.get(name)}
            rows.append(
                {"prompt": solution.prompt, "completions": record["steps"], "labels": record["labels"]} | template
            )
    path = folder / "rows.jsonl"
    report = _report(records, settings, solution_tokens) | {"seconds": round(seconds, 1), "path": str(path)}
    write_json(folder / "report.json", report)
    if not rows:
        raise ValueError(
            f"None of {len(records)} solutions got labels ({report['omitted']}). Correct the verifier or the "
            f"settings; what was generated is kept in {folder.parent.parent}."
        )
    for name, reason in (("prefixes_all_right", "right"), ("prefixes_all_wrong", "wrong")):
        if report["prefixes"] and report[name] == report["prefixes"]:
            logger.warning(
                f"All rollouts of all {report['prefixes']} prefixes are {reason}, so the labels say nothing about the "
                "steps. Check the verifier, right_above, and whether the problems fit the model."
            )
    if report["truncated_rollouts"]:
        logger.warning(
            f"{report['truncated_rollouts']} of {report['rollouts']} rollouts were cut at max_completion_length; the "
            "verifier judged what there was."
        )
    write_lines(path, rows, checksums=False)
    return StepLabels(dataset_of_rows(path), report, path)


def _report(records: list[dict[str, Any]], settings: StepSettings, solution_tokens: int) -> dict[str, Any]:
    cost: Counter[str] = Counter()
    for record in records:
        cost.update(record["cost"])
    labelled = [record for record in records if record["labels"] is not None]
    labels = [label for record in labelled for label in record["labels"] if label is not None]
    return {
        **asdict(settings),
        "solutions": len(records),
        "labelled": len(labelled),
        "omitted": dict(Counter(record["omitted"] for record in records if record["omitted"] is not None)),
        "right_solutions": sum(bool(record["right"]) for record in records),
        "steps": len(labels),
        "unlabelled_steps": sum(len(record["labels"]) for record in labelled) - len(labels),
        "mean_label": sum(labels) / len(labels) if labels else None,
        **cost,
        "solution_tokens": solution_tokens,
        "tokens": solution_tokens + cost["rollout_tokens"],
    }
