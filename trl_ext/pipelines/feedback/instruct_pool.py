"""The tasks of self-instruct: seeds, the filters of new instructions and instances, and ROUGE-L to what is there.

This module knows tasks and texts. It does not know where new ones come from.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.data.validation import RowChecks, shown
from trl_ext.pipelines.stages.row_file import read_rows


Instance = dict[str, str]
"""An input, which may be empty, and an output."""

# The words by which Wang et al. recognise tasks that a model of texts cannot do.
KEYWORDS = (
    ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot")
    + ("go to", "video", "audio", "music", "flowchart", "diagram")
)  # fmt: skip

# Each sign of a script without spaces is a word; otherwise a word is a run of letters and digits.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_OPENERS = "\"'“‘«»(¿¡"


@dataclass(frozen=True)
class Task:
    """
    An instruction with its instances.

    Args:
        instruction (`str`): what to do.
        is_classification (`bool`): whether the output is one of a fixed set of labels.
        instances (`list[dict]`): inputs (`""`: the task needs none) and outputs.
    """

    instruction: str
    is_classification: bool
    instances: list[Instance]


def read_seeds(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Task]:
    """
    The seed tasks of a JSONL file, or of rows.

    A row has `instruction`, `output`, and optionally `input` (default: none) and `is_classification` (default: false).

    Raises:
        ValueError: there are none.
        [`DataError`]: a row lacks a text or repeats an instruction; it names the row and the column.
    """
    rows = read_rows(str(source)) if isinstance(source, (str, Path)) else [dict(row) for row in source]
    seeds: dict[str, Task] = {}
    for number, row in enumerate(rows):
        checks = RowChecks(number, "seed")
        texts = {name: row.get(name) for name in ("instruction", "input", "output")}
        texts["input"] = texts["input"] or ""
        for name, value in texts.items():
            if not isinstance(value, str) or not (value.strip() or name == "input"):
                raise checks.error(name, shown(value), "a text", "Correct or remove the row.")
        kind = row.get("is_classification", False)
        if not isinstance(kind, bool):
            raise checks.error("is_classification", shown(kind), "true or false", "Correct the value.")
        instruction = texts["instruction"].strip()
        if instruction in seeds:
            raise checks.error("instruction", "one that an earlier row has", "another one", "Remove the row.")
        instance = {"input": texts["input"].strip(), "output": texts["output"].strip()}
        seeds[instruction] = Task(instruction, kind, [instance])
    if not seeds:
        raise ValueError("There are no seed tasks; needed: rows with an instruction and an output.")
    return list(seeds.values())


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def check_rapidfuzz() -> None:
    """Raise `ImportError` if rapidfuzz, which computes ROUGE-L, is not installed."""
    if importlib.util.find_spec("rapidfuzz") is None:
        raise ImportError(
            "self-instruct needs rapidfuzz, which is not installed. Run: pip install 'trl-ext[self-instruct]'."
        )


class Nearest:
    """
    Finds the text with the largest ROUGE-L to a new one.

    ROUGE-L (F1) of m and n words with a longest common subsequence of l words is 2 l / (m + n). See *ROUGE* by C.-Y.
    Lin (https://aclanthology.org/W04-1013). rapidfuzz computes it, with a character for each word.
    """

    def __init__(self, texts: Iterable[str] = ()):
        check_rapidfuzz()
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        self._extract, self._scorer = process.extractOne, Indel.normalized_similarity
        self._characters: dict[str, str] = {}
        self._texts: list[str] = []
        self.extend(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def extend(self, texts: Iterable[str]) -> None:
        """Add texts."""
        self._texts += map(self._encoded, texts)

    def forget_after(self, number: int) -> None:
        """Keep only the first `number` texts."""
        del self._texts[number:]

    def __call__(self, text: str) -> tuple[float, int | None]:
        """The largest ROUGE-L to a text, in [0, 1], and the place of that text; `(0.0, None)` without texts."""
        found = self._extract(self._encoded(text), self._texts, scorer=self._scorer)
        return (0.0, None) if found is None else (found[1], found[2])

    def _encoded(self, text: str) -> str:
        first, known = 0x10000, self._characters  # above the surrogates, which are no characters
        return "".join(known.setdefault(word, chr(first + len(known))) for word in words_of(text))


@dataclass(frozen=True)
class Filters:
    """Which instructions are kept; the defaults are those of Wang et al."""

    max_similarity: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keywords: tuple[str, ...] = KEYWORDS

    def __post_init__(self) -> None:
        if not 0 < self.max_similarity <= 1:
            raise ValueError(f"max_similarity={self.max_similarity}; needed: a number above 0 and up to 1.")
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words={self.min_words} and max_words={self.max_words}; needed: 1 <= min_words <= max_words."
            )


class Pool:
    """
    The tasks so far, seeds first, and what a new instruction must be to join them.

    Args:
        seeds (sequence of [`Task`]): the seeds.
        filters ([`Filters`]): see there.
    """

    def __init__(self, seeds: Sequence[Task], filters: Filters):
        self.seeds, self.generated = list(seeds), list[Task]()
        self._filters = filters
        parts = [re.escape(word) for word in filters.keywords]
        self._keyword = re.compile(rf"\b(?:{'|'.join(parts)})\b", re.IGNORECASE) if parts else None
        self._nearest = Nearest(task.instruction for task in seeds)
        self._known = {tuple(words_of(task.instruction)) for task in seeds}

    def screen(self, instructions: Sequence[str]) -> list[tuple[str | None, float | None]]:
        """
        Which instructions of a round pass.

        Each is compared with the tasks of the pool, and with those of the round that have passed before it.

        Returns:
            `list[tuple]`: for each, the reason why it fails (`None`: it passes) and its largest ROUGE-L (`None` if
            another filter comes first).
        """
        size, known = len(self._nearest), set(self._known)
        found = []
        for text in instructions:
            words = tuple(words_of(text))
            reason, similarity = self._reason(text, words), None
            if reason is None and words in known:
                reason = "duplicate"
            if reason is None:
                similarity, _ = self._nearest(text)
                reason = "similar" if similarity >= self._filters.max_similarity else None
            if reason is None:
                self._nearest.extend([text])
                known.add(words)
            found.append((reason, similarity))
        self._nearest.forget_after(size)  # those that get an instance come back with `add`
        return found

    def add(self, task: Task) -> None:
        """Add a task that has passed."""
        self.generated.append(task)
        self._nearest.extend([task.instruction])
        self._known.add(tuple(words_of(task.instruction)))

    def _reason(self, text: str, words: Sequence[str]) -> str | None:
        if len(words) < self._filters.min_words:
            return "too_short"
        if len(words) > self._filters.max_words:
            return "too_long"
        if not text[0].isalnum() and text[0] not in _OPENERS:
            return "punctuation"
        if self._keyword is not None and self._keyword.search(text):
            return "keyword"
        return None


def screen_instances(instruction: str, instances: Sequence[Instance]) -> tuple[list[Instance], Counter[str]]:
    """
    The instances of a task that are kept, and the number of the others by reason.

    An output must not be empty, and must not repeat the input or the instruction. Equal instances are kept once, and
    instances with one input and several outputs not at all.
    """
    dropped: Counter[str] = Counter()
    fine: list[Instance] = []
    for instance in instances:
        output = instance["output"].casefold()
        if not output:
            dropped["empty_output"] += 1
        elif output in (instance["input"].casefold(), instruction.casefold()):
            dropped["repeats_input"] += 1
        elif instance in fine:
            dropped["duplicate_instance"] += 1
        else:
            fine.append(instance)
    times = Counter(instance["input"] for instance in fine)
    kept = [instance for instance in fine if times[instance["input"]] == 1]
    dropped["conflicting_outputs"] = len(fine) - len(kept)
    return kept, +dropped
