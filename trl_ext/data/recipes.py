"""Public data sets as they are released -> rows with the columns that our trainers and `trl-ext evaluate` read.

A recipe is a pure function from one released row (or, for `helpsteer2`, from neighbouring rows) to our rows. Each
docstring names the data set. Answers become chat messages, and solutions in steps become texts. This file knows column
names. It downloads nothing.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from trl_ext.data.validation import DataError


logger = logging.getLogger(__name__)

Row = dict[str, Any]
Rows = Dataset | IterableDataset

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_PREFERENCE = {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
_RANKED = {"prompt": _MESSAGES, "completions": List(_MESSAGES)}
_STEPWISE = {"prompt": Value("string"), "completions": List(Value("string")), "labels": List(Value("float64"))}
_BATCH_ROWS = 1000
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_ROLES = {"human": "user", "user": "user", "assistant": "assistant"}
_STEP_END = "ки"  # the mark that Math-Shepherd puts behind each step


@dataclass(frozen=True)
class Recipe:
    """
    How the rows of one public data set are read.

    Args:
        columns (`dict`): our columns and their types.
        read (`Callable`): makes our rows of a released row; none if there is nothing to learn from it.
        needs (`tuple[str, ...]`): the released columns that `read` needs.
        neighbours (`str`, *optional*): if given, `read` gets a list: the neighbouring rows that have the same value in
            this column.
    """

    columns: dict[str, Any]
    read: Callable[[Any], Iterable[Row]]
    needs: tuple[str, ...]
    neighbours: str | None = None


# -------------------------------------------------------------------------------------------------- solutions in steps
def prm800k(row: Row) -> Iterator[Row]:
    """PRM800K as OpenAI released it (github.com/openai/prm800k; on the Hub e.g. `tasksource/PRM800K`): stepwise.

    One row is the solution that the labeller followed. Each other rated continuation of it becomes a row of its own,
    in which only the last step has a label, so that each rating counts once. A neutral rating (0) counts as right, as
    in the paper's best way to score (*Let's Verify Step by Step* by H. Lightman et al.,
    https://huggingface.co/papers/2305.20050); `prm800k_neutral` keeps it. A step that the labeller wrote has no label.
    Problems that the labeller called bad are left out.
    """
    for found in prm800k_neutral(row):
        yield {**found, "labels": [None if label is None else float(label >= 0) for label in found["labels"]]}


def prm800k_neutral(row: Row) -> Iterator[Row]:
    """As `prm800k`, with the labels -1, 0 and 1 as they are: train with `num_labels=3`."""
    label = row["label"]
    if label.get("finish_reason") == "bad_problem":
        return
    prompt = row["question"]["problem"] + "\n"
    steps: list[str] = []
    labels: list[int | None] = []
    for step in label["steps"]:
        rated, chosen = step.get("completions") or [], step.get("chosen_completion")
        for place, other in enumerate(rated):
            if place != chosen and other.get("rating") is not None:
                before = [None] * len(steps)
                yield {"prompt": prompt, "completions": [*steps, other["text"]], "labels": [*before, other["rating"]]}
        if chosen is not None:
            steps.append(rated[chosen]["text"])
            labels.append(rated[chosen].get("rating"))
        elif step.get("human_completion"):
            steps.append(step["human_completion"]["text"])
            labels.append(None)
        else:
            break
    if any(label is not None for label in labels):
        yield {"prompt": prompt, "completions": steps, "labels": labels}


def math_shepherd(row: Row) -> Iterator[Row]:
    """`peiyi9979/Math-Shepherd`: stepwise. The marks behind the steps become labels, `+` right and `-` wrong.

    Rows in which the solution does not begin with "Step 1" or a mark is missing are left out. See *Math-Shepherd* by
    P. Wang et al. (https://huggingface.co/papers/2312.08935).
    """
    *parts, rest = row["input"].split(_STEP_END)
    labels, place = [], 0
    for part in parts:
        place += len(part)
        mark = row["label"][place : place + 1]
        if mark not in ("+", "-") or not row["label"].startswith(part, place - len(part)):
            return
        labels.append(float(mark == "+"))
        place += 1
    start = parts[0].find("Step 1") if parts else -1
    if start < 0 or rest.strip():
        return
    steps = [parts[0][start:], *parts[1:]]
    yield {
        "prompt": parts[0][:start].strip() + "\n",
        "completions": [step.strip() for step in steps],
        "labels": labels,
    }


def processbench(row: Row) -> Iterator[Row]:
    """`Qwen/ProcessBench`: stepwise. Steps before the first wrong one are right, those behind it have no label.

    `trl-ext evaluate` also reads the released rows. See *ProcessBench* by C. Zheng et al.
    (https://huggingface.co/papers/2412.06559).
    """
    steps, first = list(row["steps"]), row["label"]
    labels = [1.0] * len(steps) if first < 0 else [1.0] * first + [0.0] + [None] * (len(steps) - first - 1)
    yield {"prompt": row["problem"] + "\n", "completions": steps, "labels": labels}


# ----------------------------------------------------------------------------------------------- preferences and ranks
def ultrafeedback(row: Row) -> Iterator[Row]:
    """`openbmb/UltraFeedback`: ranked, 4 answers with the mean of the 4 aspects' ratings (`fine-grained_score`).

    `overall_score` is not used: some of its values are wrong by a factor of ten. Answers without a score are left out.
    See *UltraFeedback* by G. Cui et al. (https://huggingface.co/papers/2310.01377).
    """
    rated = [item for item in row["completions"] if item.get("fine-grained_score") is not None and item["response"]]
    if len(rated) > 1:
        yield {
            "prompt": _user(row["instruction"]),
            "completions": [_assistant(item["response"]) for item in rated],
            "ratings": [float(item["fine-grained_score"]) for item in rated],
        }


def ultrafeedback_binarized(row: Row) -> Iterator[Row]:
    """`HuggingFaceH4/ultrafeedback_binarized` (the splits with preferences): preference, with both ratings."""
    for pair in chosen_rejected(row):
        yield {**pair, "chosen_rating": row["score_chosen"], "rejected_rating": row["score_rejected"]}


def helpsteer2(rows: list[Row]) -> Iterator[Row]:
    """`nvidia/HelpSteer2` and `nvidia/HelpSteer`: ranked by helpfulness, 0 to 4, over the rows of one prompt.

    The answers to a prompt are neighbouring rows, so do not shuffle before. The other four attributes are left out.
    See *HelpSteer2* by Z. Wang et al. (https://huggingface.co/papers/2406.08673).
    """
    answered = [row for row in rows if row["response"]]
    if len(answered) > 1:
        yield {
            "prompt": _helpsteer_prompt(answered[0]["prompt"]),
            "completions": [_assistant(row["response"]) for row in answered],
            "ratings": [float(row["helpfulness"]) for row in answered],
        }


def helpsteer2_preference(row: Row) -> Iterator[Row]:
    """`nvidia/HelpSteer2` with `data_dir="preference"`: preference; the strength, 1 to 3, is kept as a column.

    Rows without a preference (strength 0) are left out, as by its authors. Rename `preference_strength` to `margin` to
    train with it. See *HelpSteer2-Preference* by Z. Wang et al. (https://huggingface.co/papers/2410.01257).
    """
    prompt = _helpsteer_prompt(row["prompt"])
    yield from _by_strength(prompt, row["response_1"], row["response_2"], row["preference_strength"])


def helpsteer3(row: Row) -> Iterator[Row]:
    """`nvidia/HelpSteer3`, preferences: preference, with `preference_strength` as in `helpsteer2_preference`.

    See *HelpSteer3-Preference* by Z. Wang et al. (https://huggingface.co/papers/2505.11475).
    """
    prompt = [{"role": message["role"], "content": message["content"]} for message in row["context"]]
    yield from _by_strength(prompt, row["response1"], row["response2"], row["overall_preference"])


def nectar(row: Row) -> Iterator[Row]:
    """`berkeley-nest/Nectar`: ranked, 7 answers with `ranks` (1 is best). Losses of distances refuse ranks."""
    answers = [item for item in row["answers"] if item["answer"]]
    prompt = _turns(row["prompt"])
    if prompt and not prompt[-1]["content"].strip():  # it ends with "Assistant:"
        prompt = prompt[:-1]
    if prompt and len(answers) > 1:
        yield {
            "prompt": prompt,
            "completions": [_assistant(item["answer"]) for item in answers],
            "ranks": [int(item["rank"]) for item in answers],
        }


def hh_rlhf(row: Row) -> Iterator[Row]:
    """`Anthropic/hh-rlhf`: preference. Dialogues in one text are split into messages.

    The turns that both sides share are the prompt. Pairs whose sides are equal, end with an empty answer, or first
    differ in a turn of the user are left out. See *Training a Helpful and Harmless Assistant* by Y. Bai et al.
    (https://huggingface.co/papers/2204.05862).
    """
    yield from _pair(_turns(row["chosen"]), _turns(row["rejected"]))


def chosen_rejected(row: Row) -> Iterator[Row]:
    """Pairs of message lists without a prompt (`Skywork/Skywork-Reward-Preference-80K-v0.2` and others): preference.

    The turns that both sides share are the prompt.
    """
    yield from _pair(_plain_messages(row["chosen"]), _plain_messages(row["rejected"]))


def rewardbench(row: Row) -> Iterator[Row]:
    """`allenai/reward-bench`: preference, with `subset`. See *RewardBench* by N. Lambert et al.
    (https://huggingface.co/papers/2403.13787).
    """
    sides = {name: _assistant(row[name]) for name in ("chosen", "rejected")}
    yield {"prompt": _user(row["prompt"]), **sides, "subset": row["subset"]}


def rewardbench2(row: Row) -> Iterator[Row]:
    """`allenai/reward-bench-2`: ranked, right answers rated 1 and wrong ones 0, with `subset`.

    See *RewardBench 2* by S. Malik et al. (https://huggingface.co/papers/2506.01937).
    """
    yield {
        "prompt": _user(row["prompt"]),
        "completions": [_assistant(text) for text in [*row["chosen"], *row["rejected"]]],
        "ratings": [1.0] * len(row["chosen"]) + [0.0] * len(row["rejected"]),
        "subset": row["subset"],
    }


_RATED = {**_RANKED, "ratings": List(Value("float64"))}
_STRENGTH = {**_PREFERENCE, "preference_strength": Value("float64")}
_BOTH_RATINGS = {**_PREFERENCE, "chosen_rating": Value("float64"), "rejected_rating": Value("float64")}
_SUBSET = {"subset": Value("string")}

RECIPES: dict[str, Recipe] = {
    "prm800k": Recipe(_STEPWISE, prm800k, ("question", "label")),
    "prm800k_neutral": Recipe(_STEPWISE, prm800k_neutral, ("question", "label")),
    "math_shepherd": Recipe(_STEPWISE, math_shepherd, ("input", "label")),
    "processbench": Recipe(_STEPWISE, processbench, ("problem", "steps", "label")),
    "ultrafeedback": Recipe(_RATED, ultrafeedback, ("instruction", "completions")),
    "ultrafeedback_binarized": Recipe(
        _BOTH_RATINGS, ultrafeedback_binarized, ("chosen", "rejected", "score_chosen", "score_rejected")
    ),
    "helpsteer2": Recipe(_RATED, helpsteer2, ("prompt", "response", "helpfulness"), neighbours="prompt"),
    "helpsteer2_preference": Recipe(
        _STRENGTH, helpsteer2_preference, ("prompt", "response_1", "response_2", "preference_strength")
    ),
    "helpsteer3": Recipe(_STRENGTH, helpsteer3, ("context", "response1", "response2", "overall_preference")),
    "nectar": Recipe({**_RANKED, "ranks": List(Value("int64"))}, nectar, ("prompt", "answers")),
    "hh_rlhf": Recipe(_PREFERENCE, hh_rlhf, ("chosen", "rejected")),
    "skywork": Recipe(_PREFERENCE, chosen_rejected, ("chosen", "rejected")),
    "rewardbench": Recipe({**_PREFERENCE, **_SUBSET}, rewardbench, ("prompt", "chosen", "rejected", "subset")),
    "rewardbench2": Recipe({**_RATED, **_SUBSET}, rewardbench2, ("prompt", "chosen", "rejected", "subset")),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. For an unknown name it raises `ValueError`, which names the nearest one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No data set format {name!r} is known.{suggestion} Known: {', '.join(RECIPES)}.")
    return RECIPES[name]


def convert(dataset: Rows, name: str) -> Rows:
    """
    The rows of a public data set with our columns, and no others.

    A stream is read in batches of 1,000 rows, and `helpsteer2` joins only rows of the same batch.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows as they are released.
        name (`str`): a key of `RECIPES`.

    Raises:
        `ValueError`: there is no such recipe.
        [`DataError`]: the rows lack a column that the recipe reads, or it cannot read a row.

    Example:

    ```python
    rows = load_dataset("Anthropic/hh-rlhf", split="train")
    trainer = RewardTrainer(model="Qwen/Qwen3-0.6B", train_dataset=convert(rows, "hh_rlhf"))
    ```
    """
    recipe = find_recipe(name)
    columns = dataset.column_names
    if columns is None:  # a stream that does not know
        columns = list(next(iter(dataset), {}))
    missing = [column for column in recipe.needs if column not in columns]
    if missing:
        raise DataError(
            f"the columns {sorted(columns)}",
            f"{missing} too, which rows of the format {name!r} have",
            "Choose the format of this data set, or leave the format out if its columns are ours already.",
        )
    arguments = {"name": name}
    options = {"batched": True, "batch_size": _BATCH_ROWS, "with_indices": True, "remove_columns": list(columns)}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_read_batch, fn_kwargs=arguments, features=Features(recipe.columns), **options)
    if recipe.neighbours is not None:
        options["batch_size"] = len(dataset)  # neighbours would be parted where one batch ends
    description = f"Reading rows as {name}"
    converted = dataset.map(
        _read_batch, fn_kwargs=arguments, features=Features(recipe.columns), desc=description, **options
    )
    logger.info(f"{len(dataset)} rows of the format {name!r} give {len(converted)} rows.")
    return converted


def _read_batch(batch: dict[str, list[Any]], indices: list[int], name: str) -> dict[str, list[Any]]:
    given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    new: dict[str, list[Any]] = {column: [] for column in RECIPES[name].columns}
    for _, row in read_released(zip(indices, given, strict=True), name):
        for column, values in new.items():
            values.append(row[column])
    return new


def read_released(rows: Iterable[tuple[int, Row]], name: str) -> Iterator[tuple[int, Row]]:
    """
    Makes our rows of numbered rows of a public data set, one after the other.

    Args:
        rows (iterable of `tuple[int, dict]`): number and content of each released row.
        name (`str`): a key of `RECIPES`.

    Yields:
        `tuple[int, dict]`: one of our rows, and the number of the released row that it comes from. If a recipe joins
        neighbours, it is the number of the first one.

    Raises:
        [`DataError`]: a row lacks a column that the recipe reads, or it cannot be read.
    """
    recipe = find_recipe(name)
    for index, item in _neighbours(rows, recipe):
        try:
            found = list(recipe.read(item))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"a row that the format {name!r} cannot read ({type(error).__name__}: {error})",
                f"rows as the data set is released, with the columns {list(recipe.needs)}",
                "Remove the row, or convert the data set yourself.",
                row=index,
            ) from error
        for row in found:
            yield index, row


def _neighbours(rows: Iterable[tuple[int, Row]], recipe: Recipe) -> Iterator[tuple[int, Any]]:
    """Each value that a recipe reads, a row or a list of neighbouring rows, and the number of its first row."""
    if recipe.neighbours is None:
        yield from rows
        return
    for _, group in groupby(rows, key=lambda item: item[1].get(recipe.neighbours)):
        together = list(group)
        yield together[0][0], [row for _, row in together]


# ------------------------------------------------------------------------------------------------------------ messages
def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _plain_messages(messages: Iterable[Row]) -> list[Row]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _turns(text: str) -> list[Row]:
    """The messages of a dialogue in which "Human:" and "Assistant:" open the turns."""
    before, *pieces = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text.lstrip()}")
    if before.strip():
        raise ValueError(f"a dialogue begins with {before.strip()[:40]!r}, and not with 'Human:' or 'Assistant:'")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[who.lower()], "content": said.strip()} for who, said in turns]


def _helpsteer_prompt(text: str) -> list[Row]:
    """The messages of a HelpSteer prompt: the user's first turn, then turns behind `<extra_id_1>` and a role."""
    first, *later = text.split("<extra_id_1>")
    turns = [turn.partition("\n") for turn in later]
    messages = [{"role": _ROLES[who.strip().lower()], "content": said.strip()} for who, _, said in turns]
    return _user(first.strip()) + [message for message in messages if message["content"]]


def _pair(chosen: list[Row], rejected: list[Row]) -> Iterator[Row]:
    """A preference row of two dialogues; none if they do not first differ in an answer, or if an answer is empty."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if all(side and side[0]["role"] == "assistant" and side[-1]["content"] for side in sides.values()):
        yield {"prompt": chosen[:shared], **sides}


def _by_strength(prompt: list[Row], first: str, second: str, strength: float) -> Iterator[Row]:
    """A preference row. A negative strength means that the first answer is better, and 0 gives no row."""
    if strength and first and second:
        better, worse = (first, second) if strength < 0 else (second, first)
        sides = {"chosen": _assistant(better), "rejected": _assistant(worse)}
        yield {"prompt": prompt, **sides, "preference_strength": abs(float(strength))}
