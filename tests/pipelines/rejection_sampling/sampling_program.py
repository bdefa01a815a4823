"""A run of rejection sampling that is killed at random moments and started again, in processes forked from this one.

`python -m tests.pipelines.rejection_sampling.sampling_program FOLDER MODEL KILLS SEED` prints what was seen as JSON.
Everything heavy is
imported once, here, so that a kill falls into a stage rather than into an import.
"""

import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler


PROMPTS = [{"prompt": f"Question: how many apples are left when {n} of 12 are eaten? Answer:"} for n in range(23)]


def slow_length(prompts, completions, **columns):
    """Characters of a completion; slow enough to be killed in."""
    time.sleep(0.05)
    return [None if len(text) % 5 == 0 else float(len(text)) for text in completions]


def run(model: str, folder: Path) -> list[dict]:
    """All stages; the selected rows."""
    sampler = RejectionSampler(
        model, slow_length, PROMPTS, folder, 3, shard_size=3, generation_batch_size=7, max_completion_length=8
    )
    sampler.generate()
    sampler.score()
    check(sampler)
    return sampler.select().dataset.to_list()


def check(sampler: RejectionSampler) -> None:
    """Every (prompt, sample) is there once."""
    seen = Counter((sample.prompt_id, sample.sample_index) for group in sampler.samples() for sample in group)
    assert len(seen) == 3 * len(PROMPTS) and set(seen.values()) == {1}


SHARDS = 8  # of each kind


def shards(folder: Path) -> int:
    """Shards of completions and of scores that are there."""
    return sum(1 for _ in folder.rglob("shard-*.jsonl"))


def stage_of(folder: Path) -> str:
    """Where a run was when it died."""
    return ("generate", "score", "select")[shards(folder) // SHARDS]


def forked(work) -> int:
    """The process of a function call."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - progress bars
        work()
        status = 0
    finally:
        os._exit(status)


def write(model: str, folder: Path, result: Path) -> None:
    result.write_text(json.dumps(run(model, folder)))


def killed_runs(root: Path, model: str, kills: int, seed: int) -> dict:
    """Kill until it was done `kills` times; whenever a run comes to its end compare it, and begin anew."""
    rng = random.Random(seed)
    result = root / "result.json"
    assert os.waitpid(forked(lambda: write(model, root / "reference", result)), 0)[1] == 0
    reference = json.loads(result.read_text())
    assert len(reference) > 15
    folder, stages, finished = root / "killed", Counter(), 0
    while stages.total() < kills or not finished:
        result.unlink(missing_ok=True)
        pid = forked(lambda: write(model, folder, result))
        # A kill comes a moment after so many further shards are there, or while it selects, where some runs may end.
        wanted = min(2 * SHARDS, shards(folder) + rng.randint(1, 3))
        if stages.total() == kills or (shards(folder) == 2 * SHARDS and rng.random() < 0.4):
            wanted = math.inf
        moment, deadline = rng.uniform(0.0, 0.05), math.inf
        gone = os.waitpid(pid, os.WNOHANG)
        while gone == (0, 0) and time.monotonic() < deadline:
            if deadline == math.inf and shards(folder) >= wanted:
                deadline = time.monotonic() + moment
            time.sleep(0.002)
            gone = os.waitpid(pid, os.WNOHANG)
        if gone != (0, 0):  # it ended by itself
            assert gone[1] == 0 and json.loads(result.read_text()) == reference
            finished += 1
            shutil.rmtree(folder)
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        stages[stage_of(folder)] += 1
    return {"kills": stages.total(), "finished": finished, "stages": dict(stages)}


def several(root: Path, model: str) -> dict:
    """The same from one process and from two that share the shards."""
    alone, both = root / "alone.json", [root / "rank0.json", root / "rank1.json"]
    assert os.waitpid(forked(lambda: write(model, root / "one", alone)), 0)[1] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        write(model, root / "two", both[number])

    pids = [forked(lambda number=number: rank(number)) for number in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    rows = [json.loads(path.read_text()) for path in (alone, *both)]
    return {"equal": rows[0] == rows[1] == rows[2], "rows": len(rows[0])}


def main() -> None:
    root, model, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    print(json.dumps(killed_runs(root, model, kills, seed) | {"several": several(root, model)}))


if __name__ == "__main__":
    main()
