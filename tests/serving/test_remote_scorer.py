"""Scores through a server are those of the model in memory, and a server that gives others is refused."""

import json
import logging
import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.pipelines.http_server import serving
from tests.serving.served_folders import save_base, save_reward
from tests.serving.stub_vllm import outputs_of, pooling_server
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.cli import score as score_command
from trl_ext.data.validation import DataError
from trl_ext.models.ensemble.ensemble_files import EnsembleFile, write_ensemble
from trl_ext.models.sidecar import read_sidecar
from trl_ext.pipelines.reward_functions import check_rewards, load_reward, reward_identity, reward_name
from trl_ext.serving import pooling
from trl_ext.serving.server_pool import ServerError, ServerPool


PROMPTS = ["2 + 2 =", "Name a colour.", "2 + 2 =", "", "Say nothing."]
COMPLETIONS = [" 4", " Blue, or red, or something in between them.", " five", "x", ""]
STEPS = [["One.", "Two."], ["Only one step here"], [], ["a", "", "b"], ["x"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved reward models by name; do not write to them."""
    root = tmp_path_factory.mktemp("served")
    base = save_base(root / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    options = {
        "full": dict(seed=1),
        "other": dict(seed=2),
        "scaled": dict(seed=3, lora=lora, normalizer={"mean": 0.25, "std": 0.5}),
        "bf16": dict(seed=6, dtype="bfloat16"),
        "orm": dict(seed=4, kind="outcome", lora=lora),
        "prm": dict(seed=5, kind="process", lora=lora),
    }
    return {name: save_reward(base, root / name, **given) for name, given in options.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: outputs_of(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["full", "scaled"])
def test_scores_are_those_of_the_model_in_memory(folders, models, name):
    local = RewardScorer(folders[name])
    with pooling_server({"full": models["full"], "scaled": models["scaled"]}) as server:
        remote = RewardScorer(server.url + "/v1", folders[name], batch_size=2, name="far")
        found = remote(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(local(PROMPTS, COMPLETIONS), abs=1e-5)
        assert remote.raw.scores(PROMPTS, COMPLETIONS, {}) == pytest.approx(
            local.raw.scores(PROMPTS, COMPLETIONS, {}), abs=1e-5
        )
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        assert remote(chats, COMPLETIONS) == pytest.approx(local(chats, COMPLETIONS), abs=1e-5)
    assert remote.__name__ == "far" and remote.normalizer == local.normalizer
    bodies = server.bodies
    assert {body["model"] for body in bodies} == {name}  # found by the name of its folder
    assert all(body["use_activation"] is False for body in bodies)
    assert [len(body["input"]) for body in bodies[:4]] == [2, 2, 2, 2]  # the probes, in requests of batch_size
    assert len(set(found)) == len(found)


def test_members_and_functions_named_by_a_string(folders, models, tmp_path):
    text = "{}?model=helpful#{}"
    with pooling_server({"helpful": models["full"], "other": models["other"]}) as server:
        named = text.format(server.url, folders["full"])
        ensemble = RewardEnsemble([named, folders["other"], RewardScorer(server.url, folders["other"], name="same")])
        assert ensemble.members == ["full", "other", "same"] and len(ensemble.models) == 1
        (first, second, third), *_ = ensemble.score_members(PROMPTS, COMPLETIONS)
        assert first == pytest.approx(RewardScorer(folders["full"])(PROMPTS, COMPLETIONS)[0], abs=1e-5)
        assert second == pytest.approx(third, abs=1e-5)

        check_rewards([named])
        assert reward_name(named) == "full"
        assert load_reward(named)(PROMPTS, COMPLETIONS)[1] == pytest.approx(
            RewardScorer(folders["full"])(PROMPTS, COMPLETIONS)[1], abs=1e-5
        )
        # the server gives what the folder says, so that scores are kept under the folder's content
        assert reward_identity(named) == reward_identity(str(folders["full"]))
        assert reward_identity(RewardScorer(named)) is not None

        rows, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
            )
        )
        assert score_command.main(["--model", named, "--input", str(rows), "--output", str(out)]) == 0
    scored = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    assert scored == pytest.approx(RewardScorer(folders["full"])(PROMPTS, COMPLETIONS), abs=1e-5)


def test_the_members_of_an_ensemble_folder_are_looked_up_by_their_names(folders, models, tmp_path):
    for place, name in enumerate(("full", "other")):
        shutil.copytree(folders[name], tmp_path / f"member-{place}")
    write_ensemble(tmp_path, EnsembleFile(members=["member-0", "member-1"], reduce="min"))
    with pooling_server({"member-0": models["full"], "member-1": models["other"]}) as server:
        remote = RewardEnsemble(f"{server.url}#{tmp_path}")
        found = remote(PROMPTS, COMPLETIONS)
        assert load_reward(f"{server.url}#{tmp_path}")(PROMPTS, COMPLETIONS) == found
    assert found == pytest.approx(RewardEnsemble(tmp_path)(PROMPTS, COMPLETIONS), abs=1e-5)
    assert {body["model"] for body in server.bodies} == {"member-0", "member-1"}


def test_token_level_models_are_read_at_every_token(folders, models):
    """Also where the server's base has the heads of several models: the probes say which outputs are the model's."""
    stacked = {
        name: lambda ids, own=models[name], at=at: torch.cat(
            [own(ids) if place == at else torch.randn(len(ids), width) for place, width in enumerate((1, 2))], dim=1
        )
        for at, name in enumerate(("orm", "prm"))
    }
    for served in ({"orm": models["orm"], "prm": models["prm"]}, stacked):
        with pooling_server(served, task="token_classify") as server:
            outcome, process = (RewardScorer(server.url, folders[name]) for name in ("orm", "prm"))
            local = RewardScorer(folders["orm"])
            assert outcome(PROMPTS, COMPLETIONS) == pytest.approx(local(PROMPTS, COMPLETIONS), abs=1e-5)
            for here, there in zip(
                local.score_tokens(PROMPTS, COMPLETIONS), outcome.score_tokens(PROMPTS, COMPLETIONS), strict=True
            ):
                assert there == pytest.approx(here, abs=1e-5)
            local = RewardScorer(folders["prm"])
            for here, there in zip(
                local.score_steps(PROMPTS, STEPS), process.score_steps(PROMPTS, STEPS), strict=True
            ):
                assert there == pytest.approx(here, abs=1e-5)


CHANGES = {
    "another adapter": (lambda out: out.roll(1, 0) * 0.3 - 0.4, "another adapter, another base, or a head"),
    "a sigmoid": (torch.sigmoid, "applies a sigmoid"),
    "a constant head": (lambda out: out * 0 + 0.1, "its head is not the trained one"),
    "fp16": (lambda out: out * 1.003 + 0.002, "less precision: start the server with --dtype float32"),
    "not a number": (lambda out: out * math.nan, "another adapter"),
    "more labels": (lambda out: out[:, :0], "has 0 outputs for a text; needed: the 1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_server_with_other_scores_is_refused_with_the_numbers(folders, models, what):
    change, words = CHANGES[what]
    with (
        pooling_server({"full": lambda ids: change(models["full"](ids))}) as server,
        pytest.raises(ServerError, match=words) as caught,
    ):
        RewardScorer(server.url, folders["full"])
    saved = read_sidecar(folders["full"]).probes["scores"]
    if "outputs" not in words:
        assert any(f"{score:.4g}" in str(caught.value) for score in saved) and "largest difference is" in str(
            caught.value
        )


def test_a_second_normaliser_is_refused(folders, models):
    with (
        pooling_server({"scaled": lambda ids: (models["scaled"](ids) - 0.25) / 0.5}) as server,
        pytest.raises(ServerError, match="The server normalises scores"),
    ):
        RewardScorer(server.url, folders["scaled"])


def test_bf16_may_round_otherwise_but_is_no_other_model(folders, models):
    with pooling_server({"bf16": lambda ids: models["bf16"](ids) + 0.01, "x": models["full"]}) as server:
        RewardScorer(server.url, folders["bf16"])
        with pytest.raises(ServerError, match="gives other scores"):
            RewardScorer(server.url, folders["bf16"], model="x")


def test_bad_servers_and_arguments_each_get_one_sentence(folders, models, monkeypatch):
    monkeypatch.setattr("random.random", lambda: -0.45)  # short pauses
    full = folders["full"]
    with pooling_server({"a": models["full"], "b": models["other"]}) as server:
        with pytest.raises(ServerError, match=f"serves a, b, and not {full}. Start it with.*serve-info"):
            RewardScorer(server.url, full)
        with pytest.raises(ServerError, match="serves a, b, and not c"):
            RewardScorer(server.url, full, model="c")
        with pytest.raises(ValueError, match="which reward model is there. Give its folder"):
            RewardScorer(server.url)
        with pytest.raises(ValueError, match="this one is on a server"):
            RewardScorer(server.url, full, device="cpu")
        with pytest.raises(ValueError, match="give its URL"):
            RewardScorer(full, model="a")
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            RewardScorer(server.url, "/nowhere")
        with pytest.raises(ValueError, match="on a server, and its weights are not here") as _:
            scorer = RewardScorer(server.url, full, model="a")
            scorer.folder = None
            RewardEnsemble([scorer]).save("/nowhere")
    monkeypatch.setattr(pooling, "RETRIES", 1)
    known = {"full": models["full"]}
    bad = [
        (serving(lambda *_: (200, {}, {}), {"/v1/models": "<html>"}), "so it is no vLLM server. Correct the URL"),
        (serving(lambda *_: (200, {}, {}), {"/v1/models": 401}), "refuses the key .HTTP 401.. Set .*VLLM_API_KEY"),
        (pooling_server({"base": models["other"]}), "base at .* gives other scores than the saved model"),  # no LoRA
        (
            pooling_server(known, change=lambda *_: (502, b"<html>Bad Gateway</html>", {})),
            "failed 2 times, last with HTTP 502: <html>Bad Gateway",
        ),
        (pooling_server(known, change=lambda *_: (200, b"<html>", {})), "an unreadable answer"),
        (pooling_server(known, task="token_classify"), "refused a request to /classify with HTTP 404.*serve-info"),
    ]
    for place, words in bad:
        with place as server, pytest.raises(ServerError, match=words):
            RewardScorer(server.url, full)
    monkeypatch.setattr(pooling, "TIMEOUT", 0.1)
    proxy = serving(lambda *_: (200, {}, {}), {"/v1/models": 502})  # of a server that is not there yet
    with proxy as server, pytest.raises(ServerError, match="No server answers at .*HTTP Error 502.*serve-info"):
        RewardScorer(server.url, full)


def test_rows_that_the_server_cannot_take_are_named(folders, models, caplog):
    with pooling_server({"full": models["full"]}, max_model_len=40) as server:
        scorer = RewardScorer(server.url, folders["full"])
        with pytest.raises(DataError, match="at most 40, which is all that the model .or its server. takes") as caught:
            scorer(["a", "a"], ["b", "b " * 60])
        assert "row 1" in str(caught.value)
        assert scorer(["a"], ["b " * 20]) and RewardScorer(server.url, folders["full"], max_length=30)(
            ["a"], ["b " * 60]
        )
    with pooling_server({"full": models["full"]}) as server, caplog.at_level(logging.WARNING):
        plain = folders["full"].parent / "plain"
        shutil.copytree(folders["full"], plain)
        (plain / "reward_model.json").unlink()
        scorer = RewardScorer(server.url, plain, model="full")
        assert len(scorer(["a"], ["b"])) == 1
    assert "no probes in a reward_model.json" in caplog.text
    with pooling_server({"full": models["full"]}, max_model_len=40) as server, caplog.at_level(logging.WARNING):
        long = folders["full"].parent / "long"
        shutil.copytree(folders["full"], long)
        sidecar = read_sidecar(long)
        sidecar.max_length = 64
        sidecar.save(long)
        RewardScorer(server.url, long, model="full")
    assert f"{server.url} takes texts of up to 40 tokens" in caplog.text and "--max-model-len 64" in caplog.text


def test_a_server_that_dies_and_comes_back_loses_nothing(folders, models, monkeypatch):
    monkeypatch.setattr("random.random", lambda: -0.45)
    monkeypatch.setattr(pooling, "RETRIES", 1)
    down = {"now": False}

    def change(number, path, body):
        return (503, b"no", {}) if down["now"] else (429, b"", {"Retry-After": "0"}) if number == 2 else None

    with pooling_server({"full": models["full"]}, change=change) as server:
        scorer = RewardScorer(server.url, folders["full"], batch_size=1)
        before = scorer(PROMPTS, COMPLETIONS)
        down["now"] = True
        with pytest.raises(ServerError, match="HTTP 503.*Call again when it is back"):
            scorer(PROMPTS, COMPLETIONS)
        down["now"] = False
        assert scorer(PROMPTS, COMPLETIONS) == before
        assert server.most_at_once <= pooling.REQUESTS


def test_requests_go_to_several_servers_which_are_all_checked(folders, models):
    wrong = {"full": models["other"]}
    with pooling_server({"full": models["full"]}) as one, pooling_server({"full": models["full"]}) as two:
        scorer = RewardScorer(f"{one.url},{two.url}", folders["full"], batch_size=1)
        seen = len(one.requests), len(two.requests)
        scorer(PROMPTS * 2, COMPLETIONS * 2)
        assert len(one.requests) - seen[0] == len(two.requests) - seen[1] == 5
        with pooling_server(wrong) as three, pytest.raises(ServerError, match=f"full at {three.url} gives other"):
            RewardScorer(f"{one.url},{three.url}", folders["full"])


def test_a_server_that_was_down_at_the_check_gets_no_rows(folders, models):
    wrong = [{"index": 0, "probs": [99.0]}]
    with (
        pooling_server({"full": models["full"]}) as one,
        serving(lambda *_: (200, {"data": wrong}, {}), {"/v1/models": 502}) as late,
    ):
        scorer = RewardScorer(f"{one.url},{late.url}", folders["full"], batch_size=1)
        found = scorer(PROMPTS, COMPLETIONS)
    assert not late.requests
    assert found == pytest.approx(RewardScorer(folders["full"])(PROMPTS, COMPLETIONS), abs=1e-5)


def test_a_late_failure_of_one_call_does_not_end_the_next():
    """A request that is under way when its call fails may fail later, when the server is back."""
    late, answers = threading.Event(), {"first": (400, b"no", {}), "good": (200, {}, {})}

    def answer(number: int, path: str, body: dict) -> tuple:
        if body["what"] == "late":
            late.wait(10)
        return answers.get(body["what"], answers["first"])

    with serving(answer) as server:
        pool = ServerPool(server.url)
        ask = {what: partial(pool.ask, "/x", {"what": what}, lambda *found: found[0]) for what in ("first", "late")}
        with ThreadPoolExecutor() as threads:
            left = threads.submit(ask["late"])
            while not server.requests:
                time.sleep(0.001)
            with pytest.raises(ServerError, match="HTTP 400"):
                pool.map([ask["first"]])
            with pool.together():
                late.set()
                assert left.exception() is not None
                assert pool.map([partial(pool.ask, "/x", {"what": "good"}, lambda *found: found[0])]) == [{}]
