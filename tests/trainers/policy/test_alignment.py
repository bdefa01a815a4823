"""Characters of a completion and the tokens that a policy wrote, for every kind of tokenizer."""

import random

import pytest

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.trainers.policy.alignment import token_ends, token_of


TEXTS = ["2 + 2 = 4\nSo it is.", "größe 🙂 naïve\n\nend", " a  b   c", "日本語のテスト", "x", ""]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_ends_are_those_of_decoded_prefixes(kind):
    tokenizer = tiny_tokenizer(kind)
    rng = random.Random(0)
    vocabulary = len(tokenizer)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    rows += [[rng.randrange(vocabulary) for _ in range(12)] for _ in range(20)]  # what a policy may write
    for ids in rows:
        text, ends = token_ends(tokenizer, ids)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ends) == len(ids)
        assert ends == sorted(ends)
        assert not ids or ends[-1] <= len(text)
        for place, end in enumerate(ends):
            prefix = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
            if "\ufffd" not in prefix:  # no character is open, and a decoder of single bytes marks whole runs as open
                assert prefix[:end] == text[:end]


def test_a_character_belongs_to_the_token_that_completes_it():
    assert token_of([1, 1, 3], 1) == 0
    assert token_of([1, 1, 3], 2) == 2
    assert token_of([0, 0, 2], 1) == 2
    assert token_of([1, 2], 3) is None


def test_what_ends_the_text_counts_at_the_token_that_ends_the_completion():
    """The end-of-sequence token adds no character. It must not be the one token without a reward."""
    assert token_of([1, 2, 4, 4], 4) == 3
    assert token_of([1, 2, 4, 4], 2) == 1
    assert token_of([], 0) is None


def test_end_of_sequence_and_padding_hold_no_characters():
    tokenizer = tiny_tokenizer("llama")
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    text, ends = token_ends(tokenizer, [*ids, tokenizer.eos_token_id])
    assert text == "one two"
    assert ends[-1] == ends[-2] == len(text)
