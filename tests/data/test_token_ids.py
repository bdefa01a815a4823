"""The quick way to token ids gives the ids of the tokenizer's own call, also where texts that begin alike are cut."""

import random

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data import token_ids as module
from trl_ext.data.token_ids import token_ids


CUT = {"llama", "qwen", "gpt2"}  # byte-level BPE


@pytest.fixture
def short(monkeypatch):
    """Every shared part is worth a cut."""
    monkeypatch.setattr(module, "_LONG_PART", 1)
    monkeypatch.setattr(module, "_MANY_TEXTS", 2)


def texts_that_begin_alike(tokenizer, number: int) -> list[str]:
    """Random texts in groups of 2 to 4 with one beginning; words, spaces, marks, special tokens, half a letter."""
    rng = random.Random(0)
    specials = [token for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) if token]
    pieces = [*"abzAZ    0918'.,\n\t<>|_é你🙂\u0301", " a", " the", "n't", "  ", " 12 ", *specials]
    texts: list[str] = []
    while len(texts) < number:
        shared = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        texts += [shared + "".join(rng.choices(pieces, k=rng.randint(0, 15))) for _ in range(rng.randint(2, 4))]
    return texts


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_the_ids_are_those_of_the_call(kind, short):
    tokenizer = tiny_tokenizer(kind)
    texts = texts_that_begin_alike(tokenizer, 600)
    assert sum(run.cut > 0 for run in module._runs(texts)) > 50
    assert module._splits_between_words(tokenizer.backend_tokenizer) == (kind in CUT)
    for special in (True, False):
        assert token_ids(tokenizer, texts, special) == tokenizer(text=texts, add_special_tokens=special)["input_ids"]
    tokenizer.split_special_tokens = True
    assert token_ids(tokenizer, texts[:60], True) == tokenizer(text=texts[:60])["input_ids"]


def test_a_call_that_cut_or_padded_before_changes_nothing(short):
    tokenizer = tiny_tokenizer()
    texts = texts_that_begin_alike(tokenizer, 40)
    expected = tokenizer(text=texts)["input_ids"]
    tokenizer(text=texts, padding=True, truncation=True, max_length=4)
    assert token_ids(tokenizer, texts, True) == expected


def sentences(number: int) -> list[str]:
    """Random texts of words and marks, where most spaces are places to cut."""
    rng = random.Random(1)
    words = [
        "a",
        "the",
        "Paris",
        "7",
        "42nd",
        "it's",
        "end.",
        "so,",
        "why?",
        "(b)",
        "'c'",
        "d;",
        "e\n\nF",
        "né",
        "语",
        "x  y",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in range(number)]


def test_words_that_were_met_keep_the_ids_of_the_call(short, monkeypatch):
    for kind in sorted(CUT):
        tokenizer = tiny_tokenizer(kind)
        for texts in (sentences(200), sentences(300)[200:]):
            assert token_ids(tokenizer, texts, True) == tokenizer(text=texts)["input_ids"]
        met = module._met_words[tokenizer]
        assert len(met.ids) > 100
        monkeypatch.setattr(module, "_KEPT_CHARACTERS", met.characters - 1)
        assert token_ids(tokenizer, sentences(3), True) == tokenizer(text=sentences(3))["input_ids"]
        assert module._met_words[tokenizer].characters < met.characters


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.add_tokens(["Par"]),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "model", tiny_tokenizer("llama").backend_tokenizer.model),
    ],
)
def test_a_tokenizer_that_is_changed_forgets_the_words(change, short):
    tokenizer = tiny_tokenizer("gpt2")
    before = token_ids(tokenizer, sentences(50), True)
    change(tokenizer.backend_tokenizer)
    expected = tokenizer(text=sentences(50))["input_ids"]
    assert token_ids(tokenizer, sentences(50), True) == expected != before


def with_regex(pattern: str):
    def change(backend):
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_regex(r"\S+ \S+|\s+|\S+"),  # pieces of two words
        with_regex(r"(?<=a ) ?\w+|\s+|\S+"),  # reads what stands before
        with_regex(r"\S+(?= \w)|\s+|\S+"),  # reads what stands behind
        lambda backend: backend.add_tokens([AddedToken("the end")]),
        lambda backend: backend.add_tokens([AddedToken("stop", rstrip=True)]),
    ],
)
def test_a_tokenizer_that_may_look_across_a_word_is_not_cut(change, short):
    backend = tiny_tokenizer("gpt2").backend_tokenizer
    change(backend)
    assert not module._splits_between_words(backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["a b the end c stop a x y", "a b the end c stop a x z"]
    assert token_ids(tokenizer, texts, True) == tokenizer(text=texts)["input_ids"]


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text=None, **kwargs):
            return super().__call__(text=[one.upper() for one in text], **kwargs)

    plain = tiny_tokenizer("gpt2")
    loud = Shouting(tokenizer_object=plain.backend_tokenizer)
    assert token_ids(loud, ["abc"], True) == token_ids(plain, ["ABC"], True)
