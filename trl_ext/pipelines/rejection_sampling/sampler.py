"""Rejection sampling: generate N completions for each prompt, score them, keep the best. A rerun resumes a run.

This module knows the order of the stages and the cache keys of their results. `generate_and_score` makes completions
and scores, `sample_table` reads them as arrays, `selection` selects, and `pipelines.stages` keeps the files.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.logs import follow_transformers
from trl_ext.pipelines.generation.backends import model_of_backend
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.generation.sampling import BACKENDS, Backend, Sampling
from trl_ext.pipelines.rejection_sampling.diagnostics import round_metrics
from trl_ext.pipelines.rejection_sampling.generate_and_score import (
    GenerateStage,
    ScoreStage,
    Workers,
    run_stage,
)
from trl_ext.pipelines.rejection_sampling.prompts import write_prompts
from trl_ext.pipelines.rejection_sampling.sample_table import StoredSamples
from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection
from trl_ext.pipelines.rejection_sampling.selection import check_selection, select
from trl_ext.pipelines.reward_functions import (
    RewardFunc,
    as_list,
    check_rewards,
    identity_in_run,
    warn_of_unseen,
    weights_by_name,
)
from trl_ext.pipelines.stages.cache_key import key_of
from trl_ext.pipelines.stages.parts import Part, take_shards
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows
from trl_ext.pipelines.stages.runner import Isolate, check_isolate
from trl_ext.pipelines.stages.store import ShardStore, StoreError, write_json, write_lines
from trl_ext.pipelines.stages.values import plain
from trl_ext.pipelines.user_functions import callable_name


logger = logging.getLogger(__name__)

FORMAT = 1  # format of all files; files of another format are in separate stores


@dataclass
class Selected:
    """
    The result of a selection.

    Args:
        dataset (`Dataset`): the selected rows, see [`rejection_sample`].
        scored ([`~trl_ext.pipelines.rejection_sampling.scored.Scored`]): all samples as arrays.
        selection ([`~trl_ext.pipelines.rejection_sampling.scored.Selection`]): which of them are in the data set.
        report (`dict`): counts, metrics and folders, as in `report.json` beside the rows.
        path (`Path`): the JSON lines of the rows.
    """

    dataset: Dataset
    scored: Scored
    selection: Selection
    report: dict[str, Any]
    path: Path


def check_request(num_generations: int, backend: str, sampling: Sampling) -> None:
    """Raise `ValueError` for settings that make generation impossible."""
    if num_generations < 1:
        raise ValueError(f"num_generations={num_generations}; needed: a number of completions >= 1.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; needed: one of {', '.join(BACKENDS)}.")
    if sampling.temperature == 0 and num_generations > 1:
        raise ValueError(
            f"temperature=0 gives {num_generations} times the same completion. Raise temperature, or set "
            "num_generations=1."
        )


class RejectionSampler:
    """
    The stages of rejection sampling, one by one. [`rejection_sample`] runs them all and explains the arguments.

    ```python
    >>> sampler = RejectionSampler("Qwen/Qwen3-0.6B", "outputs/rankings", prompts, "outputs/samples")
    >>> sampler.generate()
    >>> sampler.score()
    >>> best = sampler.select("top_per_prompt").dataset
    >>> control = sampler.select("random_per_prompt").dataset
    ```

    With `shard="i/n"` [`generate`] and [`score`] make one of n parts of the shards, so that n machines share a run: in
    one folder, or each in its own, whose results [`merge`] brings together.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
        dataset: Dataset | IterableDataset,
        output_dir: str | Path,
        num_generations: int = 8,
        seed: int = 0,
        backend: Backend = "transformers",
        *,
        reward_weights: Sequence[float] | None = None,
        shard_size: int = 64,
        processing_class: PreTrainedTokenizerBase | None = None,
        generation_batch_size: int = 32,
        model_init_kwargs: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        isolate: Isolate = "auto",
        own_process: bool | Literal["auto"] | None = None,
        shard: str | Part | None = None,
        **sampling: Any,
    ):
        if own_process is not None:
            isolate = {True: "always", False: "never"}.get(own_process, "auto")
            logger.warning(f"own_process={own_process!r} is deprecated. Use isolate={isolate!r}.")
        follow_transformers()
        check_isolate(isolate)
        self.sampling = Sampling.of(**sampling)
        check_request(num_generations, backend, self.sampling)
        if Workers.here().count > 1:
            PartialState()  # all processes must create it together; later only some may need it for a scorer
        self.output_dir = Path(output_dir)
        self.num_generations = num_generations
        self._isolate = isolate
        self._part = Part.parse(shard)
        self._rewards = [] if reward_funcs is None else as_list(reward_funcs)
        self.reward_weights = weights_by_name(self._rewards, reward_weights)
        self.reward_names = list(self.reward_weights)
        self._prompts = write_prompts(dataset, self.output_dir / "prompts", shard_size)
        if self._rewards:  # checked before anything is generated
            columns = (row["columns"] for _, rows in self._prompts.shards([0]) for row in rows)
            check_rewards(self._rewards, {name for item in columns for name in item})
        in_process = backend == "transformers"
        kwargs = {"generation_batch_size": generation_batch_size} if in_process else dict(server or {})
        if in_process and server:
            raise ValueError(f"server={server} is for the backends 'vllm' and 'openai'.")
        if backend != "openai":
            kwargs["model_init_kwargs"] = plain(model_init_kwargs or {})
        manifest = {
            "format": FORMAT,
            "backend": backend,
            "model": model_of_backend(model, backend, model_init_kwargs or {}, processing_class),
            "sampling": asdict(self.sampling),
            "num_generations": num_generations,
            "seed": seed,
            "prompts": self._prompts.ids_key,
            "shard_size": shard_size,
        }
        if in_process:  # the batch size changes the completions
            manifest["generation_batch_size"] = generation_batch_size
        self._generate = GenerateStage(
            self._prompts,
            ShardStore(self.output_dir / "rollouts", manifest, self._prompts.sizes),
            model,
            backend,
            self.sampling,
            num_generations,
            seed,
            kwargs,
            processing_class,
        )

    @cached_property
    def _score(self) -> list[ScoreStage]:
        if not self._rewards:
            raise ValueError("There is no reward function to score with. Give reward_funcs.")
        stages = []
        for name, spec in zip(self.reward_names, self._rewards, strict=True):
            identity = identity_in_run(spec)
            if "run" in identity and Workers.here().count > 1:
                raise ValueError("Several processes cannot share an ensemble in memory. Save it and give its path.")
            manifest = {
                "format": FORMAT,
                "rollouts": self._generate.store.folder.name,
                "prompts": self._prompts.content_key,
                "reward": identity,
            }
            store = ShardStore(self.output_dir / "scores" / name, manifest, self._prompts.sizes)
            if len(store.missing()) < len(store.sizes):
                warn_of_unseen(identity, f"The stored scores of {name} are", f"delete {store.folder}")
            stages.append(ScoreStage(self._prompts, self._generate.store, store, spec, name))
        return stages

    def generate(self) -> None:
        """Generate the completions that are missing, with `shard` those of this part."""
        run_stage(self._generate, self._isolate, part=self._part)

    def score(self) -> None:
        """Add the missing scores. Raises [`~trl_ext.pipelines.stages.store.StoreError`] if completions are missing."""
        self._need(self._generate.store, "generate", self._part)
        for stage in self._score:
            run_stage(stage, self._isolate, part=self._part)

    def merge(self, folders: Sequence[str | Path], scores: bool = True) -> None:
        """
        Copy the completions, and with `scores` their scores, that other machines made in folders of their own.

        Args:
            folders (sequence of `str` or `Path`):
                The `output_dir` of each part. All must have been made with the arguments of this sampler.
            scores (`bool`, *optional*, defaults to `True`): whether the parts have scores of all reward functions.

        Raises:
            [`~trl_ext.pipelines.stages.store.StoreError`]: a folder has other settings, or shards are missing from all
                folders or differ between two. What was copied is kept, so the merge can be run again.
        """
        roots = [Path(folder) for folder in folders]
        absent = [str(root) for root in roots if not root.is_dir()]
        if absent:
            raise FileNotFoundError(f"{', '.join(absent)}: no such folder. Needed: the output_dir of each part.")
        take_shards(self._generate.store, [root / "rollouts" for root in roots], "completions")
        if scores:
            for name, stage in zip(self.reward_names, self._score, strict=True):
                take_shards(stage.store, [root / "scores" / name for root in roots], f"scores of {name}")

    def _need(self, store: ShardStore, stage: str, part: Part | None = None) -> None:
        missing = store.missing((part or Part()).shards(len(store.sizes)))
        if not missing:
            return
        near = store.nearest()
        other = f" There is {near[0].name}, made with {near[1]}." if near and not store.folder.is_dir() else ""
        raise StoreError(
            f"{len(missing)} of {len(store.sizes)} shards are missing from {store.folder}.{other} Run the stage "
            f"{stage!r} with the same arguments first."
        )

    # ------------------------------------------------------------------------------------------------------ selecting
    def scored(self) -> Scored:
        """All samples as arrays. It reads scores and no texts."""
        return self._stored().table().scored

    def samples(self) -> Iterator[list[Sample]]:
        """The samples of each prompt with their scores, in the order of the prompts. They are read one by one."""
        yield from self._stored().samples()

    def _stored(self) -> StoredSamples:
        self._need(self._generate.store, "generate")
        for stage in self._score:
            self._need(stage.store, "score")
        scores = dict(zip(self.reward_names, (stage.store for stage in self._score), strict=True))
        return StoredSamples(
            self._prompts,
            self._generate.store,
            scores,
            self.reward_weights,
            self.num_generations,
            self.sampling,
        )

    def select(
        self,
        selection: str = "top_per_prompt",
        selection_kwargs: dict[str, Any] | None = None,
        drop_truncated: bool = False,
    ) -> Selected:
        """Select from the scored samples, and write the rows. See [`select`]."""
        stored = self._stored()
        table = stored.table()
        scored = table.scored
        unscorable = dict(zip(self.reward_names, np.isnan(table.scores).sum(1).tolist(), strict=True))
        kwargs = selection_kwargs or {}
        chosen = select(scored, selection, drop_truncated=drop_truncated, **kwargs)
        name = selection if isinstance(selection, str) else callable_name(selection)
        manifest = {
            "selection": name,
            "options": plain(kwargs),
            "drop_truncated": drop_truncated,
            "reward_weights": self.reward_weights,
            "scores": [stage.store.folder.name for stage in self._score],
        }
        folder = self.output_dir / "selected" / f"{name}-{key_of(manifest)}"
        path = folder / "rows.jsonl"
        counts = write_lines(path, stored.rows(table, chosen), checksums=False)
        report = {
            **manifest,
            "counts": chosen.counts,
            "rows": counts,
            "unscorable": unscorable,
            "metrics": round_metrics(scored, chosen),
            "rollouts": str(self._generate.store.folder),
            "prompts": self._prompts.count,
            "num_generations": self.num_generations,
        }
        write_json(folder / "report.json", report)
        if not counts:
            raise ValueError(
                f"The selection {name!r} kept none of {len(scored)} samples ({chosen.counts}). Choose less strict "
                f"options; the samples and their scores are kept in {self.output_dir}."
            )
        return Selected(dataset_of_rows(path), scored, chosen, report, path)


def rejection_sample(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    num_generations: int = 8,
    selection: str = "top_per_prompt",
    seed: int = 0,
    backend: Backend = "transformers",
    *,
    selection_kwargs: dict[str, Any] | None = None,
    drop_truncated: bool = False,
    **options: Any,
) -> Dataset:
    """
    Generate `num_generations` completions of each prompt, score them, and keep the best.

    `output_dir` holds all results in shards, and a shard is either complete or missing. You can kill the run at any
    moment and run the same command again: it continues, and no sample is missing or stored twice. With the backend
    `"transformers"` the selection equals that of an uninterrupted run. All reward functions and selections share the
    completions: a rerun with another reward function only scores, and one with another selection only selects.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            The policy: folder or Hub id, full model or adapter; in memory only with `"transformers"`. For `"openai"`
            its name on the server.
        reward_funcs (`str`, `Path`, model, `Callable`, or list of these):
            TRL reward functions: a reward model by its path or in memory, a [`~trl_ext.RewardScorer`], a function, one
            of `trl.rewards` by name, or a function by name (`package.module.function` or `file.py:function`). A
            function returns `None` for a sample that it cannot score, and these are counted. A sample that no function
            scores is never selected.
        dataset (`Dataset` or `IterableDataset`):
            Rows with a `prompt`, text or messages. The other columns go to the reward functions, and into the selected
            rows, except those that a trainer would take for its data (`label`, `text`, `chosen` ...). Rows with the
            same prompt and different other columns get separate completions.
        output_dir (`str` or `Path`):
            Folder of all results.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt.
        selection (`str` or `Callable`, *optional*, defaults to `"top_per_prompt"`):
            A selector, see `trl_ext.pipelines.rejection_sampling.selection`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generation.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` generates in this process (or several, with `accelerate launch`), `"vllm"` on a server of
            `vllm serve`, and `"openai"` on any OpenAI-compatible server.
        selection_kwargs (`dict`, *optional*):
            Options of the selector.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Never select a completion that was cut at `max_completion_length`.
        options:
            `reward_weights` (one number per function; 1 by default); `shard_size` (prompts that are generated and
            stored at a time, 64); `processing_class`; `generation_batch_size` (completions in a batch in this process,
            32); `model_init_kwargs`; `server`, a `dict` of `server_base_url`, `server_timeout`, `max_concurrency`,
            `max_retries`, `api_key_variable` (see [`make_generator`]); `isolate` (whether each stage runs in a
            separate process, which frees all its memory: `"always"`, `"never"`, or `"auto"`, the default: on a GPU, if
            models and functions are given by path or name); and the fields of [`Sampling`]:
            `max_completion_length`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `stop`,
            `generation_kwargs`, `chat_template`, `chat_template_kwargs`, `system_prompt`, `few_shot`.

    Returns:
        `Dataset` in the order of the prompts. For `SFTTrainer`: `prompt`, `completion`, `score`, `scores` by function,
        `sample_index`, `finish_reason`. For `DPOTrainer` (selectors of pairs): `prompt`, `chosen`, `rejected`,
        `chosen_rating`, `rejected_rating`, `score_margin`. For `RewardTrainer` (selectors of groups): `prompt`,
        `completions`, `ratings`. All with `prompt_id` and the data set's other columns. Chats also have the run's
        `chat_template_kwargs`, if there are any; values in the row's column of this name take precedence.

    Raises:
        [`DataError`]: a row cannot be used; names row and column.
        [`GenerationError`], [`RewardError`], [`StoreError`]: a backend, a reward function or the disk fails. Finished
            shards are kept, and the same call continues from there.

    Example:

    ```python
    >>> best = rejection_sample("Qwen/Qwen3-0.6B", "outputs/rankings", prompts, "outputs/samples", num_generations=16)
    >>> trl.SFTTrainer("Qwen/Qwen3-0.6B", train_dataset=best).train()
    ```
    """
    if options.get("shard") is not None:
        raise ValueError(
            f"shard={options['shard']!r}: a selection needs the samples of all shards. Make a part with "
            "RejectionSampler(..., shard=...), its generate() and its score()."
        )
    check_selection(selection, selection_kwargs)  # checked before anything is generated
    sampler = RejectionSampler(
        model, reward_funcs, dataset, output_dir, num_generations, seed=seed, backend=backend, **options
    )
    sampler.generate()
    sampler.score()
    return sampler.select(selection, selection_kwargs, drop_truncated).dataset
