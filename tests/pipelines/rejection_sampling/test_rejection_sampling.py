"""Rejection sampling as a whole: what comes out, what is done again, failures, kills, processes, the command."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pipelines.http_server import good, serving
from tests.program import TORCHRUN
from tests.tiny import save_tiny_model
from trl_ext import RejectionSamplingConfig, RewardEnsemble, RewardScorer, rejection_sample
from trl_ext.cli.main import main as trl_ext
from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.generator import GenerationError
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
from trl_ext.pipelines.rejection_sampling.scored import Selection
from trl_ext.pipelines.reward_functions import RewardError, call_reward, load_reward, reward_identity, reward_names
from trl_ext.pipelines.stages.store import ShardStore, StoreError


ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"prompt": f"Question: tell me about {word}. Answer:", "answer": word} for word in ["snow", "tests", "apples"]]
ROWS += [{"prompt": f"Count to {n}:", "answer": str(n)} for n in range(4)]
CALLS: list[int] = []


def length(prompts, completions, answer, **columns):
    """Characters of a completion; notes how many it was asked for."""
    CALLS.append(len(completions))
    assert len(prompts) == len(completions) == len(answer) == len(columns["completion_ids"])
    return [float(len(text)) for text in completions]


def vowels(completions, **columns):
    """The share of vowels, or nothing where there is no letter."""
    return [sum(c in "aeiou" for c in text) / len(text) if text.strip() else None for text in completions]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "llama")


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    """A reward model with random weights."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base"), "llama", seed=1)
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    return folder


OPTIONS = {"num_generations": 3, "shard_size": 2, "generation_batch_size": 4, "max_completion_length": 6}


def sampler(tiny, folder, rewards=length, **options):
    return RejectionSampler(tiny, rewards, Dataset.from_list(ROWS), folder, **OPTIONS | options)


def store_of(sampler):
    """The shards of completions that a sampler generates."""
    return sampler._generate.store


def sample(tiny, folder, rewards=length, **options):
    return rejection_sample(tiny, rewards, Dataset.from_list(ROWS), folder, **OPTIONS | options)


# What comes out


def test_the_best_of_each_prompt_ready_for_sft(tiny, tmp_path):
    best = sample(tiny, tmp_path)
    assert best["prompt"] == [row["prompt"] for row in ROWS] and best["answer"] == [row["answer"] for row in ROWS]
    groups = list(sampler(tiny, tmp_path).samples())
    assert [len(group) for group in groups] == [3] * 7
    for row, group in zip(best, groups, strict=True):
        top = max(group, key=lambda item: (item.score, -item.sample_index))
        assert (row["completion"], row["score"], row["sample_index"]) == (top.completion, top.score, top.sample_index)
        assert row["score"] == row["scores"]["length"] == len(row["completion"])
        assert all(item.token_ids and item.seed and item.latency and item.logprob is None for item in group)
    # as a user would go on
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(tmp_path / "sft", max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    assert SFTTrainer(str(tiny), args=args, train_dataset=best).train().global_step == 1


def test_only_prompts_that_something_is_selected_of_are_read(tiny, tmp_path, monkeypatch):
    sample(tiny, tmp_path)
    made = sampler(tiny, tmp_path)
    known = {(item.prompt_id, item.sample_index): item for group in made.samples() for item in group}
    read = []
    of_store = ShardStore.read
    monkeypatch.setattr(
        ShardStore, "read", lambda store, shard, places=None: read.append(places) or of_store(store, shard, places)
    )
    best = made.select("top_k_overall", {"k": 4}).dataset
    assert len(best) == 4 and min(best["score"]) >= sorted(item.score for item in known.values())[-5]
    for row in best:
        item = known[row["prompt_id"], row["sample_index"]]
        assert (row["completion"], row["score"]) == (item.completion, item.score)
    places = [row for row in read if row is not None]
    assert sum(map(len, places)) == len(set(best["prompt_id"])) < len(ROWS)


def test_pairs_and_groups_and_chats(tiny, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["answer"]}], "answer": row["answer"]} for row in ROWS]
    made = RejectionSampler(tiny, chat_length, Dataset.from_list(rows), tmp_path, **OPTIONS)
    made.generate()
    made.score()
    pairs = made.select("best_worst_pairs").dataset
    for row in pairs:
        assert row["chosen"][0]["role"] == "assistant" and row["prompt"][0]["role"] == "user"
        assert row["chosen_rating"] == len(row["chosen"][0]["content"]) > row["rejected_rating"]
        assert row["score_margin"] == row["chosen_rating"] - row["rejected_rating"]
    groups = made.select("ranked_groups").dataset
    for row in groups:
        assert row["ratings"] == sorted(row["ratings"], reverse=True)
        assert row["ratings"] == [len(item[0]["content"]) for item in row["completions"]]
    from trl_ext.data.formats import prepare_groups  # the data check of RewardTrainer

    assert prepare_groups is not None


def chat_length(completions, **columns):
    """Characters of an answer."""
    return [float(len(messages[0]["content"])) for messages in completions]


def test_texts_that_look_like_dates_stay_texts(tiny, tmp_path):
    rows = [row | {"answer": "2020-01-01"} for row in ROWS]
    assert set(rejection_sample(tiny, length, rows, tmp_path, **OPTIONS)["answer"]) == {"2020-01-01"}


def test_a_reward_function_gets_every_column_and_the_rows_keep_those_that_no_trainer_reads(tiny, tmp_path):
    names = ["label", "labels", "text", "messages", "chosen", "score", "margin", "answer"]
    rows = [row | {name: f"{name} {at}" for name in names} for at, row in enumerate(ROWS)]

    def reads(prompts, completions, label, labels, text, messages, chosen, score, margin, answer, **columns):
        given = zip(label, labels, text, messages, chosen, score, margin, answer, strict=True)
        assert all(len({value.split()[1] for value in values}) == 1 for values in given)
        return [float(value.split()[1]) for value in label]

    best = rejection_sample(tiny, reads, rows, tmp_path, **OPTIONS)
    assert best["score"] == [float(at) for at in range(7)] and best["answer"] == [row["answer"] for row in rows]
    assert not {"label", "labels", "text", "messages", "chosen", "margin"} & set(best.column_names)


def test_what_a_reward_function_reads_belongs_to_its_scores(tiny, tmp_path, caplog):
    words, connection = {"wanted": ["a"]}, threading.Lock()

    def wanted(completions, **columns):
        calls.append(len(completions))
        with connection:
            return [float(any(word in text for word in words["wanted"])) for text in completions]

    calls: list[int] = []
    sample(tiny, tmp_path, wanted)
    sample(tiny, tmp_path, wanted)
    assert len(calls) == 4
    assert "The stored scores of wanted are used again. The function reads connection (_thread.lock)" in caplog.text
    words["wanted"].append("e")
    sample(tiny, tmp_path, wanted)
    assert len(calls) == 8


def test_a_wrong_selection_fails_before_anything_is_generated(tiny, tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'top_per_prompt'"):
        sample(tiny, tmp_path, selection="top_per_promt")
    with pytest.raises(ValueError, match="'top_k_overall' cannot be called: missing a required argument: 'k'"):
        sample(tiny, tmp_path, selection="top_k_overall")
    assert not list(tmp_path.iterdir())


class Last:
    def __call__(self, samples, keep=2):
        return Selection(np.arange(len(samples))[-keep:])


@pytest.mark.parametrize("selection", [Last(), partial(Last.__call__, None, keep=3)], ids=["object", "partial"])
def test_a_selector_need_not_have_a_name(tiny, tmp_path, selection):
    found = sample(tiny, tmp_path, selection=selection)
    assert len(found) == (2 if isinstance(selection, Last) else 3)
    assert next((tmp_path / "selected").iterdir()).name.startswith(type(selection).__name__)
    config = RejectionSamplingConfig(output_dir=str(tmp_path), selection=selection, use_cpu=True, bf16=False)
    assert config.to_dict()["selection"] == type(selection).__name__


def test_own_process_is_still_taken_and_names_its_successor(tiny, tmp_path, caplog):
    sample(tiny, tmp_path, own_process=False)
    assert "own_process=False is deprecated. Use isolate='never'" in caplog.text
    with pytest.raises(ValueError, match="isolate='sometimes' is not known"):
        sample(tiny, tmp_path, isolate="sometimes")


def test_weights_and_none_as_in_grpo(tiny, tmp_path):
    def never(completions, **columns):
        return [None] * len(completions)

    made = sampler(tiny, tmp_path, [length, vowels, never], reward_weights=[0.5, -2.0, 1.0])
    made.generate()
    made.score()
    selected = made.select("top_per_prompt", {"n": 2})
    assert selected.report["unscorable"]["never"] == 21 and selected.report["metrics"]["reward"]
    for row in selected.dataset:
        share = row["scores"]["vowels"]
        assert row["score"] == pytest.approx(0.5 * row["scores"]["length"] - (0 if share is None else 2 * share))
        assert row["scores"]["never"] is None
    nothing = sampler(tiny, tmp_path, never)
    nothing.score()
    with pytest.raises(ValueError, match=r"kept none of 21 samples.*'unscorable': 21"):
        nothing.select()


def test_a_reward_model_by_path_scores_as_the_scorer_does(tiny, scalar, tmp_path):
    best = sample(tiny, tmp_path, str(scalar), selection="random_per_prompt", selection_kwargs={"n": 3})
    expected = RewardScorer(scalar)(best["prompt"], best["completion"])
    assert best["score"] == pytest.approx(expected, abs=1e-5)


def test_models_in_memory(tiny, scalar, tmp_path):
    from transformers import AutoModelForSequenceClassification

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    reward = AutoModelForSequenceClassification.from_pretrained(scalar)
    best = sample(policy, tmp_path / "memory", reward, processing_class=tokenizer)
    paths = sample(tiny, tmp_path / "paths", str(scalar))
    assert best["completion"] == paths["completion"]
    with torch.no_grad():
        policy.lm_head.weight += 1
    again = sampler(policy, tmp_path / "memory", reward, processing_class=tokenizer)
    with pytest.raises(StoreError, match="content="):
        again.score()


def test_a_model_in_memory_with_another_tokenizer_in_its_folder_has_a_store_of_its_own(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    stores = [store_of(sampler(policy, tmp_path)).folder for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert stores[0] == stores[1] != store_of(sampler(policy, tmp_path)).folder


# What is done again


def test_nothing_is_done_twice_and_everything_is_shared(tiny, tmp_path):
    CALLS.clear()
    first = sample(tiny, tmp_path)
    assert CALLS == [6, 6, 6, 3]  # shards of two prompts, and a rest
    assert sample(tiny, tmp_path)["completion"] == first["completion"] and len(CALLS) == 4
    sample(tiny, tmp_path, [length, vowels], selection="top_k_overall", selection_kwargs={"k": 2})
    assert len(CALLS) == 4 and len(list((tmp_path / "rollouts").iterdir())) == 1
    sample(tiny, tmp_path, temperature=0.5)
    assert len(CALLS) == 8 and len(list((tmp_path / "rollouts").iterdir())) == 2
    other = [row | {"answer": "x"} for row in ROWS]
    rejection_sample(tiny, length, other, tmp_path, **OPTIONS)
    assert len(CALLS) == 12 and len(list((tmp_path / "rollouts").iterdir())) == 2  # only the scores saw the answer


def test_a_policy_whose_files_changed_has_a_store_of_its_own(tiny, tmp_path):
    policy = shutil.copytree(tiny, tmp_path / "policy")
    torch.save(AutoModelForCausalLM.from_pretrained(tiny).state_dict(), policy / "pytorch_model.bin")
    stores = []
    for name in ("pytorch_model.bin", "tokenizer.json", "chat_template.jinja"):
        stores.append(store_of(sampler(policy, tmp_path / "out")).folder)
        with open(policy / name, "ab") as file:
            file.write(b" ")
    stores.append(store_of(sampler(policy, tmp_path / "out")).folder)
    assert len(set(stores)) == 4
    assert store_of(sampler(shutil.copytree(policy, tmp_path / "moved"), tmp_path / "out")).folder == stores[3]


def test_a_damaged_shard_is_made_again_and_is_the_same(tiny, tmp_path):
    made = sampler(tiny, tmp_path)
    made.generate()
    path = store_of(made).path(1)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(StoreError, match=r"1 of 4 shards are missing.*stage 'generate'"):
        sampler(tiny, tmp_path).score()
    sampler(tiny, tmp_path).generate()
    assert texts_of(path.read_bytes()) == texts_of(content)


def texts_of(content: bytes) -> list:
    return [[item["token_ids"] for item in json.loads(line)["samples"]] for line in content.splitlines()]


def test_scores_of_other_texts_are_refused(tiny, tmp_path):
    sample(tiny, tmp_path)
    made = sampler(tiny, tmp_path)
    store = store_of(made)
    lines = list(store.read(0))
    lines[0]["samples"][0]["text"] += " changed"
    store.write(0, lines)
    with pytest.raises(StoreError, match=r"scores of other texts.*Delete the scores"):
        made.select()


def test_scores_of_a_lambda_are_used_again_and_those_of_an_ensemble_in_memory_are_not(tiny, scalar, tmp_path, caplog):
    calls = []
    for _ in range(2):
        sample(tiny, tmp_path, lambda completions, **_: calls.append(1) or [1.0] * len(completions))
    assert len(calls) == 4
    sample(tiny, tmp_path, lambda completions, **_: calls.append(1) or [2.0] * len(completions))
    assert len(calls) == 8 and "a rerun cannot use" not in caplog.text
    ensemble = RewardEnsemble([scalar, length])
    for _ in range(2):
        sample(tiny, tmp_path, ensemble)
    assert len(list((tmp_path / "scores" / "RewardEnsemble").iterdir())) == 2
    assert "an ensemble in memory, so a rerun cannot use its scores" in caplog.text


def test_a_function_by_its_name_is_what_stands_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identities = []
    for number in range(2):
        Path(f"own_rewards_{number}.py").write_text(f"def score(completions, **columns):\n    return [{number}] * 3\n")
        identities.append(reward_identity(f"own_rewards_{number}.score"))
    assert identities[0]["name"] == identities[1]["name"] == "score"
    assert identities[0]["source"] != identities[1]["source"]


def test_the_choices_of_a_scorer_belong_to_it(scalar):
    made = [RewardScorer(scalar), RewardScorer(scalar), RewardScorer(scalar, max_length=9), RewardScorer(scalar)]
    made[3].processing_class.chat_template = "{{ messages }}"
    identities = [reward_identity(scorer) for scorer in made]
    assert identities[0] == identities[1]
    assert identities[2] != identities[0] != identities[3] != identities[2]


class Above:
    def __init__(self, bar):
        self.bar, self._calls = bar, 0

    def __call__(self, completions, **columns):
        self._calls += 1
        return [float(len(text) > self.bar) for text in completions]

    rate = __call__


def above(bar):
    def rate(completions, **columns):
        return [float(len(text) > bar) for text in completions]

    return rate


@pytest.mark.parametrize("make", [Above, lambda bar: Above(bar).rate, above, lambda bar: partial(vowels, bar=bar)])
def test_what_a_function_holds_belongs_to_it(make):
    assert reward_identity(make(3)) == reward_identity(make(3)) != reward_identity(make(4))


def test_a_changed_argument_of_a_scorer_scores_anew(tiny, tmp_path):
    low, high = Above(0), Above(1000)
    sample(tiny, tmp_path, low)
    assert set(sample(tiny, tmp_path, high)["score"]) == {0.0}
    assert set(sample(tiny, tmp_path, low)["score"]) == {1.0} and low._calls == high._calls == 4


# Failures


def item(index=0):
    return Sample("id", index, "p", "c", [1], "stop", None, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda **_: 1 / 0, "raised ZeroDivisionError: division by zero.*kept"),
        (lambda **_: [1.0], "gave 1 scores for 2 completions"),
        (lambda **_: [1.0, float("nan")], "gave nan for completion 1 of the prompt id"),
        (lambda **_: [1.0, float("inf")], "gave inf"),
        (lambda **_: [1.0, "good"], "gave a str"),
        (lambda **_: None, "raised TypeError"),
    ],
)
def test_a_reward_function_that_misbehaves_is_named(scores, message):
    with pytest.raises(RewardError, match=f"'wrong'.*{message}|{message}"):
        call_reward(scores, "wrong", [item(0), item(1)])


def test_an_async_function_and_numbers_of_any_kind():
    async def later(prompts, completions, trainer_state, log_metric, **columns):
        log_metric("x", 1.0)
        return [torch.tensor(0.5), True]

    async def in_a_notebook():
        return call_reward(later, "later", [item(0), item(1)])

    assert call_reward(later, "later", [item(0), item(1)]) == asyncio.run(in_a_notebook()) == [0.5, 1.0]


def test_columns_that_only_some_prompts_have():
    def notes(answer, completions, **columns):
        seen.append(answer)
        return [0.0] * len(completions)

    seen = []
    other = item(1)
    other.columns = {"answer": "4"}
    call_reward(notes, "notes", [item(0), other])
    assert seen == [[None, "4"]]


def test_names_of_reward_functions(scalar, monkeypatch):
    from trl.rewards import think_format_reward

    assert load_reward("think_format_reward") is think_format_reward
    assert reward_names(["think_format_reward", scalar, vowels]) == ["think_format_reward", scalar.name, "vowels"]
    with pytest.raises(ValueError, match="2 reward functions are called 'vowels'"):
        reward_names([vowels, vowels])
    with pytest.raises(ValueError, match=r"'no\.such\.function' cannot be imported"):
        load_reward("no.such.function")
    with pytest.raises(FileNotFoundError, match="not_there"):
        load_reward("./not_there")


def test_a_failure_in_the_middle_keeps_what_was_done(tiny, tmp_path):
    def fails_late(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 3 and switch.exists():
            raise ConnectionError("the judge is away")
        return [1.0] * len(completions)

    calls, switch = [], tmp_path / "broken"
    switch.touch()
    with pytest.raises(RewardError, match="'fails_late' raised ConnectionError: the judge is away"):
        sample(tiny, tmp_path, fails_late)
    switch.unlink()
    assert len(sample(tiny, tmp_path, fails_late)) == 7
    assert calls == [6, 6, 6, 6, 3]  # the two that were done are not done again


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_generations": 0}, ValueError, "num_generations=0"),
        ({"temperature": 0}, ValueError, "temperature=0 gives 3 times the same completion"),
        ({"backend": "sglang"}, ValueError, "backend='sglang'"),
        ({"server": {"server_base_url": "x"}}, ValueError, "is for the backends"),
        ({"reward_weights": [1, 2]}, ValueError, "reward_weights has 2 numbers; needed: 1"),
        ({"shard_size": 0}, ValueError, "shard_size=0"),
        ({"generation_batch_size": 0}, ValueError, "generation_batch_size=0"),
        ({"top_kk": 1}, TypeError, "Did you mean 'top_k'"),
        ({"isolate": "always", "rewards": vowels}, ValueError, "cannot run in a separate process"),
        ({"max_completion_length": 600}, DataError, "prompt data, row 0, column 'prompt'"),
    ],
)
def test_arguments_that_cannot_be_meant(tiny, tmp_path, change, error, message):
    if change.get("isolate"):
        tiny = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(error, match=message):
        sample(tiny, tmp_path, **change)


def test_a_server_that_dies_in_the_middle_and_comes_back(tmp_path, short_pauses):
    with serving(good()) as server:
        arguments = {"backend": "openai", "server": {"server_base_url": server.url, "max_retries": 1}}
        arguments["server"] |= {"max_concurrency": 1, "server_timeout": 5.0}
        whole = server.answer
        server.answer = lambda n, *rest: whole(n, *rest) if n < 13 else (500, b"out of memory", {})
        with pytest.raises(GenerationError, match="HTTP 500: out of memory.*what was stored is kept"):
            sample("served", tmp_path, text_length, **{k: v for k, v in OPTIONS.items() if k[:3] != "gen"} | arguments)
        first = len(server.requests)
        server.answer = whole
        arguments["server"]["max_concurrency"] = 4  # where and how it is asked makes no other store
        best = sample("served", tmp_path, text_length, **OPTIONS | arguments)
        assert len(best) == 7 and len(server.requests) - first < 21


def test_an_interrupted_run_asks_a_server_for_nothing_more(tmp_path):
    def interrupt(prompts):
        raise KeyboardInterrupt

    with serving(good()) as server:
        settings = {"server_base_url": server.url, "max_concurrency": 1}
        made = sampler("served", tmp_path, None, num_generations=20, backend="openai", server=settings)
        made._generate.store.create()
        with pytest.raises(KeyboardInterrupt):
            made._generate.run([0, 1, 2, 3], interrupt)
        asked = len(server.requests)
    assert 40 <= asked <= 50  # the shard that is done, and of the next one the requests that were under way


def text_length(completions, **columns):
    """Characters."""
    return [float(len(text)) for text in completions]


# Kills and processes


def program(tmp_path, tiny, kills, seed=0, timeout=280):
    command = [
        sys.executable,
        "-m",
        "tests.pipelines.rejection_sampling.sampling_program",
        str(tmp_path),
        str(tiny),
        str(kills),
        str(seed),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_five_kills_and_two_processes(tiny, tmp_path):
    seen = program(tmp_path, tiny, 5)
    assert seen["kills"] == 5 and seen["finished"] >= 1
    assert seen["several"] == {"equal": True, "rows": 23}


@pytest.mark.slow
def test_sixty_kills_over_all_stages(tiny, tmp_path):
    seen = program(tmp_path, tiny, 60, seed=1, timeout=1500)
    assert seen["kills"] == 60 and set(seen["stages"]) == {"generate", "score", "select"}
    assert seen["finished"] >= 2


def test_a_stage_in_its_own_process_gives_the_same(tiny, tmp_path):
    apart, here = sampler(tiny, tmp_path / "apart", isolate="always"), sampler(tiny, tmp_path / "here")
    apart.generate()
    here.generate()
    files = [store_of(made).path(shard).read_bytes() for made in (apart, here) for shard in range(4)]
    assert [texts_of(content) for content in files[:4]] == [texts_of(content) for content in files[4:]]
    assert not list(store_of(apart).folder.glob("stage*"))


@pytest.mark.slow
def test_a_stage_in_its_own_process_dies_with_its_parent_and_says_what_failed(tiny, scalar, tmp_path):
    code = (
        "import sys; from trl_ext import rejection_sample\n"
        f"rejection_sample({str(tiny)!r}, {str(scalar)!r}, {ROWS!r}, {str(tmp_path / 'apart')!r}, isolate='always',"
        f" **{OPTIONS!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    jobs = tmp_path / "apart"
    deadline = time.monotonic() + 120
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not children.read_text() or not list(jobs.glob("rollouts/*/manifest.json")):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    child = int(children.read_text().split()[0])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the stage lived on"
        time.sleep(0.1)
    apart = sample(tiny, jobs, str(scalar), isolate="always")
    assert apart.to_list() == sample(tiny, tmp_path / "here", str(scalar)).to_list()
    with pytest.raises(
        DataError, match=r"(?s)prompt of .* 512 positions.*stage generate failed in a separate process"
    ):
        sample(tiny, jobs, str(scalar), isolate="always", max_completion_length=600)


# The command


def command(tiny, folder, rows, *more):
    arguments = ["rejection-sample", "--model_name_or_path", str(tiny), "--dataset_name", str(rows)]
    arguments += ["--output_dir", str(folder), "--num_generations", "3", "--max_completion_length", "6"]
    return trl_ext([*arguments, "--reward_funcs", f"{__name__}.vowels", *more])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.slow
def test_the_command_on_two_processes_of_a_launcher(tiny, tmp_path, rows):
    launch = [*TORCHRUN, "-m", "trl_ext.cli.rejection_sample"]
    arguments = ["--model_name_or_path", str(tiny), "--dataset_name", str(rows), "--shard_size", "2"]
    arguments += ["--num_generations", "3", "--max_completion_length", "6", "--reward_funcs", f"{__name__}.vowels"]
    done = subprocess.run(
        [*launch, *arguments, "--output_dir", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"path": ') == 1, done.stdout  # one report from both
    assert command(tiny, tmp_path / "one", rows, "--shard_size", "2") == 0
    two, one = ([*(tmp_path / name).glob("selected/*/rows.jsonl")] for name in ("two", "one"))
    assert two[0].read_text() == one[0].read_text()


def test_a_begun_answer_and_its_continuation_are_one_turn(tiny, tmp_path):
    """In the rows, and in what SFT trains on: one assistant turn, not a second one after an end of turn."""
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}]
    rows = rejection_sample(
        tiny, lambda completions, **_: [1.0] * len(completions), Dataset.from_list([{"prompt": begun}]), tmp_path,
        num_generations=2, max_completion_length=6,
    )  # fmt: skip
    (row,) = rows
    assert row["prompt"] == begun[:1]
    (message,) = row["completion"]
    assert message["role"] == "assistant" and message["content"].startswith("good") and len(message["content"]) > 4
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    text = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
        row["prompt"] + row["completion"], chat_template=template, tokenize=False
    )
    assert text.count("<assistant>") == 1 and text.startswith("<user>hello</s><assistant>good")
