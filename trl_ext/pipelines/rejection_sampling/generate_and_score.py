"""The stages `generate` and `score`: shard after shard, without what is finished, here or in a process of their own.

A stage in its own process gives all of its memory back when it ends. `python -m
trl_ext.pipelines.rejection_sampling.generate_and_score FILE` is that
process. Several processes of `accelerate launch` divide the shards among them and meet in the folder, through no other
channel; so results do not depend on how many there are.
"""

import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import Generator, sample_seed
from trl_ext.pipelines.generation.records import Completion, Sample, text_of
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.rejection_sampling.prompts import PromptFile
from trl_ext.pipelines.rejection_sampling.scored import text_hash
from trl_ext.pipelines.reward_functions import RewardFunc, call_reward, is_by_name, load_reward
from trl_ext.pipelines.stages.store import ShardStore, StoreError, write_json


logger = logging.getLogger(__name__)

OwnProcess = Literal["auto", True, False]

# Memory that a stage in this process may leave allocated on a GPU.
MAX_LEFT_MIB = 500


class StageError(RuntimeError):
    """A stage failed; the message is its own."""


@dataclass
class Workers:
    """Which of several processes this is, as `accelerate launch` says in the environment."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> "Workers":
        """From the environment of this process."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _LAUNCHER.items()))

    def own(self, shards: Sequence[int]) -> list[int]:
        """The shards that this process makes."""
        return [shard for shard in shards if shard % self.count == self.rank]


_LAUNCHER = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@dataclass
class GenerateStage:
    """Completions of all prompts, a line of JSON a prompt: `prompt_id` and `samples`."""

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

    def spec(self) -> dict[str, Any] | None:
        """What another process needs to run it, or `None` if something is here in memory only."""
        if not isinstance(self.model, (str, Path)) or self.processing_class is not None:
            return None
        return {
            "prompts": asdict(self.prompts) | {"path": str(self.prompts.path)},
            "store": str(self.store.folder),
            "model": str(self.model),
            "backend": self.backend,
            "sampling": asdict(self.sampling),
            "num_generations": self.num_generations,
            "seed": self.seed,
            "backend_kwargs": self.backend_kwargs,
        }

    @classmethod
    def of(cls, spec: dict[str, Any]) -> "GenerateStage":
        """The inverse of `spec`."""
        prompts = _prompt_file(spec["prompts"])
        store = ShardStore.at(Path(spec["store"]), prompts.sizes)
        return cls(**spec | {"prompts": prompts, "store": store, "sampling": Sampling(**spec["sampling"])})

    def run(self, shards: list[int], progress: Callable[[int], Any]) -> None:
        """Make these shards. Prompts of each are taken from the file as they are needed."""
        generator = make_generator(
            self.model, self.backend, self.sampling, processing_class=self.processing_class, **self.backend_kwargs
        )
        # A server is given the next shard while the last answers of one come in.
        at_once = 1 if self.backend == "transformers" else 2
        pending: set[Future[int]] = set()
        with ThreadPoolExecutor(at_once) as pool:
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
        # In this process a shard has one seed, and is the unit of resuming; a server's requests have their own.
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
    The scores of one reward function, a line of JSON a prompt: `prompt_id`, `scores`, and what selecting needs to know
    beside them, so that it reads no texts: `text_hash`, `length`, `finished`.
    """

    name: ClassVar[str] = "score"
    prompts: PromptFile
    rollouts: ShardStore
    store: ShardStore
    reward: RewardFunc
    reward_name: str

    def spec(self) -> dict[str, Any] | None:
        """What another process needs to run it, or `None` if something is here in memory only."""
        if not is_by_name(self.reward):
            return None
        return {
            "prompts": asdict(self.prompts) | {"path": str(self.prompts.path)},
            "rollouts": str(self.rollouts.folder),
            "store": str(self.store.folder),
            "reward": str(self.reward),
            "reward_name": self.reward_name,
        }

    @classmethod
    def of(cls, spec: dict[str, Any]) -> "ScoreStage":
        """The inverse of `spec`."""
        prompts = _prompt_file(spec["prompts"])
        stores = {name: ShardStore.at(Path(spec[name]), prompts.sizes) for name in ("rollouts", "store")}
        return cls(**spec | {"prompts": prompts} | stores)

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
                f"A shard holds the prompt {line['prompt_id']} in place of {row['prompt_id']}. Delete it."
            )
        yield [sample_of(row, index, stored) for index, stored in enumerate(line["samples"])]


def sample_of(row: dict[str, Any], index: int, stored: dict[str, Any]) -> Sample:
    """One sample from the line of its prompt and what a backend returned."""
    return Sample.of(row["prompt_id"], index, row["prompt"], row["columns"], Completion(**stored))


def length_of(sample: Sample) -> int:
    """Tokens of a completion; words, of a server that does not give tokens."""
    return len(sample.token_ids) if sample.token_ids is not None else len(text_of(sample.completion).split())


def _shard_seed(seed: int, rows: Sequence[dict[str, Any]]) -> int:
    return sample_seed(seed, rows[0]["prompt_id"], -1)


def _prompt_file(spec: dict[str, Any]) -> PromptFile:
    return PromptFile(**spec | {"path": Path(spec["path"])})


# ------------------------------------------------------------------------------------------------------------- running
def run_stage(stage: Stage, own_process: OwnProcess = "auto", wait_for_others: bool = True) -> None:
    """
    Make what is missing of a stage's shards.

    Args:
        stage ([`GenerateStage`] or [`ScoreStage`]): what to run.
        own_process (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`): in a process of its own; `"auto"`:
            where there is a GPU and everything was given by name.
        wait_for_others (`bool`, *optional*, defaults to `True`): return when the shards of all processes are there.
    """
    workers = Workers.here()
    stage.store.create()
    missing = workers.own(stage.store.missing())
    if missing:
        spec = stage.spec()
        if own_process is True and spec is None:
            raise ValueError(
                f"The stage {stage.name} cannot have a process of its own: give the model and the reward functions by "
                "path or name, and no processing_class."
            )
        if spec is not None and (own_process is True or (own_process == "auto" and torch.cuda.is_available())):
            _run_in_own_process(stage.name, spec, missing, workers, stage.store.folder)
        else:
            before = _allocated()
            _run_here(stage, missing, workers)
            _check_given_back(stage.name, before)
    if wait_for_others and workers.count > 1:
        stage.store.wait()


def _run_here(stage: Stage, shards: list[int], workers: Workers) -> None:
    prompts = sum(stage.prompts.sizes[shard] for shard in shards)
    title = stage.name if isinstance(stage, GenerateStage) else f"{stage.name} ({stage.reward_name})"
    with hf_logging.tqdm(total=prompts, unit=" prompts", desc=title, disable=workers.rank > 0, file=sys.stderr) as bar:
        stage.run(shards, bar.update)


def _run_in_own_process(name: str, spec: dict[str, Any], shards: list[int], workers: Workers, folder: Path) -> None:
    path = folder / f"stage-{workers.rank}.json"
    error = path.with_suffix(".error")
    error.unlink(missing_ok=True)
    write_json(path, {"stage": name, "spec": spec, "shards": shards, "workers": asdict(workers)})
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in alone}
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        if workers.count > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[workers.local_rank]
    # The pipe closes when this process dies, however it dies, and the other one then ends too.
    process = subprocess.Popen([sys.executable, "-m", __name__, str(path)], stdin=subprocess.PIPE, env=environment)
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdin.close()
    if status:
        said = error.read_text(encoding="utf-8") if error.is_file() else f"Its exit status is {status}; see above."
        raise StageError(f"The stage {name} failed in its own process. {said}")
    path.unlink()


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
            f"The stage {name} left {after:.0f} MiB allocated on the GPU, and found {before:.0f} MiB. What it made is "
            "kept. Give the model and the reward functions by path, so that it gets a process of its own, and run the "
            "same again."
        )


def main(argv: list[str] | None = None) -> int:
    """Run the stage that a file describes. Returns the exit status."""
    (path,) = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    stage = {kind.name: kind for kind in (GenerateStage, ScoreStage)}[job["stage"]].of(job["spec"])
    try:
        _run_here(stage, job["shards"], Workers(**job["workers"]))
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        Path(path).with_suffix(".error").write_text(str(error), encoding="utf-8")
        logger.debug("The stage failed.", exc_info=True)
        return 1
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
