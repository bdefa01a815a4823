"""A prompt that ends with a begun answer, and the completion that continues it: one turn of the assistant."""

import pytest

from tests.tiny import tiny_tokenizer
from trl_ext.data.offsets import encode_with_offsets
from trl_ext.data.tokenization import TokenizationSettings, encode_candidates


USER = {"role": "user", "content": "2 + 2?"}
BEGUN = [USER, {"role": "assistant", "content": "It is"}]
SETTINGS = TokenizationSettings(append_eos=True)


@pytest.mark.parametrize("completion", [" four.", [{"role": "assistant", "content": " four."}]])
def test_it_has_the_ids_of_the_whole_answer(completion):
    tokenizer = tiny_tokenizer("llama")
    whole = encode_candidates(tokenizer, [USER], ["It is four."], SETTINGS)
    assert encode_candidates(tokenizer, BEGUN, [completion], SETTINGS) == whole


def test_labels_stand_behind_what_was_begun():
    tokenizer = tiny_tokenizer("llama")
    located = encode_with_offsets(tokenizer, BEGUN, " four.", SETTINGS)
    [whole] = encode_candidates(tokenizer, [USER], ["It is four."], SETTINGS)
    assert located.ids == whole
    begun = tokenizer.decode(located.ids[: located.completion_start])
    assert begun.rstrip().endswith("It is") and "four" not in begun


def test_a_call_of_a_tool_is_no_begun_answer():
    tokenizer = tiny_tokenizer("llama")
    call = {"role": "assistant", "content": "It is", "tool_calls": []}
    assert encode_candidates(tokenizer, [USER, call], [" four."], SETTINGS) == encode_candidates(
        tokenizer, BEGUN, [" four."], SETTINGS
    )
    call["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    [ids] = encode_candidates(tokenizer, [USER, call], ["four."], SETTINGS)
    assert "It isfour." not in tokenizer.decode(ids)
