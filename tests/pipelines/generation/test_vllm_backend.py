"""The backend `vllm` and servers in general: what is sent and read back, several servers, and what a failure says.

A local server speaks vLLM's protocol and generates with the tiny model, taking from `generation_config.json` what a
request does not say, as vLLM does.
"""

import threading
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.pipelines.http_server import good, serving
from tests.tiny import save_tiny_model
from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import GenerationError, cut_at_stop
from trl_ext.pipelines.generation.sampling import Sampling


PROMPTS = ["The quick test", "A", "Question: how many apples are left when 3 of 12 are eaten? Answer:"]
CHAT = [{"role": "user", "content": "hello there"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "good"}]
ONE_AT_A_TIME = threading.Lock()  # servers share the random state of this process
SCHEMAS = {
    name: {"properties": dict.fromkeys(("temperature", "top_p", "max_tokens", "frequency_penalty", "n", "seed"), {})}
    for name in ("CompletionRequest", "ChatCompletionRequest")
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A policy whose own `generation_config.json` asks for other sampling than its user does."""
    folder = save_tiny_model(tmp_path_factory.mktemp("policy"), "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=9.0, temperature=0.01, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(folder)
    return folder


def cards(name="served", **card):
    return {"/v1/models": {"data": [{"id": name, "owned_by": "vllm", **card}]}, "/openapi.json": schemas()}


def schemas():
    return {"components": {"schemas": SCHEMAS}}


def vllm_like(folder):
    """Answers to `/v1/completions` as vLLM gives them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    defaults = GenerationConfig.from_pretrained(folder)
    model.generation_config = GenerationConfig()

    def answer(number, path, body):
        said = {name: body.get(name, getattr(defaults, name)) for name in ("top_k", "top_p", "repetition_penalty")}
        temperature = body.get("temperature", defaults.temperature)
        sampled = {**said, "temperature": temperature, "min_p": body.get("min_p")} if temperature else {}
        config = GenerationConfig(
            do_sample=bool(temperature),
            num_return_sequences=body.get("n", 1),
            max_new_tokens=body["max_tokens"],
            stop_strings=body.get("stop"),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **({"repetition_penalty": said["repetition_penalty"]} | sampled),
        )
        prompt = body["prompt"] if isinstance(body["prompt"], list) else tokenizer(body["prompt"])["input_ids"]
        ids = torch.tensor([prompt])
        with ONE_AT_A_TIME, torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(body["seed"])
            rows = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=tokenizer
            )
        choices = []
        for index, row in enumerate(rows[:, ids.shape[1] :].tolist()):
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id) + 1]
            text = tokenizer.decode(row, skip_special_tokens=True)
            cut = cut_at_stop(text, body.get("stop"))
            ended = row[-1] == tokenizer.eos_token_id or cut != text
            choice = {"index": index, "text": cut, "finish_reason": "stop" if ended else "length"}
            choice["stop_reason"] = body["stop"][0] if cut != text else None
            choice["token_ids"] = row if body.get("return_token_ids") else None
            pieces = [tokenizer.decode([token]) for token in row]
            choice["logprobs"] = {"tokens": pieces, "token_logprobs": [-0.5] * len(row)}
            choices.append(choice)
        return 200, {"choices": choices[::-1]}, {}  # in any order

    return answer


def make(folder, url, backend="vllm", retries=2, timeout=5.0, **sampling):
    return make_generator(
        str(folder),
        backend,
        Sampling(**{"max_completion_length": 8} | sampling),
        server_base_url=url,
        server_timeout=timeout,
        max_retries=retries,
        max_concurrency=4,
    )


def test_the_same_request_gives_the_token_ids_of_this_process(tiny):
    """Greedy, with a stop text, and for each kind of prompt; the checkpoint's own sampling arguments stay out."""
    prompts = [*PROMPTS, CHAT, BEGUN]
    with serving(vllm_like(tiny), cards(str(tiny))) as server:
        for sampling in ({}, {"max_completion_length": 30}, {"max_completion_length": 30, "stop": ["e", "a"]}):
            here = make_generator(
                tiny, "transformers", Sampling(**{"max_completion_length": 8} | sampling, temperature=0)
            )
            there = make(tiny, server.url, **sampling, temperature=0)
            for one, other in zip(here.generate(prompts, 1, 0), there.generate(prompts, 1, 0), strict=True):
                assert other[0].token_ids == one[0].token_ids and other[0].text == one[0].text
                assert other[0].finish_reason == one[0].finish_reason
                assert other[0].logprob == -0.5 * len(other[0].token_ids)
        (free,) = make(tiny, server.url, max_completion_length=12).generate(PROMPTS[:1], 6, 0)
        assert len({tuple(item.token_ids) for item in free}) > 3  # top_k=1 of the checkpoint would give one
        again = make(tiny, server.url, max_completion_length=12).generate(PROMPTS[:1], 6, 0)[0]
        assert [item.token_ids for item in again] == [item.token_ids for item in free]


def test_every_argument_is_sent_also_one_that_is_off(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    arguments = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    with serving(vllm_like(tiny), cards(str(tiny))) as server:
        make(tiny, server.url).generate(["one"], 2, seed=0)
        found = make(tiny, server.url, stop=["\n"], generation_kwargs={"frequency_penalty": 1}, **arguments).generate(
            ["one", "two"], 2, seed=0
        )
    off, *bodies = server.bodies
    nothing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert off.items() >= (nothing | {"presence_penalty": 0.0, "frequency_penalty": 0.0}).items() and "stop" not in off
    bodies.sort(key=lambda body: body["prompt"] != tokenizer("one")["input_ids"])
    expected = arguments | {"n": 2, "stop": ["\n"], "frequency_penalty": 1, "max_tokens": 8, "model": str(tiny)}
    assert bodies[0]["prompt"] == tokenizer("one")["input_ids"] and bodies[0].items() >= expected.items()
    assert bodies[0]["seed"] != bodies[1]["seed"] and [len(row) for row in found] == [2, 2]
    assert all(path == "/v1/completions" for path, *_ in server.requests)


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_equal_prompts_of_a_call_get_different_seeds(tiny, backend):
    with serving(vllm_like(tiny), cards(str(tiny))) as server:
        generator = make(tiny, server.url, backend)
        found = generator.generate(["one", "two", "one", "one"], [2, 1, 1, 2], seed=0)
        alone = generator.generate(["one"], 2, seed=0)
    seeds = [[item.seed for item in row] for row in found]
    assert seeds[0] == [item.seed for item in alone[0]]
    assert len({seed for row in seeds for seed in row}) == (4 if backend == "vllm" else 6)


def test_an_openai_client_of_vllm_sends_and_asks_for_the_same():
    """By its card the server is vLLM: nothing is left to its defaults, ids come back and end before the stop text."""
    choice = {"token_ids": [5, 6, 7, 8], "stop_reason": ";", "finish_reason": "stop"}
    logprobs = {"tokens": [" f", "ine", ";", "x"], "token_logprobs": [-1.0, -0.5, -9.0, -9.0]}
    with serving(good(" fine", **choice, logprobs=logprobs), cards()) as server:
        (item,) = make("served", server.url, "openai", stop=[";"]).generate(["one"], 1, 0)[0]
    assert (item.text, item.token_ids, item.logprob, item.finish_reason) == (" fine", [5, 6], -1.5, "stop")
    off = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True, "logprobs": 0}
    assert server.bodies[0].items() >= off.items()
    content = [{"token": piece, "logprob": value} for piece, value in zip(*logprobs.values(), strict=True)]
    with serving(good(" fine", **choice, logprobs={"content": content}), cards()) as server:
        (item,) = make("served", server.url, "openai", stop=[";"]).generate([CHAT], 1, 0)[0]
    assert (item.token_ids, item.logprob) == ([5, 6], -1.5)
    assert server.bodies[0].items() >= (off | {"logprobs": True, "top_logprobs": 0}).items()
    logprobs = {"tokens": ["other", "texts"], "token_logprobs": [-1.0, -0.5]}
    with serving(good(" fine", **choice, logprobs=logprobs), cards()) as server:
        (item,) = make("served", server.url, "openai", stop=[";"]).generate(["one"], 1, 0)[0]
    assert item.token_ids is None and item.logprob is None  # which of them are the text's cannot be told


@pytest.mark.parametrize("backend", ["vllm", "openai"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 4}, "generation_kwargs has 'n', which the backend sets"),
        ({"seed": 4}, "generation_kwargs has 'seed'"),
        ({"frequency_penalti": 1}, r"does not know and ignores\. Did you mean 'frequency_penalty'\?"),
    ],
)
def test_generation_kwargs_that_would_do_nothing_or_harm(tiny, backend, kwargs, message):
    with serving(good(), cards(str(tiny))) as server, pytest.raises(ValueError, match=message):
        make(tiny, server.url, backend, generation_kwargs=kwargs)
    assert not server.requests


def test_a_chat_template_that_the_server_refuses():
    refusal = (
        b'{"error": {"message": "Chat template is passed with request, but --trust-request-chat-template is not"}}'
    )
    with (
        serving(lambda *_: (400, refusal, {})) as server,
        pytest.raises(GenerationError, match="backend='vllm', which"),
    ):
        make("served", server.url, "openai", chat_template="{{ messages }}").generate([CHAT], 1, 0)
    assert len(server.requests) == 1


def test_what_a_server_must_be(tiny, caplog):
    two = {"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}
    with serving(good(), two) as server, pytest.raises(GenerationError, match=f"serves a, b, and not {tiny}"):
        make(tiny, server.url)
    for nothing in ({}, "<html>"):
        with (
            serving(good(), {"/v1/models": nothing}) as server,
            pytest.raises(GenerationError, match="does not say which"),
        ):
            make(tiny, server.url)
    for status, words in ((502, "No server answers at .*HTTP Error 502"), (401, "refuses the key .*api_key_variable")):
        with serving(good(), {"/v1/models": status}) as server, pytest.raises(GenerationError, match=words):
            make(tiny, server.url, timeout=0.1)
    words = "row 1, column 'prompt': found a prompt of .* the model's 9 positions"
    with serving(good(), cards(str(tiny), max_model_len=9)) as server, pytest.raises(DataError, match=words):
        make(tiny, server.url, max_completion_length=6).generate(["A", PROMPTS[2]], 1, 0)
    with serving(good(), cards("policy", root="/elsewhere/model")) as server:
        generator = make(tiny, server.url)
        assert f"serves policy, and the model is given as {tiny}" in caplog.text
        with pytest.raises(GenerationError, match="returned no token ids. Needed: vLLM"):
            generator.generate(PROMPTS[:1], 1, 0)
        with pytest.raises(GenerationError, match="returned 1 completions; requested: 2"):
            generator.generate(PROMPTS[:1], 2, 0)


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_an_engine_that_dies_is_one_clear_message(tiny, backend, short_pauses):
    with serving(vllm_like(tiny), cards(str(tiny))) as server:
        generator = make(tiny, server.url, backend, retries=1)
        generator.generate(PROMPTS, 1, 0)
    words = (
        "The server at http://127.0.0.1:.* failed 2 times.*no longer answers: it was ended, or its engine died.*kept"
    )
    for _ in range(2):  # every later call says the same at once
        with pytest.raises(GenerationError, match=words):
            generator.generate(PROMPTS, 3, 0)
    with pytest.raises(GenerationError, match="No server answers at http://127.0.0.1"):
        make(tiny, server.url, backend, timeout=0.1)


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_several_servers_share_the_requests_and_one_may_die(tiny, backend, short_pauses, caplog):
    with serving(vllm_like(tiny), cards(str(tiny))) as whole:
        expected = make(tiny, whole.url, backend).generate(PROMPTS, 4, 0)
    with ExitStack() as stack:
        first, second = (stack.enter_context(serving(vllm_like(tiny), cards(str(tiny)))) for _ in range(2))
        dying = stack.enter_context(
            serving(lambda *arguments: (None, b"", {}), cards(str(tiny)))  # cuts every answer in the middle
        )
        urls = f"{first.url}, {second.url}/v1"
        found = make(tiny, urls, backend).generate(PROMPTS, 4, 0)
        assert [[item.text for item in row] for row in found] == [[item.text for item in row] for row in expected]
        assert abs(len(first.requests) - len(second.requests)) <= 2 and first.requests and second.requests
        caplog.clear()
        found = make(tiny, [dying.url, first.url, second.url], backend).generate(PROMPTS, 4, 0)
        assert [[item.text for item in row] for row in found] == [[item.text for item in row] for row in expected]
        assert 1 <= len(dying.requests) <= 4
        assert f"The server at {dying.url} failed with" in caplog.text and "requests go to the others" in caplog.text
    with serving(vllm_like(tiny), cards(str(tiny))) as alone:  # the others were ended
        caplog.clear()
        found = make(tiny, [first.url, alone.url], backend).generate(PROMPTS, 4, 0)
        assert [[item.text for item in row] for row in found] == [[item.text for item in row] for row in expected]
        assert f"No server answers at {first.url}" in caplog.text


def test_an_adapter_that_the_server_lacks_is_loaded_into_it(tiny, tmp_path, caplog):
    """Policies of several rounds have the same last name, so that the server knows them by their whole path."""
    rounds = [tmp_path / str(number) / "policy" for number in (1, 2)]
    for folder in rounds:
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        (folder / "adapter_config.json").write_text('{"r": 4}')
    cards = [{"id": "base", "root": "base"}, {"id": "policy", "root": str(rounds[0])}]
    described = {"/v1/models": {"data": cards}}

    def answer(number: int, path: str, body: dict) -> tuple:
        if path == "/v1/load_lora_adapter":
            cards.append({"id": body["lora_name"], "root": body["lora_path"]})
            return 200, b"Success: LoRA adapter added", {}
        return good(token_ids=[5], logprobs={"token_logprobs": [-0.5]}, index=0)(number, path, body)

    with serving(answer, described) as server:
        for folder in (*rounds, rounds[1]):
            make_generator(folder, "vllm", server_base_url=server.url).generate(["a"], 1, 0)
    loaded = [body["lora_path"] for path, body, _ in server.requests if path == "/v1/load_lora_adapter"]
    assert loaded == [str(rounds[1])]  # the first was there; the second is loaded once
    names = [body["model"] for path, body, _ in server.requests if path == "/v1/completions"]
    assert [name.partition("@")[0] for name in names] == ["policy", str(rounds[1]), str(rounds[1])]

    # another run wrote other weights to the same folder: the server's are not used for them
    (rounds[1] / "adapter_model.safetensors").write_bytes(b"others")
    with serving(answer, described) as server:
        make_generator(rounds[1], "vllm", server_base_url=server.url).generate(["a"], 1, 0)
    (_, loading, _), (_, asked, _) = server.requests
    assert loading["lora_path"] == str(rounds[1]) and loading["lora_name"] == asked["model"] not in names

    (rounds[1] / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": "org/another-base"}')
    with serving(answer, described) as server:
        make_generator(rounds[1], "vllm", server_base_url=server.url)
    assert f"serves base, policy, and the adapter {rounds[1]} was trained on org/another-base" in caplog.text
    refusing = lambda *_: (404, b"Not Found", {})  # noqa: E731
    with (
        serving(refusing, {"/v1/models": {"data": cards[:1]}}) as server,
        pytest.raises(
            GenerationError, match="serves base, and not the adapter .*HTTP 404.*RUNTIME_LORA_UPDATING=1.*rank 4"
        ),
    ):
        make_generator(rounds[0], "vllm", server_base_url=server.url)
