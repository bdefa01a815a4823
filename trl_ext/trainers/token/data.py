"""Prepares the data sets of a token-level run, checks that its loss can use the labels, and counts the rows.

It knows rows, labels and counts. It knows nothing of models or batches.
"""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from trl_ext.data.report import DataReport
from trl_ext.data.span_rows import COLUMNS, SpanKind
from trl_ext.data.spans import prepare_spans
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models.inputs import InputLimits
from trl_ext.trainers.token.config import TokenRewardConfig
from trl_ext.trainers.token.objective import TokenObjective


Rows = Dataset | IterableDataset

# Columns that the collators read: prepared ones, and columns of the user's rows.
_PREPARED = [
    "span_input_ids",
    "label_positions",
    "label_values",
    "label_categories",
    "label_steps",
    "completion_start",
    "row_index",
]
_ORIGINAL = {"outcome": ["prompt"], "stepwise": ["labels"], "segment": []}


class LabelledData:
    """
    Prepares the data sets of one run.

    Args:
        kind (`str`): `"outcome"`, `"stepwise"` or `"segment"`.
        tokenizer (`PreTrainedTokenizerBase`): makes token ids, by `tokenization`.
        tokenization ([`TokenizationSettings`]): how plain text becomes ids.
        args ([`TokenRewardConfig`]): limits, placement of labels.
        categories (`tuple[str, ...]`): names of the categories.
        objective ([`TokenObjective`]): says which labels the loss can use.
        limits ([`InputLimits`]): token ids and positions that the model has.
        reading (`Callable[[bool], dict]`): returns the arguments of `prepare_spans` that only this type of data set
            has; it gets whether the rows are for training.
    """

    def __init__(
        self,
        kind: SpanKind,
        tokenizer: PreTrainedTokenizerBase,
        tokenization: TokenizationSettings,
        args: TokenRewardConfig,
        categories: tuple[str, ...],
        objective: TokenObjective,
        limits: InputLimits,
        reading: Callable[[bool], dict[str, Any]],
    ):
        self._kind = kind
        self._tokenizer = tokenizer
        self._tokenization = tokenization
        self._args = args
        self._categories = categories
        self._objective = objective
        self._limits = limits
        self._reading = reading
        self.reports: list[DataReport] = []

    @property
    def columns(self) -> list[str]:
        """The columns that a batch is made of."""
        return [*_PREPARED, *_ORIGINAL[self._kind]]

    def prepare(self, dataset: Rows, name: str, training: bool = False) -> Rows:
        """Add token ids and labelled tokens to the rows. Prepared rows are not changed. Raises [`DataError`]."""
        done = "row_index" in (dataset.column_names or [])
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():
            prepared, report = prepare_spans(
                dataset,
                self._tokenizer,
                kind=self._kind,
                tokenization=self._tokenization,
                max_length=self._args.max_length,
                dataset_name=name,
                num_proc=self._args.dataset_num_proc,
                min_survival=self._args.min_survival,
                label_placement=self._args.label_placement,
                categories=self._categories,
                vocab_size=self._limits.vocab_size,
                max_positions=self._limits.max_positions,
                **self._reading(training),
            )
            if not done:
                prepared = self._objective.check_data(prepared, name, COLUMNS[self._kind][1])
                self.reports.append(report)
        return prepared

    def prepare_all(self, datasets: Rows | dict[str, Rows] | None, name: str = "eval") -> Any:
        """[`LabelledData.prepare`] for one evaluation data set, a dictionary of them, or none."""
        if isinstance(datasets, dict):
            return {key: self.prepare(rows, f"{name}_{key}") for key, rows in datasets.items()}
        return None if datasets is None else self.prepare(datasets, name)

    def counts(self) -> dict[str, int]:
        """The counts of used and dropped rows, once. For a stream each time, because its counts grow."""
        return {name: count for report in self.reports for name, count in report.news().items()}
