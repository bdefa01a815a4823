"""The data sets of `real_data.py` in one form: rows with judged items, of which a method gives each a score.

An item is what people judged: a candidate, a step or a segment. Long texts are cut so that two CPU cores can do the
study, prompts from the left and completions from the right, where what is left can still be judged. Every method, the
baselines included, reads the same cut text.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools import read


Kind = Literal["ranked", "outcome", "steps", "segments"]
TASKS = ["word_sorting", "tracking_shuffled_objects", "logical_deduction", "multistep_arithmetic", "dyck_languages"]


@dataclass(frozen=True)
class Row:
    """
    A prompt with what people judged.

    Args:
        group (`str`): rows of one conversation, question or problem stay in one fold and are drawn together.
        prompt (`str`): what stands before a candidate, a step or a segment.
        texts (`list[str]`): the candidates, or the steps of one solution, or one completion with segments.
        labels (`list[float]`): a rating of each item, higher is better, or 1 for right and 0 for wrong.
        spans (`list[tuple[int, int]]`): where each segment is in the completion, in characters.
        stratum (`str`): AUC compares items of one stratum.
    """

    group: str
    prompt: str
    texts: list[str]
    labels: list[float]
    spans: tuple[tuple[int, int], ...] = ()
    stratum: str = ""


@dataclass(frozen=True)
class StudySet:
    """
    A data set of the study.

    Args:
        title, source (`str`): for the report.
        kind (`str`): of the labels, and so of the trainer.
        load (`Callable[[Path], Iterator[Row]]`): reads the rows from the folder of the data.
        files (`tuple[str, ...]`): what must be in that folder.
        rows (`int`, *optional*): the most rows of a full run; all by default.
        folds (`int`): each row is tested in one of them by a model that trained on the others. Two for all but the
            smallest sets, so that every row is tested at the price of two trainings on half of the rows.
    """

    title: str
    source: str
    kind: Kind
    load: Callable[[Path], Iterator[Row]]
    files: tuple[str, ...]
    rows: int | None = None
    folds: int = 2

    @property
    def measure(self) -> Literal["order", "auc"]:
        """`"order"`: the share of a row's decided pairs that are in order. `"auc"`: right items against wrong ones."""
        return "order" if self.kind in ("ranked", "outcome") else "auc"


def cut(prompt: str, most: int) -> str:
    """The last characters of a prompt, from a word on, and a line feed."""
    prompt = prompt.strip()
    if len(prompt) > most:
        prompt = prompt[-most:]
        prompt = prompt[prompt.find(" ") + 1 :]
    return prompt + "\n"


def flat(messages: list[dict[str, str]] | str) -> str:
    """A conversation as text."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in messages)


def harmless(folder: Path) -> Iterator[Row]:
    for row in read(folder / "pairs_hh_harmless" / "split_test.jsonl"):
        texts = [row[name][0]["content"][:300] for name in ("chosen", "rejected")] if row["clean"] else ["", ""]
        if all(texts) and texts[0] != texts[1]:  # pairs whose difference is cut away say nothing
            prompt = cut(flat(row["prompt"]), 240) + "Assistant: "
            yield Row(row["prompt"][0]["content"], prompt, texts, [1.0, 0.0])


def topical_chat(folder: Path) -> Iterator[Row]:
    for row in read(folder / "rankings_topical_chat" / "rankings.jsonl"):
        group = row["prompt"].split("\n")[0]
        yield Row(group, cut(row["prompt"], 300), [text[:300] for text in row["completions"]], row["scores"])


def open_assistant(folder: Path) -> Iterator[Row]:
    for row in read(folder / "rankings_oasst_en100" / "rankings.jsonl"):
        prompt = cut(flat(row["prompt"]), 300) + "Assistant: "
        ranks = [-float(rank) for rank in row["ranks"]]
        yield Row(row["tree"], prompt, [text[:1500] for text in row["completions"]], ranks)


def fine_grained_rankings(folder: Path) -> Iterator[Row]:
    for row in read(folder / "segment_finegrained" / "rankings_k4.jsonl"):
        ranks = [-float(rank) for rank in row["ranks"]]
        yield Row(row["id"], cut(row["prompt"], 300), [text[:600] for text in row["completions"]], ranks)


def gsm8k(folder: Path) -> Iterator[Row]:
    questions: dict[str, list[dict]] = {}
    for row in read(folder / "orm_gsm8k" / "model_solutions.jsonl"):
        questions.setdefault(row["id"], []).append(row)
    for number, rows in questions.items():
        labels = [float(row["label"]) for row in rows]
        if 0 < sum(labels) < len(labels):  # the others have no pair within the question
            yield Row(number, cut(rows[0]["prompt"], 500), [row["completion"][:1200] for row in rows], labels)


def mistakes(folder: Path) -> Iterator[Row]:
    """The tasks in turn, so that the first rows have all of them. Steps behind the first mistake are left out."""
    tasks = [read(folder / "steps_bigbench_mistake" / f"{task}.jsonl") for task in TASKS]
    for rows in zip(*tasks, strict=False):
        for task, row in zip(TASKS, rows, strict=True):
            end = len(row["labels"]) if row["mistake_index"] is None else row["mistake_index"] + 1
            steps, labels = row["completions"][:end], [float(label) for label in row["labels"][:end]]
            if all(step.strip() for step in steps):
                yield Row(task + row["prompt"], row["prompt"].strip() + "\n", steps, labels, stratum=task)


def segments(category: str, level: str, folder: Path) -> Iterator[Row]:
    questions = {row["id"]: row["question"] for row in read(folder / "segment_finegrained" / "dev_feedback.jsonl")}
    for row in read(folder / "segment_finegrained" / "segments_derived.jsonl"):
        judged = [s for s in row["segments"] if s[category] is not None] if row["level"] == level else []
        if judged:
            spans = tuple((s["start"], s["end"]) for s in judged)
            yield Row(
                row["id"], questions[row["id"]] + "\n", [row["completion"]], [s[category] for s in judged], spans
            )


def relevance(folder: Path) -> Iterator[Row]:
    yield from segments("relevance", "subsentence", folder)


def factuality(folder: Path) -> Iterator[Row]:
    yield from segments("factuality", "sentence", folder)


FINE_GRAINED = tuple(f"segment_finegrained/{name}" for name in ("dev_feedback.jsonl", "segments_derived.jsonl"))
SETS = {
    "harmless": StudySet(
        "HH harmless, pairs",
        "Anthropic's HH, test set",
        "ranked",
        harmless,
        ("pairs_hh_harmless/split_test.jsonl",),
        rows=1600,
    ),
    "topical": StudySet(
        "Topical-Chat, answers",
        "ratings of USR",
        "ranked",
        topical_chat,
        ("rankings_topical_chat/rankings.jsonl",),
        folds=5,
    ),
    "oasst": StudySet(
        "Open-Assistant, answers",
        "100 English trees",
        "ranked",
        open_assistant,
        ("rankings_oasst_en100/rankings.jsonl",),
        folds=3,
    ),
    "fine-grained": StudySet(
        "Fine-Grained RLHF, answers",
        "QA feedback, preferences",
        "ranked",
        fine_grained_rankings,
        ("segment_finegrained/rankings_k4.jsonl",),
    ),
    "gsm8k": StudySet(
        "GSM8K, four solutions",
        "solutions of four models to test questions",
        "outcome",
        gsm8k,
        ("orm_gsm8k/model_solutions.jsonl",),
        rows=150,
    ),
    "mistakes": StudySet(
        "BIG-Bench Mistake, steps",
        "five tasks",
        "steps",
        mistakes,
        tuple(f"steps_bigbench_mistake/{task}.jsonl" for task in TASKS),
        rows=600,
    ),
    "relevance": StudySet(
        "Fine-Grained RLHF, relevance",
        "QA feedback",
        "segments",
        relevance,
        FINE_GRAINED,
    ),
    "factuality": StudySet(
        "Fine-Grained RLHF, factuality",
        "QA feedback",
        "segments",
        factuality,
        FINE_GRAINED,
    ),
}


def load(name: str, folder: Path, smoke: bool = False) -> list[Row]:
    """The rows of a data set that have something to compare."""
    study, rows = SETS[name], []
    for row in study.load(folder):
        known = {label for label in row.labels if not math.isnan(label)}
        if study.measure == "auc" or len(known) > 1:
            rows.append(row)
    return rows[: 25 if smoke else study.rows]
