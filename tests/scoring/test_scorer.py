"""`RewardScorer`: the ids of training, scores that no batch changes, memory, normaliser, errors."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows, ranked_rows, tiny_tokenizer
from trl_ext import RewardScorer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.data.validation import DataError
from trl_ext.models import get_sidecar, load_reward_model, read_sidecar
from trl_ext.scoring import raw_scorer as scorer_module


TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


def texts(n=13):
    """Prompts and completions of many lengths, in no order of length."""
    rows = ranked_rows(n, k=2, seed=3)
    prompts = [row["prompt"] * (1 + i * 7 % 4) for i, row in enumerate(rows)]
    return prompts, [row["completions"][0] * (1 + i * 5 % 3) for i, row in enumerate(rows)]


def chats(n=13):
    prompts, completions = texts(n)
    return (
        [[{"role": "user", "content": p}] for p in prompts],
        [[{"role": "assistant", "content": c}] for c in completions],
    )


@contextmanager
def seen_ids(scorer):
    """Token ids that reach the embedding of the model, without padding, in the order of batches."""
    embedding = scorer.model.get_input_embeddings()
    pad = scorer.processing_class.pad_token_id
    seen = []

    def keep(module, args):
        seen.extend([[i for i in row if i != pad] for row in args[0].tolist()])

    handle = embedding.register_forward_pre_hook(keep)
    yield seen
    handle.remove()


# Exact whatever the batch


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "roberta"])
def test_no_batch_changes_a_score(reward_path, family):
    path = reward_path(family)
    prompts, completions = texts(13)
    alone = RewardScorer(path)
    want = [alone([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert torch.tensor(want).std() > 0.005
    for batch_size in (1, 3, 5, 13, 64, "auto"):  # 3 and 5 leave a rest
        scorer = RewardScorer(path, batch_size=batch_size)
        assert scorer(prompts, completions) == pytest.approx(want, abs=1e-6)
        assert scorer(prompts[::-1], completions[::-1]) == pytest.approx(want[::-1], abs=1e-6)


def test_a_small_token_budget_and_small_chunks_change_nothing(reward_path, monkeypatch):
    prompts, completions = texts(13)
    want = RewardScorer(reward_path())(prompts, completions)
    monkeypatch.setattr(scorer_module, "TOKEN_BUDGET", 100)
    monkeypatch.setattr(scorer_module, "CHUNK_ROWS", 4)
    scorer = RewardScorer(reward_path())
    sizes = []
    run = scorer.raw.runner._padded_batch
    monkeypatch.setattr(
        scorer.raw.runner, "_padded_batch", lambda ids: sizes.append([len(i) for i in ids]) or run(ids)
    )
    assert scorer(prompts, completions) == pytest.approx(want, abs=1e-6)
    assert sum(map(len, sizes)) == 13
    assert all(len(size) == 1 or len(size) * max(size) <= 100 for size in sizes)
    assert any(len(size) > 1 for size in sizes)
    assert max(map(len, sizes)) <= 4


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_score_is_what_plain_transformers_gives(reward_path, family):
    path = reward_path(family)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts, completions = texts(5)
    eos = tokenizer.eos_token or ""
    with torch.no_grad():
        want = [
            model(**tokenizer(p + c + eos, return_tensors="pt")).logits[0, 0].item()
            for p, c in zip(prompts, completions, strict=True)
        ]
    assert RewardScorer(path)(prompts, completions) == pytest.approx(want, abs=1e-5)


def test_the_original_order_of_any_sequence_is_kept(reward_path):
    rows = Dataset.from_dict(dict(zip(("prompt", "completion"), texts(6), strict=True)))
    scorer = RewardScorer(reward_path())
    assert scorer(rows["prompt"], rows["completion"]) == scorer(list(rows["prompt"]), list(rows["completion"]))
    arrays = np.array(rows["prompt"]), np.array(rows["completion"])
    assert scorer(*arrays) == scorer(list(rows["prompt"]), list(rows["completion"]))
    assert scorer([], []) == []
    assert scorer(tuple(rows["prompt"]), tuple(rows["completion"])) == scorer(*arrays)
    # a Series is read by place, whatever its index
    index = [5, 4, 3, 2, 1, 0]
    series = pd.Series(list(rows["prompt"]), index=index), pd.Series(list(rows["completion"]), index=index)
    assert scorer(*series) == scorer(*arrays)


# Token ids: training == scorer


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gpt2", "bert"])
def test_ids_are_those_of_training(reward_path, family, chat):
    scorer = RewardScorer(reward_path(family), batch_size=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_path(family))
    tokenization = TokenizationSettings.for_training(tokenizer)
    rows = pair_rows(3, chat=chat, seed=2)
    groups, _ = prepare_groups(Dataset.from_list(rows), tokenizer, tokenization=tokenization, max_length=None)
    for row, group in zip(rows, groups, strict=True):
        for column, want in zip(("chosen", "rejected"), group["candidate_ids"], strict=True):
            with seen_ids(scorer) as seen:
                scorer([row["prompt"]], [row[column]])
            assert seen == [want]
    with seen_ids(scorer) as seen:  # whole texts and conversations
        scorer(None, [rows[0]["prompt"] + rows[0]["chosen"]])
    assert seen == [groups[0]["candidate_ids"][0]]


def test_tools_and_template_arguments_are_those_of_training(reward_path):
    scorer = RewardScorer(reward_path(), batch_size=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_path())
    rows = pair_rows(2, chat=True)
    options = [{"tools": json.dumps([TOOL])}, {"chat_template_kwargs": {"thinking": True}}]
    plain = None
    for extra in ({}, *options, options[0] | options[1]):
        data = Dataset.from_list([row | extra for row in rows])
        groups, _ = prepare_groups(
            data, tokenizer, tokenization=TokenizationSettings.for_training(tokenizer), max_length=None
        )
        want = [group["candidate_ids"][0] for group in groups]
        columns = {name: [value] * 2 for name, value in extra.items()}
        with seen_ids(scorer) as seen:
            scorer([row["prompt"] for row in rows], [row["chosen"] for row in rows], **columns)
        assert sorted(seen) == sorted(want)
        if plain is None:
            plain = seen
        else:
            assert seen != plain
    with seen_ids(scorer) as seen:  # a list of tools in place of JSON, and other functions' columns
        scorer([rows[0]["prompt"]], [rows[0]["chosen"]], tools=[[TOOL]], trainer_state=object(), answer=["4"])
    assert len(seen[0]) > len(plain[0])


def test_ways_to_write_the_same_chat(reward_path):
    scorer = RewardScorer(reward_path())
    (prompts, completions), contents = chats(3), texts(3)[1]
    want = scorer(prompts, completions)
    assert scorer(prompts, contents) == want
    assert scorer(prompts, [c[0] for c in completions]) == want
    assert scorer(None, [p + c for p, c in zip(prompts, completions, strict=True)]) == want
    assert scorer([None] * 3, [p + c for p, c in zip(prompts, completions, strict=True)]) == want
    # some data sets repeat the prompt as a text beside the conversation that contains it
    assert (
        scorer([p[0]["content"] for p in prompts], [p + c for p, c in zip(prompts, completions, strict=True)]) == want
    )


def test_a_model_without_sidecar_gets_no_eos_and_says_so_once(reward_path, caplog):
    with caplog.at_level(logging.WARNING):
        scorer = RewardScorer(reward_path(sidecar=False), batch_size=1)
        with seen_ids(scorer) as seen:
            scorer(["The quick"], [" test"])
            scorer(["The quick"], [" test"])
    tokenizer = AutoTokenizer.from_pretrained(reward_path(sidecar=False))
    assert seen == [tokenizer("The quick test")["input_ids"]] * 2
    said = [record for record in caplog.records if "no reward_model.json" in record.getMessage()]
    assert len(said) == 1
    prompts, completions = chats(2)
    assert scorer(prompts, completions) == pytest.approx(RewardScorer(reward_path())(prompts, completions), abs=1e-6)


def test_empty_completions(reward_path):
    scorer = RewardScorer(reward_path(), batch_size=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_path())
    with seen_ids(scorer) as seen:
        assert scorer(["The quick"], [""])[0] is not None
    assert seen == [tokenizer("The quick" + tokenizer.eos_token)["input_ids"]]
    chat = [{"role": "user", "content": "hello"}]
    assert scorer([chat], [[{"role": "assistant", "content": ""}]])[0] is not None
    assert scorer([chat, None, "a"], [[], [], ""])[1] is None  # nothing at all
    bare = RewardScorer(reward_path("gpt2", sidecar=False))  # its tokenizer adds nothing
    some = bare(["a"], [" test"])[0]
    assert bare(["", None, "a"], ["", "", " test"]) == [None, None, pytest.approx(some, abs=1e-6)]


# Length and memory


def test_max_length_cuts_the_prompt_and_counts(reward_path, caplog):
    prompts, completions = texts(13)
    tokenizer = AutoTokenizer.from_pretrained(reward_path())
    lengths = [
        len(tokenizer(p + c + tokenizer.eos_token)["input_ids"]) for p, c in zip(prompts, completions, strict=True)
    ]
    limit = sorted(lengths)[6]
    scorer = RewardScorer(reward_path(), max_length=limit)
    whole = RewardScorer(reward_path())(prompts, completions)
    with caplog.at_level(logging.WARNING), seen_ids(scorer) as seen:
        cut = scorer(prompts, completions)
        scorer(prompts, completions)
    over = sum(length > limit for length in lengths)
    assert scorer.num_truncated == 2 * over > 0
    said = [r.getMessage() for r in caplog.records if "max_length" in r.getMessage()]
    assert len(said) == 1 and f"{over} of 13" in said[0]
    assert max(map(len, seen)) == limit
    for length, a, b in zip(lengths, cut, whole, strict=True):
        assert (abs(a - b) > 1e-6) == (length > limit)


def out_of_memory_above(model, tokens, monkeypatch):
    """Make the model run out of memory on batches of more than `tokens` padded tokens; the batches it was given."""
    batches = []

    def check(module, args):
        batches.append(tuple(args[0].shape))
        if args[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.get_input_embeddings().register_forward_pre_hook(check)
    return batches


@pytest.mark.parametrize("batch_size", ["auto", 13])
def test_out_of_memory_halves_batches_and_says_so_once(reward_path, monkeypatch, caplog, batch_size):
    prompts, completions = texts(13)
    want = RewardScorer(reward_path())(prompts, completions)
    scorer = RewardScorer(reward_path(), batch_size=batch_size)
    batches = out_of_memory_above(scorer.model, 160, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert scorer(prompts, completions) == pytest.approx(want, abs=1e-6)
        tried = len(batches)
        assert scorer(prompts, completions) == pytest.approx(want, abs=1e-6)
    assert any(rows * width > 160 for rows, width in batches[:tried])
    assert all(rows * width <= 160 for rows, width in batches[tried:])  # it remembers
    assert len([r for r in caplog.records if "did not fit in memory" in r.getMessage()]) == 1
    assert not any(module.training for module in scorer.model.modules())


def test_a_row_that_does_not_fit_alone_is_an_error(reward_path, monkeypatch):
    scorer = RewardScorer(reward_path())
    out_of_memory_above(scorer.model, 10, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="A single row of .* tokens.*max_length"):
        scorer(*texts(3))


# Beside training


def test_threads_get_their_own_scores(reward_path):
    scorer = RewardScorer(reward_path())
    completions = [f"answer {number} " * (1 + number % 7) for number in range(48)]
    expected = scorer([None] * len(completions), completions)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda completion: scorer(None, [completion])[0], completions))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_model_is_left_as_it_was(reward_path):
    path = reward_path()
    model = load_reward_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.train()
    model.get_submodule("model").layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    batch = tokenizer(["a test", "a short line"], padding=True, return_tensors="pt")
    model(**batch).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()

    scorer = RewardScorer(model, tokenizer)
    prompts, completions = texts(5)
    scores = scorer(prompts, completions)
    with pytest.raises(DataError):
        scorer([1], ["a"])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert all(torch.equal(a, p) for a, p in zip(weights, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert all(isinstance(score, float) for score in scores)

    model(**batch).logits.sum().backward()  # training goes on
    with torch.no_grad():
        model.score.weight.mul_(2)
    assert scorer(prompts, completions) == pytest.approx([2 * score for score in scores], abs=1e-5)


def test_autocast_from_outside_changes_nothing(reward_path):
    path = reward_path()
    prompts, completions = texts(5)
    want = RewardScorer(path)(prompts, completions)
    scorer = RewardScorer(path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scorer(prompts, completions) == want
    # what `Accelerator.prepare` does to a model under bf16
    model = load_reward_model(path)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    assert RewardScorer(model, AutoTokenizer.from_pretrained(path))(prompts, completions) == want


# Where models come from


def test_adapters_and_models_in_memory(reward_path):
    path = reward_path(lora=True)
    prompts, completions = texts(5)
    want = RewardScorer(path)(prompts, completions)
    model = load_reward_model(path)
    assert get_sidecar(model).is_adapter
    assert RewardScorer(model, AutoTokenizer.from_pretrained(path))(prompts, completions) == want
    with pytest.raises(ValueError, match="does not say its tokenizer.*processing_class"):
        RewardScorer(model)
    full = reward_path()
    in_memory = RewardScorer(load_reward_model(full), device="cpu")  # its config knows the folder
    assert in_memory(prompts, completions) == RewardScorer(str(full))(prompts, completions)


def test_a_tokenizer_without_pad_token(reward_path):
    path = reward_path("gpt2", pad=None)
    prompts, completions = texts(5)
    scorer = RewardScorer(path)
    assert scorer.processing_class.pad_token_id is None
    batched = scorer(prompts, completions)
    assert batched == pytest.approx([scorer([p], [c])[0] for p, c in zip(prompts, completions, strict=True)], abs=1e-6)
    assert scorer.model.config.pad_token_id is None


# Normaliser


@pytest.mark.parametrize("lora", [False, True])
def test_a_normaliser_survives_and_moves_no_ranking(tmp_path, lora):
    path = save_reward_model(tmp_path, lora=lora)
    prompts, completions = texts(13)
    scorer = RewardScorer(path)
    raw = scorer(prompts, completions)
    fitted = scorer.fit_normalizer(prompts, completions)
    assert fitted["mean"] == pytest.approx(torch.tensor(raw).mean().item(), abs=1e-5)
    assert read_sidecar(path).normalizer == fitted
    for one in (
        scorer,
        RewardScorer(path),
        RewardScorer(load_reward_model(path), AutoTokenizer.from_pretrained(path)),
    ):
        scores = torch.tensor(one(prompts, completions), dtype=torch.float64)
        assert scores.mean().item() == pytest.approx(0, abs=1e-5)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert scores.argsort().tolist() == torch.tensor(raw).argsort().tolist()
    again = RewardScorer(path)
    assert again.fit_normalizer(prompts, completions) == pytest.approx(fitted)  # of raw scores, not of normalised ones
    again.normalizer = None
    assert again(prompts, completions) == pytest.approx(raw, abs=1e-6)


def test_a_normaliser_of_a_model_in_memory_stays_in_memory(tmp_path):
    path = save_reward_model(tmp_path)
    scorer = RewardScorer(load_reward_model(path))
    scorer.fit_normalizer(*texts(5))
    assert torch.tensor(scorer(*texts(5))).mean().item() == pytest.approx(0, abs=1e-5)
    assert read_sidecar(path).normalizer is None


def test_a_normaliser_needs_spread(tmp_path):
    path = save_reward_model(tmp_path)
    scorer = RewardScorer(path)
    with pytest.raises(ValueError, match="standard deviation of the 3 scores"):
        scorer.fit_normalizer(["a"] * 3, [" test"] * 3)
    with pytest.raises(ValueError, match="1 of 2 rows"):
        scorer.fit_normalizer([None, "a"], [[], " test"])
    assert scorer.normalizer is None and read_sidecar(path).normalizer is None


# Errors


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "complaint"),
    [
        (["a", "b"], ["c"], {}, "`prompts` is 2 values"),
        ("a", ["c"], {}, "`prompts` is a str"),
        (["a"], "c", {}, "`completions` is a str"),
        (["a"], ["c"], {"tools": [None, None]}, "`tools` is 2 values"),
        (["a", "b"], ["c", None], {}, "row 1, column 'completions': found None"),
        (["a", 3], ["c", "d"], {}, "row 1, column 'prompts': found int 3"),
        (["a", "b"], ["c", [{"role": "assistant", "content": "d"}]], {}, "row 1, column 'prompt'"),
        (["a", None], ["c", [{"content": "d"}]], {}, "row 1, column 'completions'.*'role'"),
    ],
)
def test_bad_input_names_row_and_column(reward_path, prompts, completions, columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        RewardScorer(reward_path())(prompts, completions, **columns)


def test_a_chat_without_a_template_names_the_row(reward_path):
    scorer = RewardScorer(load_reward_model(reward_path()), tiny_tokenizer("llama", chat=False))
    with pytest.raises(DataError, match="row 1, column 'completions'.*chat_template"):
        scorer(["a", None], [" b", [{"role": "assistant", "content": "d"}]])


def test_a_score_that_is_not_finite_names_the_row(reward_path):
    scorer = RewardScorer(reward_path())
    clock = scorer.processing_class("🙂", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[clock] = float("nan")
    with pytest.raises(DataError, match="row 2, .*found the score nan; needed a finite score"):
        scorer(["a", "b", "c"], [" test", " a short line", " 🙂"])


def test_text_that_the_model_does_not_see_is_counted_and_shown(reward_path, caplog):
    scorer = RewardScorer(reward_path("bert"))
    for _ in range(2):
        scorer(["a", "b", "c"], [" test", " \u2603\u2602", "\u2603"])
    assert scorer.num_unseen == 4
    said = [record.getMessage() for record in caplog.records if "does not see" in record.getMessage()]
    assert len(said) == 1 and "2 of 3 rows have text" in said[0] and "row 1: str ' \u2603\u2602'" in said[0]


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
def test_rows_longer_than_the_table_of_positions(reward_path, family):
    long = "a b " * 600
    with pytest.raises(DataError, match="row 1.*at most 512.*max_length=512"):
        RewardScorer(reward_path(family))(["a", long], [" test", " test"])
    scorer = RewardScorer(reward_path(family), max_length=512)
    assert len(scorer(["a", long], [" test", " test"])) == 2
    assert scorer.num_truncated == 1


def test_a_tokenizer_of_another_model(reward_path):
    scorer = RewardScorer(load_reward_model(reward_path()), tiny_tokenizer("llama"))
    scorer.processing_class.add_tokens(["zzzz"])
    with pytest.raises(DataError, match="row 0.*token id .*processing_class"):
        scorer(["zzzz"], [" test"])


def test_models_that_are_no_reward_models(reward_path, tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        RewardScorer(reward_path(), batch_size=0)
    with pytest.raises(ValueError, match="max_length=0"):
        RewardScorer(reward_path(), max_length=0)
    two = AutoModelForSequenceClassification.from_pretrained(reward_path().parent / "base", num_labels=2)
    with pytest.raises(ValueError, match="2 label"):
        RewardScorer(two)
    with pytest.raises(TypeError, match="Linear.*unwrap_model"):
        RewardScorer(torch.nn.Linear(2, 2))
    other = tmp_path / "token"
    shutil.copytree(reward_path(), other)
    content = json.loads((other / "reward_model.json").read_text())
    (other / "reward_model.json").write_text(json.dumps(content | {"kind": "token"}))
    with pytest.raises(ValueError, match="kind 'token'"):
        RewardScorer(other)
