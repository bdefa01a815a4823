"""The one tokenization function: TRL's ids, EOS, truncation, shared prefixes."""

import random

import pytest
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.tokenization import (
    TokenizationSettings,
    common_prefix_length,
    encode,
    encode_candidates,
)


TEXTS = [
    ("Question: 12 - 3?\n", "9 apples.", "8 apples 🙂."),
    ("", "No prompt here.", "None, at all."),
    ("Über ", " don't\n\nstop", "日本語 123"),
    ("a prompt that ends in half a wo", "rd", "n't"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"a": 1}}}]


def trl_ids(rows: list[dict], tokenizer) -> list[list[list[int]]]:
    """What TRL's own preparation makes of preference rows."""
    args = RewardConfig(output_dir="unused", max_length=None, report_to="none", use_cpu=True, bf16=False)
    prepared = RewardTrainer._prepare_dataset(None, Dataset.from_list(rows), tokenizer, args, "train")
    return [
        [chosen, rejected] for chosen, rejected in zip(prepared["chosen_ids"], prepared["rejected_ids"], strict=True)
    ]


def our_ids(rows: list[dict], tokenizer) -> list[list[list[int]]]:
    tokenization = TokenizationSettings.for_training(tokenizer)
    prepared, _ = prepare_groups(Dataset.from_list(rows), tokenizer, tokenization=tokenization, max_length=None)
    return list(prepared["candidate_ids"])


def text_rows(tokenizer, explicit: bool) -> list[dict]:
    eos = tokenizer.eos_token or ""
    triples = [*TEXTS, ("Closed already.", f" Yes.{eos}", " No.")]
    if explicit:
        return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in triples]
    return [{"chosen": prompt + good, "rejected": prompt + bad} for prompt, good, bad in triples]


def chat_rows(explicit: bool, **columns) -> list[dict]:
    rows = []
    for prompt, good, bad in TEXTS:
        opening = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
        chosen, rejected = [{"role": "assistant", "content": good}], [{"role": "assistant", "content": bad}]
        if explicit:
            rows.append({"prompt": opening, "chosen": chosen, "rejected": rejected, **columns})
        else:
            rows.append({"chosen": opening + chosen, "rejected": opening + rejected, **columns})
    return rows


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "implicit"])
@pytest.mark.parametrize("kind", [kind for kind in TOKENIZER_KINDS if kind != "bert"])  # TRL needs an EOS token
def test_text_ids_equal_trl(kind, explicit):
    tokenizer = tiny_tokenizer(kind)
    rows = text_rows(tokenizer, explicit)
    ours = our_ids(rows, tokenizer)
    assert ours == trl_ids(rows, tokenizer)
    for row in ours:
        assert all(ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1 for ids in row)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "implicit"])
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_chat_ids_equal_trl(kind, explicit):
    tokenizer = tiny_tokenizer(kind)
    assert our_ids(chat_rows(explicit), tokenizer) == trl_ids(chat_rows(explicit), tokenizer)


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": TOOLS},
        {"tools": '[{"name": "add"}]'},
        {"tools": None},
        {"chat_template_kwargs": {"thinking": True}},
        {"tools": TOOLS, "chat_template_kwargs": {"thinking": False}},
    ],
    ids=["tools", "tools as JSON", "tools None", "kwargs", "both"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_template_arguments_equal_trl(kind, columns):
    tokenizer = tiny_tokenizer(kind)
    rows = chat_rows(True, **columns)
    ours = our_ids(rows, tokenizer)
    assert ours == trl_ids(rows, tokenizer)
    if any(columns.values()) and columns.get("chat_template_kwargs") != {"thinking": False}:
        assert ours != our_ids(chat_rows(True), tokenizer)  # the arguments did reach the template


def test_template_arguments_that_differ_by_row_equal_trl():
    tokenizer = tiny_tokenizer("llama")
    rows = chat_rows(True)
    for number, row in enumerate(rows):
        row["chat_template_kwargs"] = {"thinking": number % 2 == 0}
        row["tools"] = TOOLS if number > 1 else None
    assert our_ids(rows, tokenizer) == trl_ids(rows, tokenizer)


def test_bert_text_is_closed_once():
    tokenizer = tiny_tokenizer("bert")
    assert not TokenizationSettings.for_training(tokenizer).append_eos
    for row in our_ids(text_rows(tokenizer, True), tokenizer):
        for ids in row:
            assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
            assert ids.count(tokenizer.sep_token_id) == 1


def test_no_eos_is_appended_where_eos_is_the_separator_that_closes_a_text():
    tokenizer = tiny_tokenizer("bert")
    tokenizer.eos_token = "[SEP]"  # as in DeBERTa and RoBERTa
    assert TokenizationSettings.for_training(tokenizer) == TokenizationSettings(append_eos=False)
    ids = encode(tokenizer, "a", " good answer", TokenizationSettings.for_training(tokenizer)).ids
    assert ids.count(tokenizer.sep_token_id) == 1


@pytest.mark.parametrize("kind", ["llama", "qwen", "mistral", "gemma", "gpt2"])
def test_policy_for_training_appends_eos(kind):
    assert TokenizationSettings.for_training(tiny_tokenizer(kind)) == TokenizationSettings(append_eos=True)


def test_policy_round_trip():
    tokenization = TokenizationSettings(append_eos=True, adds_special_tokens=False)
    assert TokenizationSettings.from_dict(tokenization.to_dict()) == tokenization
    assert TokenizationSettings.without_sidecar() == TokenizationSettings(append_eos=False)
    with pytest.raises(TypeError):
        TokenizationSettings.from_dict({"append_eos": True, "unknown": 1})


def test_policy_without_special_tokens():
    tokenizer = tiny_tokenizer("llama")
    ids = encode(tokenizer, "a", " good answer", TokenizationSettings(False, adds_special_tokens=False)).ids
    assert ids == tokenizer("a good answer", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_completions_after_a_chat_prompt_may_be_strings_or_single_messages(kind):
    tokenizer, tokenization = tiny_tokenizer(kind), TokenizationSettings(append_eos=True)
    prompt, message = [{"role": "user", "content": "hello"}], {"role": "assistant", "content": "fine"}
    as_list = encode(tokenizer, prompt, [message], tokenization).ids
    assert (
        as_list
        == encode(tokenizer, prompt, "fine", tokenization).ids
        == encode(tokenizer, prompt, message, tokenization).ids
    )
    whole = [*prompt, message]
    assert (
        as_list == encode(tokenizer, None, whole, tokenization).ids == encode(tokenizer, [], whole, tokenization).ids
    )
    # The reference: the template, nothing appended.
    assert as_list == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_candidates_together_equal_each_alone(kind):
    tokenizer, tokenization = tiny_tokenizer(kind), TokenizationSettings.for_training(tiny_tokenizer(kind))
    completions = [" yes", " no, 12\n", " maybe 🙂 or not, who knows"]
    together = encode_candidates(tokenizer, "Well?", completions, tokenization)
    assert together == [encode(tokenizer, "Well?", completion, tokenization).ids for completion in completions]
    assert encode_candidates(tokenizer, "Well?", [], tokenization) == []


def test_text_prompt_with_chat_completion_is_refused():
    with pytest.raises(TypeError, match="prompt is text and the completion is chat"):
        encode(tiny_tokenizer(), "hello", [{"role": "assistant", "content": "hi"}], TokenizationSettings(True))


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_truncation_cuts_the_prompt_from_the_left(kind):
    tokenizer = tiny_tokenizer(kind)
    tokenization = TokenizationSettings.for_training(tokenizer)
    prompt, completion = "one two three four five six seven eight nine ten " * 3, "the answer is 56"
    whole = encode(tokenizer, prompt, completion, tokenization)
    assert not whole.truncated
    assert encode(tokenizer, prompt, completion, tokenization, max_length=len(whole.ids)) == whole
    limit = len(whole.ids) - 9
    cut = encode(tokenizer, prompt, completion, tokenization, max_length=limit)
    assert cut.truncated and len(cut.ids) == limit
    opening = 1 if kind in ("llama", "mistral", "gemma", "bert") else 0
    assert cut.ids == whole.ids[:opening] + whole.ids[len(whole.ids) - limit + opening :]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_truncation_of_a_long_completion_cuts_it_at_the_right(kind):
    tokenizer = tiny_tokenizer(kind)
    tokenization = TokenizationSettings.for_training(tokenizer)
    prompt, completion = "Well?", " the answer is 56, and then some more words about the weather in the city"
    whole = encode(tokenizer, prompt, completion, tokenization).ids
    cut = encode(tokenizer, prompt, completion, tokenization, max_length=8)
    assert cut.truncated and len(cut.ids) == 8
    text = tokenizer.decode(cut.ids, skip_special_tokens=True)
    assert text.strip().lower().startswith("the answer")
    if kind == "bert":
        assert cut.ids[0] == tokenizer.cls_token_id and cut.ids[-1] == tokenizer.sep_token_id
    else:
        assert whole[-1] == tokenizer.eos_token_id and cut.ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["llama", "qwen", "mistral"])
def test_truncation_of_a_chat(kind):
    tokenizer, tokenization = tiny_tokenizer(kind), TokenizationSettings(append_eos=True)
    prompt = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 3}]
    whole = encode(tokenizer, prompt, "The answer is 56.", tokenization).ids
    cut = encode(tokenizer, prompt, "The answer is 56.", tokenization, max_length=len(whole) - 20)
    opening = int(whole[0] == tokenizer.bos_token_id)
    assert cut.truncated and cut.ids == whole[:opening] + whole[opening + 20 :]
    short = encode(tokenizer, prompt, "The answer is 56. " * 8, tokenization, max_length=12).ids
    assert len(short) == 12 and "The answer is 56" in tokenizer.decode(short)


def test_truncation_needs_room_for_one_token():
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        encode(tiny_tokenizer("bert"), "a", "b c d e", TokenizationSettings(False), max_length=2)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_truncation_never_exceeds_the_limit_and_keeps_a_suffix_of_the_whole(kind):
    tokenizer = tiny_tokenizer(kind)
    tokenization = TokenizationSettings.for_training(tokenizer)
    rng = random.Random(0)
    words = ["apples", "\n\n", "12", "Über", "日本", "🙂", "don't", "a", "  "]
    for _ in range(40):
        prompt = " ".join(rng.choices(words, k=rng.randint(0, 12)))
        completion = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        whole = encode(tokenizer, prompt, completion, tokenization).ids
        limit = rng.randint(4, 30)
        cut = encode(tokenizer, prompt, completion, tokenization, max_length=limit)
        assert cut.truncated == (len(whole) > limit)
        assert len(cut.ids) == min(limit, len(whole))


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 9]], 2),
        ([[1, 2], [1, 2]], 1),
        ([[1, 2, 3], [1, 2]], 1),
        ([[1], [1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4], [5, 2, 3]], 0),
        ([[7, 8, 9]], 2),
        ([[1], []], 0),
        ([], 0),
    ],
)
def test_common_prefix_length(sequences, expected):
    assert common_prefix_length(sequences) == expected


def test_common_prefix_length_against_brute_force():
    rng = random.Random(1)
    for _ in range(300):
        sequences = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
        shortest = min(map(len, sequences))
        agreeing = [n for n in range(shortest) if len({tuple(sequence[:n]) for sequence in sequences}) == 1]
        assert common_prefix_length(sequences) == max(agreeing)
