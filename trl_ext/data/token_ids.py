"""Texts -> token ids, by the quickest way that gives the ids of the tokenizer's own call.

Calling a tokenizer of transformers also makes masks and token types, which takes a fifth of the time. This module
calls the Rust tokenizer behind it. Where a tokenizer splits a text into words first (byte-level BPE), two more things
save time. Neighbouring texts that begin alike (the candidates of one prompt) are cut after a word that they share, and
that part is tokenized once. The other parts are cut between words, and a word that has been met keeps its ids. It
knows tokenizers. It does not know rows, chats or settings.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE


# Where transformers defines the two methods that turn texts into ids. A tokenizer that overrides one is called.
_DEFINED_IN = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")
# Fewer texts, or a shorter shared part, are not worth the check of the tokenizer.
_MANY_TEXTS, _LONG_PART = 64, 64
# Normalizers that change neither a space nor the ASCII letter or digit beside it, or change each letter alone.
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
# What lets a regular expression see the text around a match. `\s+(?!\S)`, which most of them have, is harmless here.
_LOOKS_AROUND = re.compile(r"\(\?[=!<]|\\[bBAzZGK]|[$^]")
_MARKS = ".,:;!?)\"'"
_WORDS = (
    "a b C d E F gh Ij KL mN it's be don't Go 1 a 23 B 456 7 c8 9d "
    + "".join(f"a{m} B{m} 1{m} 2 " for m in _MARKS)
    + "c"
)
# A text whose ids tell apart tokenizers that were trained on other texts.
_SAMPLE = f"{_WORDS} preference reward model tokenization, 'Sprache' différence 語 3.14 \n\n}} // import"
# A space behind an ASCII letter, digit or mark and before a letter or digit. `re` is quicker with the space first.
_BETWEEN_WORDS = re.compile(rf" (?<=[A-Za-z0-9{_MARKS}] )(?=[A-Za-z0-9])")
# Characters of the words whose ids are kept; they take some 30 MiB.
_KEPT_CHARACTERS = 1_000_000
# Tokenizer -> the words that it has met, with their ids.
_met_words: "WeakKeyDictionary[Any, _Words]" = WeakKeyDictionary()


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """
    The token ids of texts: `tokenizer(text=texts)["input_ids"]`.

    Args:
        tokenizer: a tokenizer of transformers.
        texts (sequence of `str`): any number of texts. Put those that begin alike beside each other.
        add_special_tokens (`bool`): whether the tokenizer adds its own special tokens.
    """
    backend = _plain_backend(tokenizer)
    if backend is None or not texts:
        return tokenizer(text=texts, add_special_tokens=add_special_tokens)["input_ids"]
    around = _special_tokens(backend, add_special_tokens) if len(texts) >= _MANY_TEXTS else None
    if around is None or not _splits_between_words(backend):
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    opening, closing = around
    runs = list(_runs(texts))
    parts = [part for run in runs for part in run.parts(texts)]
    found = iter(_ids_by_words(tokenizer, backend, parts))
    ids = []
    for run in runs:
        shared = opening + (next(found) if run.cut else [])
        ids += [shared + next(found) + closing for _ in range(run.start, run.end)]
    return ids


def _plain_backend(tokenizer: Any) -> Backend | None:
    """The Rust tokenizer, set up as a call would; `None` for a tokenizer without one, or with a call of its own."""
    # tokenizers in Python and of mistral-common have no backend
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        return None
    kind = type(tokenizer)
    if (kind.__call__.__module__, kind._encode_plus.__module__) != _DEFINED_IN:
        return None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


# ------------------------------------------------------------------------------------------------------- shared parts
class _Run(NamedTuple):
    """Texts from `start` up to, not including, `end`, whose first `cut` characters are equal."""

    start: int
    end: int
    cut: int

    def parts(self, texts: Sequence[str]) -> Iterator[str]:
        """The shared part, if there is one, and the rest of each text."""
        if self.cut:
            yield texts[self.start][: self.cut]
        for number in range(self.start, self.end):
            yield texts[number][self.cut :]


def _runs(texts: Sequence[str]) -> Iterator[_Run]:
    """All texts in order, in runs that share a part; a text that shares none is a run with `cut` 0."""
    start = 0
    while start < len(texts):
        first, end = texts[start], start + 1
        cut = _place_to_cut(first, _equal_characters(first, texts[end])) if end < len(texts) else 0
        if cut:
            seen = first[: cut + 2]  # the space behind the part and the character that follows are equal too
            while end < len(texts) and texts[end].startswith(seen):
                end += 1
        yield _Run(start, end, cut)
        start = end


def _equal_characters(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _place_to_cut(text: str, length: int) -> int:
    """The last space within `length` characters between two ASCII letters or digits; 0 if there is none."""
    place = text.rfind(" ", 0, max(0, length - 1))
    while place >= _LONG_PART:
        around = text[place - 1] + text[place + 1]
        if around.isascii() and around.isalnum():
            return place
        place = text.rfind(" ", 0, place)
    return 0


# -------------------------------------------------------------------------------------------------------------- words
class _Words:
    """The ids of words that a tokenizer has met while it was in one state; `state` says in which."""

    def __init__(self, state: tuple[Any, ...]):
        self.state = state
        self.ids: dict[str, list[int]] = {}
        self.characters = 0


def _ids_by_words(tokenizer: Any, backend: Backend, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without special tokens. Each text is cut between words, and each new word is tokenized once.

    A word is what stands between two cuts. Its key lacks the space before it; the first word of a text has none, and
    its key starts with a space instead. A word that starts after a cut never does.
    """
    words, state = _met_words.get(tokenizer), _state(backend)
    if words is None or words.state != state or words.characters > _KEPT_CHARACTERS:
        words = _met_words[tokenizer] = _Words(state)
    cut = [_BETWEEN_WORDS.split(text) for text in texts]
    for pieces in cut:
        pieces[0] = " " + pieces[0]
    new = list(set(chain.from_iterable(cut)).difference(words.ids))
    found = backend.encode_batch_fast(
        [word[1:] if word.startswith(" ") else " " + word for word in new], add_special_tokens=False
    )
    words.ids.update(zip(new, [one.ids for one in found], strict=True))
    words.characters += sum(map(len, new))
    ids_of = words.ids.__getitem__
    return [list(chain.from_iterable(map(ids_of, pieces))) for pieces in cut]


def _state(backend: Backend) -> tuple[Any, ...]:
    """What the ids of a word depend on, except for the merges of the model: these give the ids of a sample."""
    return (
        backend.normalizer and backend.normalizer.__getstate__(),
        backend.pre_tokenizer.__getstate__(),
        repr(sorted(backend.get_added_tokens_decoder().items())),
        backend.encode_special_tokens,
        backend.get_vocab_size(),
        backend.encode(_SAMPLE, add_special_tokens=False).ids,
    )


def _special_tokens(backend: Backend, add_special_tokens: bool) -> tuple[list[int], list[int]] | None:
    """The tokens that the tokenizer puts before and behind a text; `None` where that is not all that it does."""
    if not add_special_tokens:
        return [], []
    bare, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return None


def _splits_between_words(backend: Backend) -> bool:
    """Whether a text that is cut before a space between two letters or digits has the tokens of its two parts."""
    model, normalizer, splitter = backend.model, backend.normalizer, backend.pre_tokenizer
    if not isinstance(model, BPE) or model.dropout is not None or splitter is None:
        return False
    if normalizer is not None and not all(one["type"] in _NORMALIZERS for one in _steps(normalizer, "normalizers")):
        return False
    if not all(map(_looks_at_each_place, _steps(splitter, "pretokenizers"))):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if " " in token.content or token.lstrip or token.rstrip or token.single_word:
            return False
    starts = {start for _, (start, _) in splitter.pre_tokenize_str(_WORDS)}
    return all(place in starts for place, letter in enumerate(_WORDS) if letter == " ")


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    state = json.loads(part.__getstate__())
    return state[inner] if state["type"] == "Sequence" else [state]


def _looks_at_each_place(step: dict[str, Any]) -> bool:
    """Whether a step of the splitter decides where a piece ends by the characters of the piece and the next one."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Digits":
        return True
    if step["type"] != "Split" or step["invert"] or step["behavior"] != "Isolated":
        return False
    pattern = step["pattern"].get("Regex")
    return pattern is not None and not _LOOKS_AROUND.search(pattern.replace(r"\s+(?!\S)", "").replace("[^", "["))
