"""The prompts of self-instruct, and what the model's answers to them say.

Four templates ask for new instructions, for the kind of a task, and for an input and an output in either order. What
an answer lacks is returned as a reason, so that it can be counted. This module knows texts. It does not know models,
or which tasks are kept.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trl_ext.pipelines.feedback.instruct_pool import Instance, Task
from trl_ext.pipelines.feedback.templates import FOLDER, PromptTemplate
from trl_ext.pipelines.generation.sampling import Chat


Style = Literal["completion", "chat"]
STYLES = ("completion", "chat")

# Template -> the fields that it must use, and those that it may use.
FIELDS = {
    "instruction": (("demonstrations",), ("number",)),
    "classification": (("instruction",), ("examples",)),
    "input_first": (("instruction",), ("examples",)),
    "output_first": (("instruction",), ("examples",)),
}

_NUMBERED = re.compile(r"^[ \t]*(\d+)[.)][ \t]*", re.MULTILINE)
_KEY = re.compile(r"^[ \t*#]*(input|output|label)[ \t*]*:[ \t*]*", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"\n[ \t*#]*task[ \t]*\d*[ \t*]*:", re.IGNORECASE)
_LABEL = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_NO_INPUT = {"", "none", "no input", "n/a", "not applicable", "noinput"}


@dataclass(frozen=True)
class InstructPrompts:
    """
    The four templates, and the examples that they show.

    Args:
        style (`str`): `"completion"`: prompts are texts that a base model continues. `"chat"`: prompts are messages.
        templates (`dict[str, PromptTemplate]`): by name, see `FIELDS`.
        seeds (sequence of [`Task`]): where the examples come from.
        seed (`int`): which examples are drawn. They are the same in every prompt.
        num_classification_examples, num_other_examples (`int`): most examples that the question for the kind shows.
        num_instance_examples (`int`): most examples that the questions for inputs and outputs show.
    """

    style: Style
    templates: Mapping[str, PromptTemplate]
    seeds: Sequence[Task]
    seed: int
    num_classification_examples: int
    num_other_examples: int
    num_instance_examples: int

    def instruction(self, demonstrations: Sequence[str], number: int) -> str | Chat:
        """Ask for `number` new instructions like these."""
        return self._prompt("instruction", demonstrations=list(demonstrations), number=number)

    def classification(self, instruction: str) -> str | Chat:
        """Ask whether a task has fixed labels."""
        chosen = [
            *self._examples(True, self.num_classification_examples),
            *self._examples(False, self.num_other_examples),
        ]
        random.Random(f"order {self.seed}").shuffle(chosen)
        return self._prompt("classification", instruction=instruction, examples=chosen)

    def instances(self, instruction: str, is_classification: bool) -> str | Chat:
        """Ask for an input and an output; of a classification task for the label first."""
        name = "output_first" if is_classification else "input_first"
        examples = self._examples(is_classification, self.num_instance_examples)
        return self._prompt(name, instruction=instruction, examples=examples)

    def stops(self, name: str, demonstrations: int, number: int) -> list[str]:
        """The texts that end an answer of a base model, which would go on with the next task."""
        if self.style == "chat":
            return []
        if name == "instruction":
            return [f"\n{demonstrations + number + 1}."]
        return ["\n"] if name == "classification" else ["\nTask:"]

    def _examples(self, is_classification: bool, number: int) -> list[dict[str, Any]]:
        fitting = [task for task in self.seeds if task.is_classification == is_classification]
        drawn = random.Random(f"examples {self.seed}").sample(fitting, min(number, len(fitting)))
        return [
            {"instruction": task.instruction, "is_classification": is_classification, **task.instances[0]}
            for task in drawn
        ]

    def _prompt(self, name: str, **fields: Any) -> str | Chat:
        text = self.templates[name].render(**fields)
        return text if self.style == "completion" else [{"role": "user", "content": text}]

    # ----------------------------------------------------------------------------------------------------- answers
    def read_instructions(
        self, text: str, cut: bool, number: int, demonstrations: int | None = None
    ) -> tuple[list[str], Counter[str]]:
        """
        The instructions of an answer, and the number of those that it spoils, by reason.

        A line begins an item only if it has the next number of the list. An item may so contain a list.

        Args:
            text (`str`): a numbered list. After a completion prompt it begins within the first item.
            cut (`bool`): whether the answer was cut at `max_completion_length`, so that its last item is not whole.
            number (`int`): how many were asked for.
            demonstrations (`int`, *optional*): how many the prompt showed. A completion goes on with their numbers.
        """
        goes_on = self.style == "completion" and demonstrations is not None
        preface, *items = _split(text, demonstrations + 2 if goes_on else None)
        if self.style == "completion":
            items = [preface, *items]
        if not items:
            return [], Counter(no_list=1)
        spoilt: Counter[str] = Counter()
        if cut:
            items, spoilt["cut"] = items[:-1], 1
        # what comes after an empty line no longer belongs to the item
        whole = [" ".join(item.strip().split("\n\n")[0].split()).strip("*# ") for item in items]
        found = [item for item in whole if item]
        spoilt["empty"], spoilt["surplus"] = len(whole) - len(found), max(0, len(found) - number)
        return found[:number], +spoilt

    @staticmethod
    def read_classification(text: str) -> bool | None:
        """Whether the answer says yes; `None` if it says neither yes nor no."""
        match = _LABEL.match(text)
        return None if match is None else match[1].lower() == "yes"

    def read_instances(self, text: str, is_classification: bool, cut: bool) -> tuple[list[Instance], str | None]:
        """
        The inputs and outputs of an answer.

        Returns:
            `tuple`: the instances, and the reason if there are none: `"no_instance"`, or `"cut"` for an answer whose
            only instance was cut at `max_completion_length`.
        """
        first, last = ("label", "input") if is_classification else ("input", "output")
        if self.style == "completion":
            text = f"{first}: {text}"
        end = _END.search(text)
        _, *parts = _KEY.split(text[: end.start()] if end else text)
        found, held = [], ""
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            if key.lower() == first:
                held = value.strip()
            elif key.lower() == last:
                value = value.strip()
                source, target = (value, held) if is_classification else (held, value)
                no_input = source.strip(" .<>()[]\"'").lower() in _NO_INPUT
                found.append({"input": "" if no_input else source, "output": target})
                held = ""
        if not found:
            return [], "no_instance"
        if cut and end is None:
            found = found[:-1]
        return found, None if found else "cut"


def _split(text: str, number: int | None) -> list[str]:
    """A text at the items of its numbered list. The first item has this number, by default that of the first line."""
    pieces, start = [], 0
    for match in _NUMBERED.finditer(text):
        if number in (None, int(match[1])):
            pieces.append(text[start : match.start()])
            start, number = match.end(), int(match[1]) + 1
    return [*pieces, text[start:]]


def read_templates(style: Style, folder: str | Path | None = None) -> dict[str, PromptTemplate]:
    """
    The templates of a style.

    Args:
        style (`str`): `"completion"` or `"chat"`.
        folder (`str` or `Path`, *optional*): a folder with files such as `instruction.jinja`, which replace those of
            the package.

    Raises:
        ValueError: the folder has no template, or one does not have the fields that it needs.
    """
    own = {} if folder is None else {path.stem: path for path in sorted(Path(folder).glob("*.jinja"))}
    unknown = sorted(set(own) - set(FIELDS))
    if folder is not None and (unknown or not own):
        found = ", ".join(f"{name}.jinja" for name in unknown) or "no template"
        raise ValueError(f"{folder} holds {found}; needed: some of {', '.join(f'{name}.jinja' for name in FIELDS)}.")
    return {
        name: PromptTemplate.read(
            own.get(name, FOLDER / "self_instruct" / style / f"{name}.jinja"), needed=needed, optional=optional
        )
        for name, (needed, optional) in FIELDS.items()
    }
