"""The test helpers themselves: tokenizers are like the real ones and survive saving, rows mean what they say."""

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import (
    DECODER_FAMILIES,
    ENCODER_FAMILIES,
    TOKENIZER_KINDS,
    pair_rows,
    ranked_rows,
    save_tiny_model,
    tiny_tokenizer,
)


TEXT = "Über 日本語 don't 123 + 4\n\nStep 2: good   answer 🙂"


@pytest.mark.parametrize("pad", ["dedicated", "eos", None])
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_tokenizer_survives_saving(kind, pad, tmp_path):
    if kind == "bert" and pad == "eos":
        with pytest.raises(ValueError, match="no eos"):
            tiny_tokenizer(kind, pad)
        return
    tokenizer = tiny_tokenizer(kind, pad)
    assert (tokenizer.pad_token is None) == (pad is None)
    assert (pad == "eos") == (tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "fine"}]
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert loaded.pad_token_id == tokenizer.pad_token_id
    if kind != "bert":  # lower-cases
        assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True).strip() == TEXT


def test_tokenizers_are_of_their_kind():
    def tokens(kind: str, text: str) -> list[str]:
        tokenizer = tiny_tokenizer(kind)
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert tokens("llama", "123")[:2] == ["<|begin_of_text|>", "123"]  # digits in threes
    assert tokens("qwen", "123") == ["1", "2", "3"]  # digits one by one, no bos
    assert tokens("mistral", "日")[:2] == ["<s>", "▁"] and "<0xE6>" in tokens("mistral", "日")  # byte fallback
    assert tokens("gemma", "日")[0] == "<bos>" and "<0xE6>" in tokens("gemma", "日")
    assert tokens("gpt2", " 3") == ["Ġ3"]
    assert tokens("bert", "Good")[0] == "[CLS]" and tokens("bert", "Good")[-1] == "[SEP]"
    assert tiny_tokenizer("bert").eos_token is None


@pytest.mark.parametrize("family", [*DECODER_FAMILIES, *ENCODER_FAMILIES])
def test_checkpoint_has_no_head_yet(family, tmp_path):
    save_tiny_model(tmp_path, family)
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert any(name.startswith(("score", "classifier")) for name in info["missing_keys"])
    assert all(name.split(".")[-2] in ("score", "classifier", "dense", "out_proj") for name in info["missing_keys"])


def test_rows_mean_what_they_say():
    def goodness(text: str) -> int:
        return sum(text.count(word) for word in ("good", "clear", "correct", "kind"))

    assert pair_rows(5) == pair_rows(5) != pair_rows(5, seed=1)
    assert all(goodness(row["chosen"]) > goodness(row["rejected"]) for row in pair_rows(50))
    rows = ranked_rows(50, k=5, ragged=True, ties=True)
    assert {len(row["completions"]) for row in rows} == {2, 3, 4, 5}
    assert all(list(map(goodness, row["completions"])) == row["ratings"] for row in rows)
    assert any(len(set(row["ratings"])) < len(row["ratings"]) for row in rows)
    for row in ranked_rows(20, k=4, ties=True, ranks=True, chat=True):
        levels = [goodness(completion[0]["content"]) for completion in row["completions"]]
        assert row["ranks"] == [sum(other > level for other in levels) for level in levels]
