"""Segmenters: what they find, and that their spans tile any text exactly."""

import random
import sys

import pytest

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data.segmentation import change_points, fixed_length, segmenters, sentences, steps


PIECES = [
    "apples",
    "12",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "日本語",
    "。",
    "！",
    "？",
    "「",
    "」",
    "🙂",
    "👩‍👩‍👧",
    "🇨🇭",
    "Über",
]
PIECES += [
    "e\u0301",
    "\u0301",
    "שלום",
    "مرحبا",
    "۔",
    "।",
    "don't",
    ".",
    "...",
    "…",
    "!",
    "?",
    '"',
    "“",
    "”",
    "(",
    ")",
    "Dr.",
    "e.g.",
]
PIECES += ["3.14", "1. ", "2)", "Step 3", "\u2028", "\x85", "\u3000", "\u200b", "\ufeff", "\x1c", "\x00", "-", "* "]


def random_texts(seed: str, count: int) -> list[str]:
    rng = random.Random(seed)
    texts = ["", " ", "\n", "\r\n\r\n", "a", "\u0301", "🙂"]
    return texts + ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(count)]


def check_tiles(text: str, spans: list[tuple[int, int]]) -> None:
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert all(start < end for start, end in spans)
    assert "".join(text[start:end] for start, end in spans) == text


def texts_of(text: str, spans: list[tuple[int, int]]) -> list[str]:
    check_tiles(text, spans)
    return [text[start:end] for start, end in spans]


def no_blank(text: str, spans: list[tuple[int, int]]) -> bool:
    return not text.strip() or all(text[start:end].strip() for start, end in spans)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_fixed_length_tiles_and_has_the_length(kind):
    tokenizer = tiny_tokenizer(kind)
    rng = random.Random(kind)
    for text in random_texts(kind, 150):
        length = rng.choice([1, 2, 3, 7, 100])
        spans = fixed_length(text, tokenizer=tokenizer, length=length)
        check_tiles(text, spans)
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert len(spans) <= max(-(-tokens // length), min(len(text), 1))
        if text.isascii() and kind in ("llama", "qwen", "gpt2") and text:  # a character is a token at least
            assert len(spans) == -(-tokens // length)


def test_half_a_surrogate_pair_is_a_character_as_any_other():
    """A JSON escape brings it in; libraries that want UTF-8 must not see it."""
    text = "Half \ud83d a pair. \ude42\ud83d!"
    assert texts_of(text, sentences(text)) == ["Half \ud83d a pair. ", "\ude42\ud83d!"]
    check_tiles(text, fixed_length(text, tokenizer=tiny_tokenizer("gpt2"), length=2))
    check_tiles(text, steps(text, separator=". "))
    assert change_points(text, reward=lambda prefixes: [0.0] * len(prefixes), penalty=1.0) == [(0, len(text))]


def test_fixed_length_by_hand():
    tokenizer = tiny_tokenizer("gpt2")
    text = "t answer is clear"
    assert tokenizer.tokenize(text) == ["t", "Ġanswer", "Ġis", "Ġclear"]
    assert texts_of(text, fixed_length(text, tokenizer=tokenizer, length=3)) == ["t answer is", " clear"]
    assert texts_of("🙂é", fixed_length("🙂é", tokenizer=tokenizer, length=1)) == ["🙂", "é"]
    assert texts_of("  a", fixed_length("  a", tokenizer=tokenizer, length=1)) == [" ", " a"]
    with pytest.raises(ValueError, match="at least 1 token"):
        fixed_length("a", tokenizer=tokenizer, length=0)


@pytest.mark.parametrize("language", ["en", "de", "zh", "ja", "hi", "ar", "xx"])
def test_sentences_tile(language):
    for text in random_texts(language, 300):
        spans = sentences(text, language=language)
        check_tiles(text, spans)
        assert no_blank(text, spans)


@pytest.mark.parametrize(
    ("language", "wanted"),
    [
        ("en", ["Dr. Smith et al. paid $3.50, i.e. 3.14 more. ", "Was it much? ", "No!"]),
        ("en", ["He said: “Is it 9.8?” ", "She didn't know."]),
        ("en", ["It works... ", "Mr. A. B. Jones lives in the U.S. since 1990. ", "Fine."]),
        ("en", ["One.\r\n\r\n", "Two. \n\n\n", "Three"]),
        ("en", ["🙂 Yes! ", "Cafe\u0301 au lait? ", "No 👩‍👩‍👧."]),
        ("de", ["Das kostet z. B. 3,50 Euro. ", "Am 3. Oktober ist frei."]),
        ("zh", ["今天天气很好。", "我们去公园吧！", "好吗？", "圆周率是3.14。"]),
        ("ja", ["日本語です。", "次の文「こんにちは。」", "と言った。"]),
        ("hi", ["यह एक वाक्य है। ", "यह दूसरा है।"]),
    ],
)
def test_sentences_by_hand(language, wanted):
    text = "".join(wanted)
    assert texts_of(text, sentences(text, language=language)) == wanted


@pytest.mark.parametrize("blank", ["\u00a0", "\u0085", "\u2009", "\u2028", "\u3000", " \u00a0"])
def test_sentences_with_a_wide_blank_before_a_full_stop(blank):
    """sentencex 1.0.32 panics there, which is no `Exception`."""
    text = f"Take vitamin A{blank}. It helps.{blank}"
    spans = sentences(text)
    check_tiles(text, spans)
    assert len(spans) <= 2


def test_steps_tile():
    for text in random_texts("steps", 400):
        for arguments in ({}, {"separator": "\n\n"}, {"separator": "."}, {"by": "number"}):
            spans = steps(text, **arguments)
            check_tiles(text, spans)
            assert no_blank(text, spans)


def test_numbered_steps_of_endless_white_space():
    """What a model that got stuck writes; quadratic time would be half an hour."""
    assert len(steps(" \t" * 150_000 + "x\n2. y", by="number")) == 2


def test_steps_by_hand():
    text = "\nAdd.\n\n  \nDouble.\n"
    assert texts_of(text, steps(text)) == ["\nAdd.\n\n  \n", "Double.\n"]
    assert texts_of("a ки b", steps("a ки b", separator=" ки ")) == ["a ки ", "b"]
    numbered = (
        "Let me see.\n1. Add:\n3.5 + 4 = 7.5\n  2) Double it.\nStep 3: done, **Step 4.** is not.\n(4) x\n12.5 is all."
    )
    assert texts_of(numbered, steps(numbered, by="number")) == [
        "Let me see.\n",
        "1. Add:\n3.5 + 4 = 7.5\n",
        "  2) Double it.\n",
        "Step 3: done, **Step 4.** is not.\n",
        "(4) x\n12.5 is all.",
    ]
    heads = "### Step 1\na\n**2.** b\n*Step 3*"
    assert texts_of(heads, steps(heads, by="number")) == ["### Step 1\na\n", "**2.** b\n", "*Step 3*"]
    assert steps("no number here", by="number") == [(0, 14)]
    with pytest.raises(ValueError, match="separator is empty"):
        steps("a", separator="")
    with pytest.raises(ValueError, match="by must be 'separator' or 'number'"):
        steps("a", by="line")


def test_steps_are_those_of_a_stepwise_row():
    rows = [["3 + 4 = 7", "7 * 2 = 14"], ["a", "b", "c"], ["Über 日本", "🙂"]]
    for row in rows:
        text = "".join(step + "\n" for step in row)
        assert texts_of(text, steps(text)) == [step + "\n" for step in row]


def test_change_points_tile():
    rng = random.Random(0)
    for text in random_texts("changes", 100):
        spans = change_points(text, reward=lambda prefixes: [rng.random() for _ in prefixes], penalty=0.2)
        check_tiles(text, spans)
        assert no_blank(text, spans)


def test_change_points_by_hand():
    text = " It is right. Very right. But wrong here. Wrong again. Fine."
    rewards = [0.9, 0.92, 0.1, 0.12, 0.11]
    asked = []

    def reward(prefixes):
        asked.append(prefixes)
        return rewards

    found = texts_of(text, change_points(text, reward=reward, penalty=0.05, units=sentences))
    assert found == [" It is right. Very right. ", "But wrong here. Wrong again. Fine."]
    assert asked == [[text[:end] for _, end in sentences(text)]]
    assert len(change_points(text, reward=reward, penalty=100.0, units=sentences)) == 1
    assert len(change_points(text, reward=reward, penalty=1e-9, units=sentences)) == 5
    words = change_points("a b  c", reward=lambda prefixes: [0, 1, 2], penalty=0.1)
    assert words == [(0, 2), (2, 5), (5, 6)]
    assert change_points("", reward=reward, penalty=1.0) == []


@pytest.mark.parametrize(
    ("rewards", "penalty", "message"),
    [
        ([0.0, 1.0], 0.0, "penalty must be above 0"),
        ([0.0, 1.0], float("nan"), "penalty must be above 0"),
        ([0.0], 1.0, "one finite number for each of 2 prefixes"),
        ([0.0, float("nan")], 1.0, "1 values that are not finite"),
    ],
)
def test_change_points_refuses(rewards, penalty, message):
    with pytest.raises(ValueError, match=message):
        change_points("a b", reward=lambda prefixes: rewards, penalty=penalty)


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("sentencex", lambda: sentences("A. B.")),
        ("ruptures", lambda: change_points("a b", reward=lambda prefixes: [0, 1], penalty=1.0)),
    ],
)
def test_a_missing_library_is_named(monkeypatch, library, call):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install 'trl-ext\[segment\]'"):
        call()


def test_registry():
    assert [name for name, _ in segmenters.available()] == ["change_points", "fixed_length", "sentences", "steps"]
    assert segmenters.get("sentences") is sentences
    with pytest.raises(ValueError, match="Did you mean 'sentences'"):
        segmenters.get("sentence")
