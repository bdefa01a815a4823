"""The stages `generate` and `score` of rejection sampling: each makes the shards that are missing from its store.

Several processes of `accelerate launch` divide the shards and exchange them only through the folder, so results do not
depend on the number of processes. This module knows shards of prompts, generators and reward functions. It does not
know how a stage runs in a separate process (`stages.runner`) or which samples are selected.
"""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import Generator, calls_together, sample_seed
from trl_ext.pipelines.generation.records import Completion, Sample, text_of
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.rejection_sampling.prompts import PromptFile
from trl_ext.pipelines.rejection_sampling.scored import text_hash
from trl_ext.pipelines.reward_functions import RewardFunc, call_reward, is_by_name, load_reward
from trl_ext.pipelines.stages.parts import Part
from trl_ext.pipelines.stages.runner import Isolate, StageError, run_job
from trl_ext.pipelines.stages.store import ShardStore, StoreError


logger = logging.getLogger(__name__)

# GPU memory that a stage in this process may leave allocated.
MAX_LEFT_MIB = 500


@dataclass
class Workers:
    """The index and number of processes, which `accelerate launch` sets in the environment."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> "Workers":
        """Read them from the environment of this process."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _LAUNCHER.items()))

    def own(self, shards: range) -> range:
        """The shards of these that this process makes."""
        return shards[self.rank :: self.count]


_LAUNCHER = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@dataclass
class GenerateStage:
    """Generates the completions of all prompts: a line of JSON for each prompt, with `prompt_id` and `samples`."""

    name: ClassVar[str] = "generate"
    prompts: PromptFile
    store: ShardStore
    model: Any
    backend: str
    sampling: Sampling
    num_generations: int
    seed: int
    backend_kwargs: dict[str, Any]
    processing_class: PreTrainedTokenizerBase | None = None

    @property
    def portable(self) -> bool:
        """Whether another process can run it: the model has a path, and no object exists only in memory."""
        return isinstance(self.model, (str, Path)) and self.processing_class is None

    def run(self, shards: list[int], progress: Callable[[int], Any]) -> None:
        """Make these shards. The prompts of a shard are read when it is made."""
        generator = make_generator(
            self.model, self.backend, self.sampling, processing_class=self.processing_class, **self.backend_kwargs
        )
        # A server gets the next shard while it still answers the last requests of the previous one.
        at_once = 1 if self.backend == "transformers" else 2
        pending: set[Future[int]] = set()
        with ThreadPoolExecutor(at_once) as pool, calls_together(generator):
            try:
                for shard, rows in self.prompts.shards(shards):
                    if len(pending) == at_once:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for future in done:
                            progress(future.result())
                    pending.add(pool.submit(self._make, generator, shard, rows))
                for future in pending:
                    progress(future.result())
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    def _make(self, generator: Generator, shard: int, rows: list[dict[str, Any]]) -> int:
        # In this process a shard has one seed, so it is the unit of resuming. With a server each request has a seed.
        seed = self.seed if self.backend != "transformers" else _shard_seed(self.seed, rows)
        try:
            found = generator.generate(
                [row["prompt"] for row in rows], self.num_generations, seed, [row["columns"] for row in rows]
            )
        except DataError as error:
            error = DataError(error.found, error.needed, error.fix, rows[error.row]["row"], error.column, "prompt")
            raise error from None
        self.store.write(
            shard,
            (
                {"prompt_id": row["prompt_id"], "samples": [asdict(completion) for completion in completions]}
                for row, completions in zip(rows, found, strict=True)
            ),
        )
        return len(rows)


@dataclass
class ScoreStage:
    """
    Scores all completions with one reward function: a line of JSON for each prompt, with `prompt_id` and `scores`.
    Selecting does not read texts, so the line also holds `text_hash`, `length` and `finished` of each completion.
    """

    name: ClassVar[str] = "score"
    prompts: PromptFile
    rollouts: ShardStore
    store: ShardStore
    reward: RewardFunc
    reward_name: str

    @property
    def portable(self) -> bool:
        """Whether another process can run it: the reward function has a name or a path."""
        return is_by_name(self.reward)

    def run(self, shards: list[int], progress: Callable[[int], Any]) -> None:
        """Make these shards."""
        function = load_reward(self.reward)
        for shard, rows in self.prompts.shards(shards):
            groups = list(read_samples(rows, self.rollouts.read(shard)))
            scores = iter(call_reward(function, self.reward_name, [sample for group in groups for sample in group]))
            self.store.write(
                shard,
                (
                    {
                        "prompt_id": group[0].prompt_id,
                        "scores": [next(scores) for _ in group],
                        "text_hash": [text_hash(text_of(sample.completion)) for sample in group],
                        "length": [length_of(sample) for sample in group],
                        "finished": [sample.finish_reason == "stop" for sample in group],
                    }
                    for group in groups
                ),
            )
            progress(len(rows))


Stage = GenerateStage | ScoreStage


def read_samples(rows: Sequence[dict[str, Any]], lines: Iterator[dict[str, Any]]) -> Iterator[list[Sample]]:
    """The samples of each prompt of a shard."""
    for row, line in zip(rows, lines, strict=True):
        if row["prompt_id"] != line["prompt_id"]:
            raise StoreError(
                f"A shard holds the prompt {line['prompt_id']} instead of {row['prompt_id']}. Delete the shard, and "
                "run the same command again."
            )
        yield [sample_of(row, index, stored) for index, stored in enumerate(line["samples"])]


def sample_of(row: dict[str, Any], index: int, stored: dict[str, Any]) -> Sample:
    """Build one sample from the prompt's row and the stored completion."""
    return Sample.of(row["prompt_id"], index, row["prompt"], row["columns"], Completion(**stored))


def length_of(sample: Sample) -> int:
    """Number of tokens of a completion, or of words if a server does not return tokens."""
    return len(sample.token_ids) if sample.token_ids is not None else len(text_of(sample.completion).split())


def _shard_seed(seed: int, rows: Sequence[dict[str, Any]]) -> int:
    return sample_seed(seed, rows[0]["prompt_id"], -1)


def run_stage(stage: Stage, isolate: Isolate = "auto", wait_for_others: bool = True, part: Part | None = None) -> None:
    """
    Make the missing shards of a stage, or of one part of it.

    Args:
        stage ([`GenerateStage`] or [`ScoreStage`]): the stage to run.
        isolate (`str`, *optional*, defaults to `"auto"`):
            Whether the stage runs in a separate process; see [`~trl_ext.pipelines.stages.runner.run_job`].
        wait_for_others (`bool`, *optional*, defaults to `True`): return only when all processes have made their
            shards.
        part ([`~trl_ext.pipelines.stages.parts.Part`], *optional*): the part that this machine makes.
    """
    workers = Workers.here()
    shards = (part or Part()).shards(len(stage.store.sizes))
    stage.store.create()
    missing = stage.store.missing(workers.own(shards))
    if missing:
        before = _allocated()
        run_job(
            stage.name,
            partial(_make, stage, missing, workers.rank == 0),
            isolate,
            portable=stage.portable,
            environment=_environment(workers),
        )
        _check_given_back(stage.name, before)
    if wait_for_others and workers.count > 1:
        stage.store.wait(shards)


def _make(stage: Stage, shards: list[int], shown: bool, on_progress: Callable[[float], None]) -> None:
    """The job of a stage. It shows a progress bar, in this process or in a separate one."""
    prompts = sum(stage.prompts.sizes[shard] for shard in shards)
    title = stage.name if isinstance(stage, GenerateStage) else f"{stage.name} ({stage.reward_name})"
    with hf_logging.tqdm(total=prompts, unit=" prompts", desc=title, disable=not shown, file=sys.stderr) as bar:
        stage.run(shards, bar.update)


def _environment(workers: Workers) -> dict[str, str]:
    """The environment of a stage's separate process: one of the GPUs that this process sees, and no launcher."""
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in alone}
    if torch.cuda.is_available() and workers.count > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[workers.local_rank]
    return environment


def _allocated() -> float:
    if not torch.cuda.is_available():
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**20


def _check_given_back(name: str, before: float) -> None:
    after = _allocated()
    if after - before > MAX_LEFT_MIB:
        raise StageError(
            f"The stage {name} left {after:.0f} MiB allocated on the GPU; there were {before:.0f} MiB before it. Its "
            "results are kept. Give the model and the reward functions by path, so that the stage runs in a separate "
            "process, and run the same command again."
        )
