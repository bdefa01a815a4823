"""The report of self-instruct: what became of every instruction, and how varied the tasks are.

It has what Wang et al. report: the ROUGE-L of each instruction to the nearest seed, and lengths. n-grams and first
words stand in for their table of verbs and nouns, which would need a parser of English. This module knows the records
of rounds, and not how they were made.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from trl_ext.pipelines.feedback.instruct_pool import Nearest, words_of
from trl_ext.pipelines.feedback.templates import FOLDER
from trl_ext.pipelines.stages.store import whole_file


BINS = 10  # of the histograms of ROUGE-L, from 0 to 1
TABLE_ROWS = 200  # most rows in the table on Weights & Biases
FIRST_WORDS = 20  # most pairs of first words in the report

# Reason -> what the report says.
REASONS = {
    "no_list": "answers without a numbered list",
    "cut": "cut at max_completion_length",
    "empty": "numbers without text",
    "surplus": "more instructions than asked for",
    "too_short": "fewer words than min_words",
    "too_long": "more words than max_words",
    "punctuation": "begins with a sign",
    "keyword": "has one of the keywords",
    "duplicate": "equal to another instruction",
    "similar": "ROUGE-L to another instruction at max_similarity or above",
    "no_label": "neither yes nor no to the question for the kind",
    "no_instance": "no input and output found in the answer",
    "empty_output": "empty output",
    "repeats_input": "output repeats the input or the instruction",
    "duplicate_instance": "equal to another instance of the task",
    "conflicting_outputs": "one input with several outputs",
}


def report_of(
    records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], num_tasks: int, seeds: Sequence[str]
) -> dict[str, Any]:
    """
    The report of a run.

    Args:
        records (sequence of `dict`): the records of all rounds, one for each prompt.
        rows (sequence of `dict`): the rows of the tasks.
        num_tasks (`int`): number of tasks that were asked for.
        seeds (sequence of `str`): the seeds' instructions.

    Returns:
        `dict` with

        - `prompts`, `instructions` (read from the answers), `kept`, `survival` (`kept` over `instructions`), `tasks`
          and `rows` (of the data set, which leaves out what the last round made beyond `num_tasks`)
        - `unread`, `dropped`, `dropped_instances`: numbers by reason: spoilt places of lists, instructions, instances
        - `classification`: share of the tasks
        - `similarity`, `similarity_to_seeds`: of each task's instruction to the nearest one when it was made, and to
          the nearest seed: `mean` and a `histogram` of ten bins from 0 to 1
        - `words`: for instructions, inputs (where there is one) and outputs `mean`, `p10`, `p50`, `p90`
        - `ngrams`: for n = 1, 2, 3 the `number` in the instructions and the share that is `distinct`
        - `first_words`: the most frequent pairs of first words with their numbers
    """
    candidates = [candidate for record in records for candidate in record["candidates"]]
    kept = sum(candidate["dropped"] is None for candidate in candidates)
    first = {row["task"]: row for row in rows}
    tasks = list(first.values())
    instructions = [task["instruction"] for task in tasks]
    to_seeds = Nearest(seeds)
    return {
        "prompts": len(records),
        "instructions": len(candidates),
        "kept": kept,
        "survival": kept / len(candidates) if candidates else 0.0,
        "tasks": len(tasks),
        "rows": len(rows),
        "num_tasks": num_tasks,
        "unread": _summed(record["unread"] for record in records),
        "dropped": _summed({one["dropped"]: 1} for one in candidates if one["dropped"] is not None),
        "dropped_instances": _summed(candidate.get("dropped_instances", {}) for candidate in candidates),
        "classification": statistics.fmean(task["is_classification"] for task in tasks) if tasks else 0.0,
        "similarity": _distribution([task["similarity"] for task in tasks]),
        "similarity_to_seeds": _distribution([to_seeds(text)[0] for text in instructions]),
        "words": {
            "instruction": _lengths(instructions),
            "input": _lengths([row["input"] for row in rows if row["input"]]),
            "output": _lengths([row["output"] for row in rows]),
        },
        "ngrams": {str(n): _ngrams(instructions, n) for n in (1, 2, 3)},
        "first_words": dict(Counter(" ".join(words_of(text)[:2]) for text in instructions).most_common(FIRST_WORDS)),
    }


def write_html(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as one page that loads nothing from a network."""
    source = (FOLDER / "self_instruct" / "report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    with whole_file(path, "Free some disk space and run again.") as file:
        file.write(template.render(report=report, reasons=REASONS).encode())


def log_to_wandb(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the counts and a table of rows on the W&B run that is open, or on one of its own."""
    import wandb

    opened = wandb.run is None
    run = wandb.init(job_type="self-instruct") if opened else wandb.run
    numbers = {name: report[name] for name in ("instructions", "kept", "survival", "tasks", "rows", "classification")}
    for kind in ("unread", "dropped", "dropped_instances"):
        numbers |= {f"{kind}/{reason}": count for reason, count in report[kind].items()}
    numbers["similarity_to_seeds"] = report["similarity_to_seeds"]["mean"]
    columns = ["instruction", "input", "output", "is_classification", "similarity"]
    table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows[:TABLE_ROWS]])
    run.log({f"self_instruct/{name}": value for name, value in numbers.items()} | {"self_instruct/tasks_table": table})
    if opened:
        run.finish()


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return {reason: total[reason] for reason in REASONS if total[reason]}


def _distribution(values: Sequence[float]) -> dict[str, Any]:
    histogram = [0] * BINS
    for value in values:
        histogram[min(int(value * BINS), BINS - 1)] += 1
    return {"mean": statistics.fmean(values) if values else 0.0, "histogram": histogram}


def _lengths(texts: Sequence[str]) -> dict[str, float]:
    lengths = sorted(len(words_of(text)) for text in texts)
    if not lengths:
        return {}
    places = {f"p{share}": lengths[round(share / 100 * (len(lengths) - 1))] for share in (10, 50, 90)}
    return {"mean": statistics.fmean(lengths), **places}


def _ngrams(texts: Sequence[str], n: int) -> dict[str, float]:
    found = [tuple(words[start : start + n]) for words in map(words_of, texts) for start in range(len(words) - n + 1)]
    return {"number": len(found), "distinct": len(set(found)) / len(found) if found else 0.0}
