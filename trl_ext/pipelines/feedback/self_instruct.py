"""Self-instruct: a language model makes up tasks with inputs and outputs, starting from a few seed tasks.

Every round shows existing tasks to the model, asks for new instructions, drops those that the filters refuse,
and asks for an input and an output of the others. A round is one shard of a store, so a rerun continues after the last
whole round. This module knows the order of the steps. `instruct_prompts` knows the texts, `instruct_pool` the filters,
and `instruct_report` what the report says.
"""

import logging
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.instruct_pool import (
    KEYWORDS,
    Filters,
    Pool,
    Task,
    check_rapidfuzz,
    read_seeds,
    screen_instances,
)
from trl_ext.pipelines.feedback.instruct_prompts import STYLES, InstructPrompts, Style, read_templates
from trl_ext.pipelines.feedback.instruct_report import log_to_wandb, report_of, write_html
from trl_ext.pipelines.generation.backends import make_generator, model_of_backend
from trl_ext.pipelines.generation.generator import Generator, sample_seed
from trl_ext.pipelines.generation.records import Completion
from trl_ext.pipelines.generation.sampling import BACKENDS, Backend, Sampling
from trl_ext.pipelines.generation.transformers_backend import load_policy
from trl_ext.pipelines.stages.one_process import SERVERS, check_one_process
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows
from trl_ext.pipelines.stages.store import ShardStore, write_json, write_lines


logger = logging.getLogger(__name__)

FORMAT = 1  # format of all files; files of another format are in separate stores
SAMPLED = {"temperature": 0.7, "top_p": 0.5}  # how Wang et al. sample instructions
LABEL_TOKENS = 8  # longest answer to a yes-no question


def self_instruct(
    model: Any,
    seed_tasks: str | Path | Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    num_tasks: int = 100,
    *,
    style: Style = "completion",
    num_seed_demonstrations: int = 6,
    num_generated_demonstrations: int = 2,
    tasks_per_prompt: int = 8,
    prompts_per_round: int = 16,
    max_rounds: int | None = None,
    num_classification_examples: int = 12,
    num_other_examples: int = 19,
    num_instance_examples: int = 8,
    max_similarity: float = 0.7,
    min_words: int = 4,
    max_words: int = 150,
    keywords: Sequence[str] = KEYWORDS,
    template_dir: str | Path | None = None,
    seed: int = 0,
    report_to: str = "none",
    backend: Backend = "transformers",
    processing_class: PreTrainedTokenizerBase | None = None,
    backend_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> Dataset:
    """
    Let a model make up instructions with inputs and outputs, as rows for `SFTTrainer`.

    See *Self-Instruct: Aligning Language Models with Self-Generated Instructions* by Y. Wang et al.
    (https://huggingface.co/papers/2212.10560). The defaults are the paper's, where nothing else is said. A rerun with
    the same arguments continues after the last whole round; more `num_tasks` continue a finished run.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            The policy: folder or Hub id, full model or adapter, a model in memory, or a name on a server.
        seed_tasks (`str`, `Path` or iterable of `dict`):
            JSONL file or rows with `instruction`, `output`, and optionally `input` and `is_classification`.
        output_dir (`str` or `Path`):
            Gets the rows in `tasks.jsonl`, the report in `report.json` and `report.html`, and a folder in `rounds` for
            each configuration.
        num_tasks (`int`, *optional*, defaults to `100`): tasks to make.
        style (`str`, *optional*, defaults to `"completion"`):
            `"completion"`: prompts are texts that a base model continues, as in the paper, and rows are texts.
            `"chat"`: prompts are messages to an instruct model, and rows are messages.
        num_seed_demonstrations, num_generated_demonstrations (`int`, *optional*, default to `6` and `2`):
            Tasks that a prompt for new instructions shows. Seeds stand in while there are too few generated ones.
        tasks_per_prompt (`int`, *optional*, defaults to `8`): instructions that a prompt asks for.
        prompts_per_round (`int`, *optional*, defaults to `16`):
            Prompts of a round, ours. An interruption loses at most one round; tasks of a round are shown from the next
            round on.
        max_rounds (`int`, *optional*):
            Most rounds, of earlier runs too. Defaults to ten times the rounds that would be enough if every
            instruction were kept. A run that ends there gives a warning and returns what it has.
        num_classification_examples, num_other_examples (`int`, *optional*, default to `12` and `19`):
            Most seeds that the question "is this a classification task?" shows. It is not asked if no seed is one.
        num_instance_examples (`int`, *optional*, defaults to `8`):
            Most seeds that the question for an input and an output shows; ours.
        max_similarity (`float`, *optional*, defaults to `0.7`):
            Instructions whose ROUGE-L to any other one reaches this are dropped.
        min_words, max_words (`int`, *optional*, default to `4` and `150`): length of an instruction in words.
        keywords (sequence of `str`, *optional*): instructions with one of these words are dropped.
        template_dir (`str` or `Path`, *optional*): a folder with Jinja templates in place of those of the package.
        seed (`int`, *optional*, defaults to `0`): seed of demonstrations, examples and sampling.
        report_to (`str`, *optional*, defaults to `"none"`):
            `"wandb"` puts the counts and a table of rows on a Weights & Biases run.
        backend, processing_class, backend_kwargs:
            See [`~trl_ext.pipelines.generation.backends.make_generator`], which receives them.
        sampling:
            How instructions are sampled: `max_completion_length`, `temperature` (0.7), `top_p` (0.5), ...; see
            [`~trl_ext.pipelines.generation.sampling.Sampling`]. Labels, inputs and outputs are decoded greedily.

    Returns:
        `Dataset`: a row for each input and output, with `prompt` and `completion` (for `SFTTrainer`), `instruction`,
        `input`, `output`, `is_classification`, `task` (from 0) and `similarity` (its largest ROUGE-L).

    Raises:
        ImportError: rapidfuzz (the extra `self-instruct`) is not installed.
        ValueError: an argument is out of its range, there are fewer seeds than demonstrations, or a template lacks a
            field. [`DataError`]: a seed cannot be used, or a prompt is too long for the model.
        [`GenerationError`]: the backend fails.

    Example:

    ```python
    rows = self_instruct("Qwen/Qwen3-0.6B-Base", "docs/data/self_instruct/seed_tasks.jsonl", "outputs/tasks")
    SFTTrainer("Qwen/Qwen3-0.6B-Base", train_dataset=rows.select_columns(["prompt", "completion"])).train()
    ```
    """
    check_rapidfuzz()
    check_one_process("self-instruct", SERVERS)
    counts = {
        "num_tasks": (num_tasks, 1),
        "num_seed_demonstrations": (num_seed_demonstrations, 1),
        "num_generated_demonstrations": (num_generated_demonstrations, 0),
        "tasks_per_prompt": (tasks_per_prompt, 1),
        "prompts_per_round": (prompts_per_round, 1),
        "max_rounds": (1 if max_rounds is None else max_rounds, 1),
        "num_classification_examples": (num_classification_examples, 1),
        "num_other_examples": (num_other_examples, 1),
        "num_instance_examples": (num_instance_examples, 0),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value}; needed: {least} or more.")
    chosen = (("style", style, STYLES), ("backend", backend, BACKENDS), ("report_to", report_to, ("none", "wandb")))
    for name, value, known in chosen:
        if value not in known:
            raise ValueError(f"{name}={value!r}; needed: one of {', '.join(known)}.")
    seeds = read_seeds(seed_tasks)
    shown = num_seed_demonstrations + num_generated_demonstrations
    if len(seeds) < shown:
        raise ValueError(
            f"There are {len(seeds)} seed tasks, and each prompt shows {shown}. Add seeds, or lower "
            "num_seed_demonstrations or num_generated_demonstrations."
        )
    settings = Sampling.of(**(SAMPLED | sampling))
    filters = Filters(max_similarity, min_words, max_words, tuple(keywords))
    templates = read_templates(style, template_dir)
    examples = (num_classification_examples, num_other_examples, num_instance_examples)
    prompts = InstructPrompts(style, templates, seeds, seed, *examples)
    options = dict(backend_kwargs or {})
    manifest = {
        "format": FORMAT,
        "model": model_of_backend(model, backend, options.get("model_init_kwargs") or {}, processing_class),
        "backend": backend,
        "sampling": asdict(settings),
        "seeds": [asdict(task) for task in seeds],
        "templates": {name: template.text for name, template in templates.items()},
        "style": style,
        "demonstrations": [num_seed_demonstrations, num_generated_demonstrations],
        "tasks_per_prompt": tasks_per_prompt,
        "prompts_per_round": prompts_per_round,
        "examples": list(examples),
        "filters": asdict(filters),
        "seed": seed,
    }
    if max_rounds is None:
        max_rounds = 10 * math.ceil(num_tasks / (tasks_per_prompt * prompts_per_round))
    store = ShardStore(Path(output_dir) / "rounds", manifest, [prompts_per_round] * max_rounds)
    store.create()
    writers = _Writers(model, backend, settings, prompts, (shown, tasks_per_prompt), processing_class, options)
    run = _Run(Pool(seeds, filters), prompts, writers, store, num_seed_demonstrations, shown, tasks_per_prompt, seed)
    return run.until(num_tasks, Path(output_dir), report_to)


class _Writers:
    """The generators of the steps, which share one model. They are made when the first round needs them."""

    def __init__(
        self,
        model: Any,
        backend: Backend,
        sampling: Sampling,
        prompts: InstructPrompts,
        sizes: tuple[int, int],
        processing_class: PreTrainedTokenizerBase | None,
        options: dict[str, Any],
    ):
        self._model, self._backend, self._options = model, backend, options
        self._processing_class = processing_class
        greedy = replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=None)
        short = replace(greedy, max_completion_length=LABEL_TOKENS)
        steps = {"instruction": sampling, "classification": short, "instances": greedy}
        self._sampling = {
            name: replace(one, stop=[*(sampling.stop or []), *prompts.stops(name, *sizes)] or None)
            for name, one in steps.items()
        }
        self._made: dict[str, Generator] = {}

    def __call__(self, step: str, prompts: Sequence[Any], seed: int) -> list[Completion]:
        """One completion for each prompt of a step."""
        if not prompts:
            return []
        if not self._made:
            self._load()
        try:
            return [one for (one,) in self._made[step].generate(prompts, 1, seed)]
        except DataError as error:  # it names the number of a prompt, which the user did not give
            raise ValueError(f"A prompt of the step {step!r} cannot be used: {error.found}. {error.fix}") from error

    def _load(self) -> None:
        if self._backend == "transformers" and isinstance(self._model, (str, Path)):
            init = self._options.get("model_init_kwargs") or {}
            if self._processing_class is None:
                self._processing_class = AutoTokenizer.from_pretrained(
                    self._model, revision=init.get("revision"), trust_remote_code=init.get("trust_remote_code", False)
                )
            self._model = load_policy(self._model, init)
        for name, sampling in self._sampling.items():
            self._made[name] = make_generator(
                self._model, self._backend, sampling, processing_class=self._processing_class, **self._options
            )


@dataclass
class _Run:
    pool: Pool
    prompts: InstructPrompts
    writers: _Writers
    store: ShardStore
    seeds_shown: int
    shown: int
    asked: int
    seed: int

    def until(self, num_tasks: int, output_dir: Path, report_to: str) -> Dataset:
        """Make the missing rounds, and write the rows of the first `num_tasks` tasks and the report."""
        records: list[dict[str, Any]] = []
        rounds = 0
        with hf_logging.tqdm(total=num_tasks, unit=" tasks", desc="self-instruct", file=sys.stderr) as bar:
            while len(self.pool.generated) < num_tasks and rounds < len(self.store.sizes):
                if not self.store.is_complete(rounds):
                    self.store.write(rounds, self._round(rounds))
                before = len(self.pool.generated)
                for record in self.store.read(rounds):
                    records.append(record)
                    for task in kept_tasks(record):
                        self.pool.add(task)
                bar.update(len(self.pool.generated) - before)
                rounds += 1
        if len(self.pool.generated) < num_tasks:
            logger.warning(
                f"{rounds} rounds (max_rounds) gave {len(self.pool.generated)} of {num_tasks} tasks. The report says "
                "why others were dropped. Raise max_rounds to go on, or change the model, the seeds or the filters."
            )
        rows = list(rows_of(records, num_tasks, self.prompts.style))
        path = output_dir / "tasks.jsonl"
        write_lines(path, rows, checksums=False)
        report = report_of(records, rows, num_tasks, [task.instruction for task in self.pool.seeds])
        write_json(output_dir / "report.json", report)
        write_html(output_dir / "report.html", report)
        if report_to == "wandb":
            log_to_wandb(report, rows)
        logger.info(f"{report['tasks']} tasks with {report['rows']} rows are in {path}, and report.html beside them.")
        return dataset_of_rows(path) if rows else Dataset.from_list([])

    def _round(self, number: int) -> list[dict[str, Any]]:
        """The records of a round: one for each prompt, with all of its candidates and what became of them."""
        seed = sample_seed(self.seed, "self-instruct", number)
        drawn = self._demonstrations(number)
        prompts = [self.prompts.instruction(texts, self.asked) for texts in drawn]
        records = []
        for texts, answer in zip(drawn, self.writers("instruction", prompts, seed), strict=True):
            cut = answer.finish_reason == "length"
            found, spoilt = self.prompts.read_instructions(answer.text, cut, self.asked, len(texts))
            candidates = [{"instruction": text} for text in found]
            records.append(
                {"demonstrations": texts, "answer": answer.text, "unread": dict(spoilt), "candidates": candidates}
            )
        candidates = [candidate for record in records for candidate in record["candidates"]]
        screened = self.pool.screen([candidate["instruction"] for candidate in candidates])
        for candidate, (reason, similarity) in zip(candidates, screened, strict=True):
            candidate |= {"dropped": reason, "similarity": similarity}
        self._classify([candidate for candidate in candidates if candidate["dropped"] is None], seed)
        self._instantiate([candidate for candidate in candidates if candidate["dropped"] is None], seed)
        return records

    def _demonstrations(self, number: int) -> list[list[str]]:
        """For each prompt of a round the instructions that it shows, in the order in which it shows them."""
        generator, seeds, generated = random.Random(f"{self.seed} {number}"), self.pool.seeds, self.pool.generated
        drawn = []
        for _ in range(self.store.sizes[number]):
            new = generator.sample(generated, min(self.shown - self.seeds_shown, len(generated)))
            tasks = [*generator.sample(seeds, self.shown - len(new)), *new]
            generator.shuffle(tasks)
            drawn.append([task.instruction for task in tasks])
        return drawn

    def _classify(self, candidates: list[dict[str, Any]], seed: int) -> None:
        """Fill in `is_classification`; where the answer is neither yes nor no the candidate is dropped."""
        if not any(task.is_classification for task in self.pool.seeds):
            for candidate in candidates:
                candidate["is_classification"] = False
            return
        prompts = [self.prompts.classification(candidate["instruction"]) for candidate in candidates]
        for candidate, answer in zip(candidates, self.writers("classification", prompts, seed), strict=True):
            candidate["is_classification"] = self.prompts.read_classification(answer.text)
            if candidate["is_classification"] is None:
                candidate |= {"dropped": "no_label", "answer": answer.text}

    def _instantiate(self, candidates: list[dict[str, Any]], seed: int) -> None:
        """Fill in `instances`; a candidate without one is dropped."""
        prompts = [self.prompts.instances(one["instruction"], one["is_classification"]) for one in candidates]
        for candidate, answer in zip(candidates, self.writers("instances", prompts, seed), strict=True):
            cut = answer.finish_reason == "length"
            found, reason = self.prompts.read_instances(answer.text, candidate["is_classification"], cut)
            kept, dropped = screen_instances(candidate["instruction"], found)
            candidate |= {"answer": answer.text, "instances": kept, "dropped_instances": dict(dropped)}
            if not kept:
                candidate["dropped"] = reason or max(dropped, key=lambda name: (dropped[name], name))


def kept_tasks(record: Mapping[str, Any]) -> Iterator[Task]:
    """The tasks of a record that were kept."""
    for one in record["candidates"]:
        if one["dropped"] is None:
            yield Task(one["instruction"], one["is_classification"], one["instances"])


def rows_of(records: Sequence[Mapping[str, Any]], num_tasks: int, style: Style) -> Iterator[dict[str, Any]]:
    """The rows of the first `num_tasks` tasks that were kept."""
    number = 0
    for record in records:
        for one in record["candidates"]:
            if number == num_tasks:
                return
            if one["dropped"] is not None:
                continue
            for instance in one["instances"]:
                question = "\n\n".join(filter(None, (one["instruction"], instance["input"])))
                prompt, completion = f"{question}\n\n", instance["output"]
                if style == "chat":
                    prompt = [{"role": "user", "content": question}]
                    completion = [{"role": "assistant", "content": completion}]
                yield {
                    "prompt": prompt,
                    "completion": completion,
                    "instruction": one["instruction"],
                    **instance,
                    "is_classification": one["is_classification"],
                    "task": number,
                    "similarity": one["similarity"],
                }
            number += 1
