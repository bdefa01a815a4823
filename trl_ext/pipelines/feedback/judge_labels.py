"""`label_preferences`: a judge labels the completions of a data set, and a rerun asks nothing that was answered.

Every answer is kept under a hash of its question. Rows, filters and the report are made again from the answers, so
another filter costs nothing. This module knows rows and where answers are kept. `judge` knows how questions are asked.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from trl_ext.data.chat_templates import as_messages, content_text
from trl_ext.data.mapping import plain_rows
from trl_ext.data.validation import DataError, RowChecks, shown
from trl_ext.evaluation.items import Item, family_of, read_item
from trl_ext.pipelines.feedback.judge import TOO_LONG, Judge, JudgeError, JudgeModel, transcript
from trl_ext.pipelines.feedback.judge_ratings import Judgement
from trl_ext.pipelines.feedback.judge_report import JudgeReport, Tally
from trl_ext.pipelines.feedback.judge_settings import JudgeSettings
from trl_ext.pipelines.generation.records import TEMPLATE_COLUMNS
from trl_ext.pipelines.stages.one_process import SERVERS, check_one_process
from trl_ext.pipelines.stages.record_log import RecordLog
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows
from trl_ext.pipelines.stages.store import write_json, write_lines
from trl_ext.pipelines.stages.values import plain


logger = logging.getLogger(__name__)

Row = dict[str, Any]
ROWS, REPORT = "preferences.jsonl", "report.json"

_FAMILIES = ("preference", "ranked", "best_of_n", "samples")
_CHUNK_ROWS = 256  # rows whose questions are in memory together


@dataclass
class Judged:
    """
    What [`label_preferences`] makes.

    Args:
        dataset (`Dataset`): the labelled rows.
        report ([`~trl_ext.pipelines.feedback.judge_report.JudgeReport`]): counts, position bias, agreement.
        path (`Path`, *optional*): the JSON lines of the rows; `None` without an output folder.
    """

    dataset: Dataset
    report: JudgeReport
    path: Path | None


@dataclass(frozen=True)
class LabelFilter:
    """
    Which labels are kept; see [`label_preferences`].

    Raises:
        ValueError: a value is out of its range, or does not go with the mode.
    """

    mode: str
    min_confidence: float = 0.5
    tie_band: float = 0.0
    ties: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if not 0.5 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence={self.min_confidence}; needed: from 0.5 (off) to below 1.")
        if self.min_confidence > 0.5 and self.mode != "compare":
            raise ValueError(
                f"min_confidence={self.min_confidence} is for mode='compare'. With mode={self.mode!r} use tie_band, "
                "which leaves out rows whose ratings hardly differ."
            )
        if self.tie_band < 0 or (self.mode == "compare" and self.tie_band >= 0.5):
            raise ValueError(f"tie_band={self.tie_band}; needed: 0 or more, and below 0.5 for mode='compare'.")
        if self.ties not in ("keep", "drop"):
            raise ValueError(f"ties={self.ties!r}; needed: 'keep' or 'drop'.")


def label_preferences(
    judge: JudgeModel,
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    output_dir: str | Path | None = None,
    *,
    min_confidence: float = 0.5,
    tie_band: float = 0.0,
    ties: Literal["keep", "drop"] = "keep",
    processing_class: PreTrainedTokenizerBase | None = None,
    max_rows: int | None = None,
    resamples: int = 2_000,
    **settings: Any,
) -> Dataset:
    """
    Let a judge label the completions of a data set.

    With `mode="compare"` (the default) the judge is asked in both orders which of two completions is better. The
    probability of the two labels is read from its next-token distribution, and the log-odds of both orders are
    averaged, so that a preference for the first place cancels. See *RLAIF vs. RLHF* by H. Lee et al.
    (https://huggingface.co/papers/2309.00267) and *Judging LLM-as-a-Judge* by L. Zheng et al.
    (https://huggingface.co/papers/2306.05685).

    Answers are kept in `output_dir/answers`. If you run the same call again, also after a kill or with more rows, only
    questions without an answer are asked. Another filter asks nothing.

    Args:
        judge (`str`, `Path`, `PreTrainedModel`, `PeftModel` or `Callable`):
            A causal language model, the name of one on a server, or a function from chats to answers; see
            [`~trl_ext.pipelines.feedback.judge.Judge`].
        dataset (`Dataset`, `IterableDataset` or list of rows):
            Rows with `chosen` and `rejected`, or with `completions`; and `prompt`, unless chats contain it. `chosen`
            and `rejected`, `ratings`, `ranks` or `gold` count as what people say: the judge does not see it, and the
            report says how well it agrees. Where a pair has `preference_probability`, or `chosen_rating` and
            `rejected_rating`, these say which one people prefer.
        output_dir (`str` or `Path`, *optional*):
            Folder for `answers`, `preferences.jsonl` and `report.json`. Without it nothing is kept.
        min_confidence (`float`, *optional*, defaults to `0.5`):
            With `"compare"`, rows whose larger probability is below this are left out.
        tie_band (`float`, *optional*, defaults to `0.0`):
            With `"compare"`, a probability at most this far from 1/2 is a tie; otherwise a row whose ratings span at
            most this much.
        ties (`str`, *optional*, defaults to `"keep"`):
            `"keep"` gives ties the probability 1/2, or equal ratings, whatever `min_confidence` is. `"drop"` leaves
            them out.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the judge's tokenizer; defaults to the model's.
        max_rows (`int`, *optional*): take only the first rows.
        resamples (`int`, *optional*, defaults to `2000`): bootstrap resamples for the intervals of the report.
        **settings: of [`~trl_ext.pipelines.feedback.judge_settings.JudgeSettings`]: `mode`, `template`, `criteria`,
            `reasoning`, `backend` ...

    Returns:
        `Dataset`: with `"compare"` the columns `prompt`, `chosen`, `rejected`, `preference_probability` (of the chosen
        one, at least 1/2) and `position_bias`; otherwise `prompt`, `completions` and `ratings`. Both also have `row`,
        the index of the input row, and `tools` and `chat_template_kwargs` of the input. `RewardTrainer` takes them as
        they are.

    Raises:
        ValueError, TypeError: a setting is out of its range; a template lacks a field.
        [`DataError`]: the columns are not those above, a row cannot be used, or there is no row.
        [`LabelError`]: a label is not a single token of the judge. [`JudgeError`]: the judge gives no labels.
        [`GenerationError`]: a server fails, or returns no log-probabilities.

    Example:

    ```python
    >>> rows = label_preferences("Qwen/Qwen3-0.6B", pairs, "outputs/judged", criteria="Is it harmless?")
    >>> rows[0]["preference_probability"]
    0.83
    ```
    """
    return judge_rows(
        judge,
        dataset,
        output_dir,
        min_confidence=min_confidence,
        tie_band=tie_band,
        ties=ties,
        processing_class=processing_class,
        max_rows=max_rows,
        resamples=resamples,
        **settings,
    ).dataset


def judge_rows(
    judge: JudgeModel,
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    output_dir: str | Path | None = None,
    *,
    min_confidence: float = 0.5,
    tie_band: float = 0.0,
    ties: Literal["keep", "drop"] = "keep",
    processing_class: PreTrainedTokenizerBase | None = None,
    max_rows: int | None = None,
    resamples: int = 2_000,
    **settings: Any,
) -> Judged:
    """[`label_preferences`] with its report."""
    check_one_process("label-preferences", SERVERS)
    asked = Judge(judge, JudgeSettings.of(**settings), processing_class)
    kept = LabelFilter(asked.settings.mode, min_confidence, tie_band, ties)
    if isinstance(dataset, (str, Mapping)) or not hasattr(dataset, "__iter__"):
        raise TypeError(f"The data set is a {type(dataset).__name__}; needed: a Dataset or a list of rows.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}; needed: 1 or more.")
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        identity = asked.identity()
        log = stack.enter_context(RecordLog(folder / "answers", {"format": 1, **identity}))
        if len(log) and identity["judge"].get("unseen"):
            read = ", ".join(f"{name} ({kind})" for name, kind in identity["judge"]["unseen"].items())
            logger.warning(
                f"The judge's answers in {log.path.parent} are used again, and it reads {read}, whose content cannot "
                "be compared. Delete the folder if that has changed."
            )
        labeller = _Labeller(asked, kept, log)
        rows = islice(plain_rows(dataset), max_rows)
        report = labeller.tally.report
        report.kept = write_lines(folder / ROWS, labeller.label(rows), checksums=False)
        report = labeller.tally.finish(asked.settings.seed, resamples)
        report.judge, report.settings = identity, plain(asked.settings) | {"question": asked.settings.question.text}
        for line in report.summary():
            logger.info(line)
        write_json(folder / REPORT, report.to_dict())
        if not report.kept:
            raise JudgeError(f"No row could be labelled: {' '.join(report.summary())} Needed: at least one.")
        found = dataset_of_rows(folder / ROWS)
        if output_dir is None:  # the folder goes, so the rows come into memory
            return Judged(Dataset.from_list(found.to_list(), features=found.features), report, None)
    return Judged(found, report, folder / ROWS)


class _Labeller:
    """Reads rows, asks about them chunk by chunk, and counts."""

    def __init__(self, judge: Judge, kept: LabelFilter, log: RecordLog):
        self.tally = Tally()
        self._judge, self._kept, self._log = judge, kept, log
        self._answers = self.tally.report.answers
        self._answers |= {"asked": 0, "reused": 0}

    def label(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[Row]:
        """The labelled rows."""
        family = None
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            first = self.tally.report.rows
            for place, row in enumerate(chunk):
                if not isinstance(row, Mapping):
                    raise DataError(shown(row), "a dictionary", "Make each row a dictionary.", row=first + place)
            family = family or self._family(chunk[0])
            self.tally.report.rows += len(chunk)
            items = [read_item(row, first + place, family) for place, row in enumerate(chunk)]
            yield from self._label_items([item for item in items if self._usable(item, family)])
        if family is None:
            raise DataError("no row", "at least one row with completions", "Check the data set and its split.")

    def _family(self, row: Mapping[str, Any]) -> str:
        family = family_of(list(row))
        if family not in _FAMILIES:
            raise DataError(
                f"the columns of {family} rows, {sorted(row)}",
                "`chosen` and `rejected`, or `completions` with several answers to one prompt",
                "Put the completions of a prompt into one row.",
            )
        return family

    def _usable(self, item: Item, family: str) -> bool:
        """Whether a row can be judged. Raises [`DataError`] for a malformed one, and counts the others."""
        checks = RowChecks(item.row, "judge")
        reason = None
        if len(item.completions) == 1:
            reason = "one_completion"
        elif any(map(_is_empty, item.completions)):
            reason = "empty_completion"
        else:
            column = "chosen" if family == "preference" else "completions"
            checks.one_kind(checks.prompt(item.prompt), item.completions, [column] * len(item.completions))
            limit = len(self._judge.settings.labels)
            if self._judge.settings.mode == "compare" and len(item.completions) > 2:
                fix = "Use mode='rank' (all pairs) or mode='list' (one answer)."
                raise checks.error(column, f"{len(item.completions)} completions", "2 for mode='compare'", fix)
            if self._judge.settings.mode == "list" and len(item.completions) > limit:
                fix = "Give more labels, or use mode='rank'."
                raise checks.error(column, f"{len(item.completions)} completions", f"at most {limit} labels", fix)
            texts = {transcript(completion, answer=True) for completion in item.completions}
            if self._judge.settings.mode == "compare" and len(texts) == 1:
                reason = "identical_completions"
        if reason is not None:
            self.tally.left_out[reason] += 1
        return reason is None

    def _label_items(self, items: Sequence[Item]) -> Iterator[Row]:
        questions = [self._judge.questions(item.prompt, item.completions) for item in items]
        jobs = self._judge.jobs(questions)
        missing = {key: job for key, job in jobs.items() if key not in self._log}
        self._answers["reused"] += len(jobs) - len(missing)
        answers = {key: self._log[key] for key in jobs if key in self._log}
        keys = list(missing)
        title = f"judge, up to row {self.tally.report.rows}"
        with hf_logging.tqdm(total=len(missing), desc=title, unit=" answers", leave=False, file=sys.stderr) as bar:
            for place, answer in self._judge.ask(list(missing.values())):
                answers[keys[place]] = answer
                if answer.get("failed") != TOO_LONG:  # which was not asked
                    self._log.add(keys[place], answer)
                    self._answers["asked"] += 1
                bar.update()
        for item, group in zip(items, questions, strict=True):
            judgement = self._judge.judgement(len(item.completions), group, answers)
            self.tally.add(item.row, item.cluster, judgement, item.ratings)
            texts = [transcript(completion, answer=True) for completion in item.completions]
            self.tally.show(item.row, transcript(item.prompt), texts, judgement, item.ratings)
            row = self._pair(item, judgement) if self._kept.mode == "compare" else self._ranking(item, judgement)
            if row is not None:
                before = {} if item.prompt is None else {"prompt": item.prompt}
                given = {name: item.columns[name] for name in TEMPLATE_COLUMNS if name in item.columns}
                yield {**before, **row, **given, "row": item.row}

    def _pair(self, item: Item, judgement: Judgement) -> Row | None:
        if not judgement.comparisons:
            return self._leave_out("too_long" if TOO_LONG in judgement.failed else "no_label")
        (pair,) = judgement.comparisons
        probability, better = pair.probability, pair.probability < 0.5  # index of the better one
        if abs(probability - 0.5) <= self._kept.tie_band:
            self.tally.report.ties += 1
            if self._kept.ties == "drop":
                return self._leave_out("ties")
            probability = 0.5
        elif max(probability, 1 - probability) < self._kept.min_confidence:
            return self._leave_out("below_min_confidence")
        return {
            "chosen": item.completions[better],
            "rejected": item.completions[not better],
            "preference_probability": max(probability, 1 - probability),
            "position_bias": pair.position_bias,
        }

    def _ranking(self, item: Item, judgement: Judgement) -> Row | None:
        rated = [place for place, rating in enumerate(judgement.ratings) if rating is not None]
        if len(rated) < 2:
            return self._leave_out("too_long" if TOO_LONG in judgement.failed else "no_label")
        ratings = [judgement.ratings[place] for place in rated]
        if max(ratings) - min(ratings) <= self._kept.tie_band:
            self.tally.report.ties += 1
            if self._kept.ties == "drop":
                return self._leave_out("ties")
            ratings = [sum(ratings) / len(ratings)] * len(ratings)
        return {"completions": [item.completions[place] for place in rated], "ratings": ratings}

    def _leave_out(self, reason: str) -> None:
        self.tally.left_out[reason] += 1


def _is_empty(completion: Any) -> bool:
    """Whether a completion has no text; other faults are found later."""
    if isinstance(completion, str):
        return not completion.strip()
    messages = as_messages(completion) if isinstance(completion, (dict, list, tuple)) else [None]
    last = messages[-1] if messages else {}
    if not isinstance(last, dict) or last.get("tool_calls"):
        return False
    return not (content_text(last.get("content")) or "").strip()
