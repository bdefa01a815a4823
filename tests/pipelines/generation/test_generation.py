"""Backends: every argument reaches them, any counts go together, and a failing server is waited for or named."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_serve_available

from tests.pipelines.http_server import good, serving
from tests.tiny import save_tiny_model
from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import GenerationError, cut_at_stop
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import load_policy


PROMPTS = ["The quick test", "A", "Question: how many apples are left when 3 of 12 are eaten? Answer:"]
CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "llama")


def texts(generator, prompts=PROMPTS, n=2, seed=0, columns=None):
    return [[item.text for item in row] for row in generator.generate(prompts, n, seed, columns)]


def in_process(tiny, batch=32, **sampling):
    return make_generator(
        tiny, "transformers", Sampling(**{"max_completion_length": 8} | sampling), generation_batch_size=batch
    )


# In this process


def test_the_revision_of_a_model_is_that_of_its_tokenizer_too(tiny, tmp_path, monkeypatch):
    """A repository in the cache whose tokenizer has another chat template in an older revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    for commit, template in (("0" * 40, "old"), ("1" * 40, "new")):
        folder = shutil.copytree(tiny, repository / "snapshots" / commit)
        (folder / "chat_template.jinja").write_text(template)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    for init, template in (({}, "new"), ({"revision": "0" * 40}, "old")):
        generator = make_generator("org/name", "transformers", model_init_kwargs=init)
        assert generator._encoder.tokenizer.chat_template == template


def test_the_same_seed_gives_the_same_completions_and_another_others(tiny):
    generator = in_process(tiny)
    before = torch.get_rng_state()
    first = texts(generator)
    assert texts(generator) == first != texts(generator, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_counts_that_divide_nothing_lose_nothing(tiny, batch):
    found = in_process(tiny, batch=batch, max_completion_length=3).generate(PROMPTS, 3, seed=0)
    assert [len(row) for row in found] == [3, 3, 3]
    assert all(item.token_ids and item.latency > 0 for row in found for item in row)


def test_each_prompt_may_have_its_own_number_of_completions(tiny):
    generator = in_process(tiny, max_completion_length=3)
    assert [len(row) for row in generator.generate(PROMPTS, [2, 1, 4], seed=0)] == [2, 1, 4]
    assert texts(generator, n=[2, 2, 2]) == texts(generator, n=2)
    with pytest.raises(ValueError, match="2 numbers for 3 prompts"):
        generator.generate(PROMPTS, [1, 2], seed=0)
    with serving(lambda number, path, body: good(f" {body['seed']}")(number, path, body)) as server:
        found = openai(server.url).generate(PROMPTS, [2, 1, 4], seed=0)
    assert [len(row) for row in found] == [2, 1, 4]
    assert len({item.text for row in found for item in row}) == 7  # each request has a separate seed


def test_greedy_is_plain_generate_whatever_the_batch(tiny):
    """Left padding, sorting and cutting change nothing."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    found = in_process(tiny, temperature=0, max_completion_length=12).generate(PROMPTS, 1, seed=0)
    for prompt, (item,) in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert item.token_ids == expected.tolist()
        assert item.finish_reason == ("stop" if item.token_ids[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {"generation_kwargs": {"top_k": 1}}],
)
def test_each_argument_reaches_the_model(tiny, narrow):
    """Each of these leaves only the likeliest token."""
    assert texts(in_process(tiny, **narrow), n=1) == texts(in_process(tiny, temperature=0), n=1)
    assert texts(in_process(tiny), n=1) != texts(in_process(tiny, temperature=0), n=1)


def test_length_penalty_and_stop_reach_the_model(tiny):
    (row,) = in_process(tiny, max_completion_length=5).generate(PROMPTS[:1], 4, 0)
    assert max(len(item.token_ids) for item in row) == 5
    free = texts(in_process(tiny, temperature=0, max_completion_length=40), n=1)
    assert texts(in_process(tiny, temperature=0, max_completion_length=40, repetition_penalty=5.0), n=1) != free
    stop = free[0][0][5]
    (item,) = in_process(tiny, temperature=0, max_completion_length=40, stop=[stop]).generate(PROMPTS[:1], 1, 0)[0]
    assert item.text == free[0][0].split(stop)[0] and item.finish_reason == "stop" and len(item.token_ids) < 40


def test_defaults_of_the_checkpoint_do_not_leak_in(tiny, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    free = texts(in_process(tiny))
    model.generation_config = GenerationConfig(top_k=1, do_sample=True, typical_p=0.01, pad_token_id=0)
    generator = make_generator(model, "transformers", Sampling(max_completion_length=8), processing_class=tokenizer)
    model.train()
    assert texts(generator) == free
    assert model.training and model.generation_config.top_k == 1


def test_every_end_token_that_the_model_declares_ends_a_completion(tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    free = make_generator(
        model, "transformers", Sampling(temperature=0, max_completion_length=9), processing_class=tokenizer
    )
    ids = free.generate(PROMPTS[:1], 1, 0)[0][0].token_ids
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[4]]
    ended = make_generator(
        model, "transformers", Sampling(temperature=0, max_completion_length=9), processing_class=tokenizer
    )
    (item,) = ended.generate(PROMPTS[:1], 1, 0)[0]
    assert item.token_ids == ids[: ids.index(ids[4]) + 1] and item.finish_reason == "stop"


def test_a_completion_keeps_the_space_between_it_and_its_prompt(data_dir):
    """SentencePiece drops it where a text is decoded alone."""
    folder = data_dir / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (item,) = in_process(folder, temperature=0).generate(["Once upon a time there was a"], 1, 0)[0]
    whole = tokenizer("Once upon a time there was a")["input_ids"] + item.token_ids
    assert tokenizer.decode(whole, skip_special_tokens=True) == "Once upon a time there was a" + item.text
    assert item.text.startswith(" ")


def test_an_adapter_is_loaded_with_its_base(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    in_memory = make_generator(adapter, "transformers", Sampling(max_completion_length=8), processing_class=tokenizer)
    with pytest.raises(ValueError, match="Pass `processing_class`"):
        make_generator(adapter, "transformers")
    assert texts(in_memory) != texts(in_process(tiny))
    tokenizer.save_pretrained(tmp_path)
    assert texts(in_process(tmp_path)) == texts(in_memory)


def test_what_the_model_sees_of_a_chat(tiny):
    """Template, its arguments, system prompt, examples, an answer that was begun."""
    template = "{{ mark }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"

    def seen(prompt=CHAT, columns=None, **sampling):
        generator = in_process(tiny, chat_template=template, **sampling)
        (ids,) = generator._encoder.ids([prompt], [columns or {}])
        return AutoTokenizer.from_pretrained(tiny).decode(ids, skip_special_tokens=True)

    assert seen() == "<user>hello there<assistant>"
    assert seen(chat_template_kwargs={"mark": "m"}) == "m<user>hello there<assistant>"
    assert seen(columns={"chat_template_kwargs": {"mark": "w"}}, chat_template_kwargs={"mark": "m"})[0] == "w"
    assert seen(system_prompt="kind") == "<system>kind<user>hello there<assistant>"
    own = [{"role": "system", "content": "clear"}, *CHAT]
    assert seen(own, system_prompt="kind") == "<system>clear<user>hello there<assistant>"
    shots = [{"prompt": "a", "completion": "b"}]
    assert seen(own, few_shot=shots) == "<system>clear<user>a<assistant>b<user>hello there<assistant>"
    assert seen([*CHAT, {"role": "assistant", "content": "good"}]) == "<user>hello there<assistant>good"
    assert Sampling(few_shot=[{"prompt": "2+2=", "completion": "4"}]).context("3+3=") == "2+2=4\n\n3+3="


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        (
            [*PROMPTS, "a " * 400],
            {"max_completion_length": 200},
            "row 3, column 'prompt': found a prompt of .* 512 pos",
        ),
        (
            [CHAT, [{"role": "x", "content": 1}]],
            {"chat_template": "{{ raise_exception('bad role') }}"},
            "row 0.*bad role",
        ),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(tiny, prompts, sampling, message):
    with pytest.raises(DataError, match=message):
        in_process(tiny, **sampling).generate(prompts, 1, 0)


def test_a_prompt_beyond_learnt_positions_is_named(tmp_path):
    gpt2 = save_tiny_model(tmp_path, "gpt2", n_positions=32)
    generator = make_generator(gpt2, sampling=Sampling(max_completion_length=8))
    assert generator.longest_prompt == 24
    with pytest.raises(DataError, match="longer than the model's 32 positions"):
        generator.generate(["say " * 40], 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature=-1; needed: 0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2}, "min_p=2"),
        ({"stop": "x"}, "stop='x'; needed: a list of texts"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"few_shot": [{"prompt": "a"}]}, r"few_shot\[0\]"),
        ({"temprature": 1}, "Did you mean 'temperature'"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling.of(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_return_sequences": 2}, "Set num_generations"),
        ({"typical": 0.5}, r"GenerationConfig does not know\. Did you mean 'typical_p'\?"),
    ],
)
def test_generation_kwargs_that_would_do_nothing_or_harm(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        in_process(tiny, generation_kwargs=kwargs)


def test_a_continued_answer_keeps_its_space(data_dir):
    """SentencePiece drops it where the continuation is decoded alone."""
    folder = data_dir / "stories260K"
    chat = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon a time there was a"}]
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
    (item,) = in_process(folder, temperature=0, chat_template=template).generate([chat], 1, 0)[0]
    assert item.text.startswith(" ")


def test_cutting_at_the_first_stop_text():
    assert cut_at_stop("a;b\nc", ["\n", ";"]) == "a"
    assert cut_at_stop("a", ["b"]) == cut_at_stop("a", None) == "a"


# Servers


def openai(url, retries=2, timeout=5.0, concurrency=4, key=None, **sampling):
    return make_generator(
        "served",
        "openai",
        Sampling(**{"max_completion_length": 8} | sampling),
        server_base_url=url,
        server_timeout=timeout,
        max_concurrency=concurrency,
        max_retries=retries,
        api_key_variable=key,
    )


def test_what_is_sent_for_a_text(monkeypatch):
    monkeypatch.setenv("THE_KEY", "k")
    with serving(good(logprobs={"token_logprobs": [-0.5, -0.25]}, token_ids=[5, 6])) as server:
        arguments = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
        generator = openai(
            server.url + "/v1/", key="THE_KEY", stop=["\n"], generation_kwargs={"presence_penalty": 1}, **arguments
        )
        found = generator.generate(["one", "two"], 3, seed=0)
        again = generator.generate(["two"], 1, seed=0)[0][0]
    assert [[item.text for item in row] for row in found] == [[" fine"] * 3] * 2
    assert found[0][0].logprob == -0.75 and found[0][0].token_ids == [5, 6]
    path, body, headers = server.requests[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer k"
    expected = {
        "model": "served",
        "prompt": "one",
        "max_tokens": 8,
        "stop": ["\n"],
        "presence_penalty": 1,
        **arguments,
    }
    assert {name: value for name, value in body.items() if name != "seed"} == expected
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds[:6])) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert again.seed == found[1][0].seed  # of the sample, wherever it is asked for


def test_what_is_sent_for_a_chat_and_what_is_off_is_not_sent():
    with serving(good("yes", "length")) as server:
        generator = openai(server.url, system_prompt="kind", chat_template_kwargs={"think": False})
        (item,) = generator.generate([CHAT], 1, 0, [{"tools": [{"name": "add"}]}])[0]
    assert (item.text, item.finish_reason, item.token_ids, item.logprob) == ("yes", "length", None, None)
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "kind"}, *CHAT]
    assert body["chat_template_kwargs"] == {"think": False} and body["tools"] == [{"name": "add"}]
    off = {"top_k", "min_p", "repetition_penalty", "stop", "generation_config", "continue_final_message"}
    assert not off & set(body)


def test_nulls_of_structs_are_not_sent_and_set_nothing():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "day": None}}}
    chat = [
        {"role": "user", "content": "1 + 1?", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_calls": None},
    ]
    columns = {"chat_template_kwargs": {"think": None, "loud": True}}
    with serving(good()) as server:
        openai(server.url, chat_template_kwargs={"think": False}).generate([chat], 1, 0, [columns])
    asked, called, answered = server.bodies[0]["messages"]
    assert asked == {"role": "user", "content": "1 + 1?"} and answered == {"role": "tool", "content": "2"}
    assert called["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert server.bodies[0]["chat_template_kwargs"] == {"think": False, "loud": True}


def test_a_begun_answer_is_continued_by_a_server_too():
    begun = [*CHAT, {"role": "assistant", "content": "good"}]
    with serving(good()) as server:
        openai(server.url).generate([begun], 1, 0)
    expected = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    assert expected.items() <= server.bodies[0].items()


def test_concurrency_is_bounded_and_used():
    with serving(good()) as server:
        openai(server.url, concurrency=3).generate(["a", "b"], 6, 0)
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "bad",
    [
        (429, b"slow down", {"Retry-After": "0.01"}),
        (500, b"oops", {}),
        (503, b"", {}),
        (200, b"<html>garbage", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": {}}]}, {}),
        (None, b"", {}),
    ],
    ids=["429", "500", "503", "garbage", "no choice", "no text", "dies"],
)
def test_what_may_pass_is_asked_again(bad, short_pauses):
    with serving(lambda number, path, body: bad if number < 2 else good()(number, path, body)) as server:
        (row,) = openai(server.url, retries=3, concurrency=1).generate(["a"], 2, 0)
    assert [item.text for item in row] == [" fine", " fine"] and len(server.requests) == 4


def test_a_server_that_stays_broken_is_said_with_its_last_words(short_pauses):
    with serving(lambda *_: (500, b"CUDA error", {})) as server:
        generator = openai(server.url, retries=2, concurrency=1)
        with pytest.raises(GenerationError, match="failed 3 times, last with HTTP 500: CUDA error.*stored is kept"):
            generator.generate(["a", "b"], 4, 0)
    assert len(server.requests) == 3  # the other seven were not sent


def test_the_same_generator_asks_a_server_again_that_is_back(short_pauses):
    with serving(good()) as server:
        fine = server.answer
        generator = openai(server.url, retries=0, concurrency=1)
        server.answer = lambda *request: (503, b"", {})
        for _ in range(2):
            before = len(server.requests)
            with pytest.raises(GenerationError, match="HTTP 503.*When it is back, run the same again"):
                generator.generate(["a"], 3, 0)
            assert len(server.requests) == before + 1
        server.answer = fine
        assert texts(generator, ["a"]) == [[" fine", " fine"]]


def test_a_refused_request_is_not_repeated():
    with (
        serving(lambda *_: (400, b"top_k is not known", {})) as server,
        pytest.raises(GenerationError, match="refused a request to /completions with HTTP 400: top_k is not known"),
    ):
        openai(server.url, concurrency=1).generate(["a"], 3, 0)
    assert len(server.requests) == 1


def test_a_slow_server_is_given_up(short_pauses):
    with serving(lambda *_: time.sleep(1) or (200, {}, {})) as server:
        generator = openai(server.url, retries=1, timeout=0.2, concurrency=1)
        with pytest.raises(GenerationError, match="failed 2 times, last with TimeoutError.*server_timeout"):
            generator.generate(["a"], 1, 0)


def test_no_server_and_no_key():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(GenerationError, match="No server answers at http://127.0.0.1:.*Start it"):
        openai(url, timeout=0.1)
    with pytest.raises(GenerationError, match="NO_SUCH_KEY"):
        openai(url, key="NO_SUCH_KEY")


def test_a_server_needs_a_name_and_a_backend_is_known(tiny):
    with pytest.raises(ValueError, match="needed: one of transformers, vllm, openai"):
        make_generator(tiny, "sglang")
    with pytest.raises(ValueError, match="cannot take a LlamaForCausalLM"):
        make_generator(AutoModelForCausalLM.from_pretrained(tiny), "openai")
    with pytest.raises(ValueError, match="dtype='bf61' is not known"):
        load_policy(tiny, {"dtype": "bf61"})


# A real server


@pytest.fixture(scope="module")
def transformers_server(tiny):
    """`transformers serve` with the tiny model on a free port."""
    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai (pip install 'trl-ext[dev]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["transformers", "serve", str(tiny), "--port", str(port), "--device", "cpu", "--log-level", "error"]
    code = f"import sys; from transformers.cli.transformers import main; sys.argv = {arguments!r}; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(url + "/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "transformers serve did not start"
            time.sleep(0.2)
    yield url
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_real_server(transformers_server, tiny):
    """Greedy, and each argument that leaves only the likeliest token, give what the model gives in this process."""

    def served(prompts=PROMPTS, n=1, **sampling):
        generator = make_generator(
            str(tiny),
            "openai",
            Sampling(**{"max_completion_length": 8} | sampling),
            server_base_url=transformers_server,
            max_concurrency=1,
        )
        return generator.generate(prompts, n, 0)

    greedy = in_process(tiny, temperature=0).generate(PROMPTS, 1, 0)
    stripped = [[item.text.strip() for item in row] for row in greedy]  # the server decodes a completion by itself
    for narrow in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert [[item.text.strip() for item in row] for row in served(**narrow)] == stripped, narrow
    sampled = served(n=3)
    assert len({item.text for row in sampled for item in row}) > 6
    assert [[item.text for item in row] for row in served(n=3)] == [[item.text for item in row] for row in sampled]
    assert {item.finish_reason for row in sampled for item in row} <= {"stop", "length"}
    long = served(max_completion_length=30, temperature=0)
    assert long[0][0].text.startswith(served(temperature=0)[0][0].text)
    chat = in_process(tiny, temperature=0).generate([CHAT], 1, 0)[0][0].text
    assert served([CHAT], temperature=0)[0][0].text.strip() == chat.strip()
    with pytest.raises(DataError, match="row 1.*`transformers serve` would begin a new answer"):
        served([CHAT, [*CHAT, {"role": "assistant", "content": "good"}]])
    with pytest.raises(GenerationError, match="HTTP 4"):
        served(generation_kwargs={"generation_config": "no json", "frequency_penalty": "x", "no_such": 1})
