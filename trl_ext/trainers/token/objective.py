"""The token loss of a training run, its averaging, and checks that the labels suit the loss.

It knows losses, logits and labels, and how an output becomes a score. It knows nothing of models, tokens or trainers.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from trl_ext.data.validation import DataError
from trl_ext.losses.properties import OUTPUT_MEANINGS
from trl_ext.losses.token import average, averaging_items, averaging_terms, token_losses
from trl_ext.metrics.token import log_odds
from trl_ext.trainers.ranking.objective import loss_name


Averaging = Literal["token", "sequence"]


class TokenObjective:
    """
    A token loss with its arguments and averaging. The constructor tries it on a small example.

    Args:
        loss_type (`str` or `Callable`): name in the registry, or a function with the signature of
            `trl_ext.losses.token`.
        loss_kwargs (`dict`, *optional*): keyword arguments of the loss.
        class_weights (`list[float]`, *optional*): a weight for each class.
        averaging (`str`): `"token"` or `"sequence"`, see [`~trl_ext.losses.token.average`].
        categories (`int`): G.
        outputs (`int`): C, outputs of the head for each category.
        label_smoothing (`float`, *optional*, defaults to `0.0`): share of each label that is spread evenly over the
            classes, as `label_smoothing_factor` of `TrainingArguments` does. With one output, the classes are right
            and wrong.

    Attributes:
        name (`str`): the name of the loss.
        is_number (`bool`): an output estimates the label, which may be any number.
        calibrated (`bool`): sigmoid(score) is a probability.
        threshold (`float`): a position with a score above it counts as right.

    Raises:
        ValueError: if the name is unknown, the loss does not accept an argument or the number of outputs, or it does
            not return one number per sequence.
    """

    def __init__(
        self,
        loss_type: str | Callable,
        loss_kwargs: dict[str, Any] | None,
        class_weights: Sequence[float] | None,
        averaging: Averaging,
        categories: int,
        outputs: int,
        label_smoothing: float = 0.0,
    ):
        self._loss = token_losses.get(loss_type)
        self._properties = token_losses.properties_of(loss_type)
        self.name = loss_name(loss_type)
        self.averaging = averaging
        self.categories = categories
        self.outputs = outputs
        self.loss_kwargs = dict(loss_kwargs or {})
        if class_weights is not None:
            if "class_weights" in self.loss_kwargs:
                raise ValueError("class_weights is given twice, also in `loss_kwargs`. Give it in one place.")
            self.loss_kwargs["class_weights"] = list(class_weights)
        self.is_number = self._properties.outputs == "label"
        self.calibrated = self._properties.outputs == "log_odds"
        self.threshold = 0.5 if self.is_number else 0.0
        self._smoothing = label_smoothing
        self._check_arguments()
        self._check_smoothing()
        self._try()

    # --------------------------------------------------------------------------------------------------------- loss
    def sums(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each sequence (B,), summed over its labels, from logits (B, T, G, C) and a collated batch."""
        labels = self._smoothed(batch["token_labels"]) if self._smoothing else batch["token_labels"]
        return self._loss(logits, labels, batch["label_mask"], **self.loss_kwargs)

    def _smoothed(self, labels: torch.Tensor) -> torch.Tensor:
        """Smoothed labels: probabilities of right (B, T, G), or with three classes one of each class (B, T, G, 3)."""
        if self.outputs < 3:
            return (1 - self._smoothing) * labels + self._smoothing / 2
        classes = labels[..., None] == torch.tensor([-1.0, 0.0, 1.0], device=labels.device)  # (B, T, G, 3)
        return (1 - self._smoothing) * classes.to(labels.dtype) + self._smoothing / 3

    def items(self, mask: torch.Tensor) -> torch.Tensor:
        """What each sequence adds to the divisor, (B,)."""
        return averaging_items(mask, self.averaging)

    def terms(self, sums: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What each sequence adds to the numerator, (B,)."""
        return averaging_terms(sums, mask, self.averaging)

    def mean(
        self, sums: torch.Tensor, mask: torch.Tensor, num_items: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """What the batch contributes to the mean loss over `num_items` (by default the items of the batch)."""
        return average(sums, mask, self.averaging, num_items)

    # ------------------------------------------------------------------------------------------------------- scores
    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Turn logits (..., C) into scores (...), where higher is better: the only output, or log-odds.

        With three classes (-1, 0, 1), these are the log-odds of neutral or positive against negative.
        """
        return log_odds(logits, (1, 2) if logits.shape[-1] == 3 else (-1,))

    def right(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels as numbers, where more than one half means right. With three classes, neutral counts as right."""
        return (labels >= 0).to(labels.dtype) if self.outputs == 3 else labels

    def hits(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether predictions from logits (B, T, G, C) match the labels, (B, T, G). Numbers above 0.5 are right."""
        return (self.scores(logits) > self.threshold) == (self.right(batch["token_labels"]) > 0.5)

    @property
    def meaning(self) -> str:
        """What an output means, in words."""
        if self.calibrated and self.outputs > 1:
            return "class logits: wrong, right" if self.outputs == 2 else "class logits: -1, 0, 1"
        return OUTPUT_MEANINGS.get(self._properties.outputs, f"outputs trained with the loss '{self.name}'")

    # --------------------------------------------------------------------------------------------------------- data
    def check_data(self, dataset: Dataset | IterableDataset, name: str, column: str) -> Dataset | IterableDataset:
        """
        Check the labels of a prepared data set and return it. The labels of a stream are checked as rows are read.

        Raises:
            DataError: if the loss cannot use a label. The message names the row, the column and the fix.
        """
        if self._properties.labels == "any":
            return dataset
        check = _LabelCheck(self.name, self._properties.labels == "sign", self.outputs, name, column)
        if isinstance(dataset, IterableDataset):
            return dataset.filter(check.row)
        for batch in dataset.select_columns(["label_values", "row_index"]).with_format("arrow").iter(batch_size=4096):
            lists = batch["label_values"].combine_chunks()
            rows = np.repeat(batch["row_index"].to_numpy(), np.diff(lists.offsets.to_numpy()))
            check(lists.flatten().to_numpy(zero_copy_only=False), rows)
        return dataset

    def _check_arguments(self) -> None:
        clash = sorted({"logits", "labels", "mask"} & set(self.loss_kwargs))
        if clash:
            raise ValueError(f"loss_kwargs gives {clash}, which come from the data.")
        try:
            inspect.signature(self._loss).bind(None, None, None, **self.loss_kwargs)
        except TypeError as error:
            own = list(inspect.signature(self._loss).parameters)[3:]
            raise ValueError(
                f"The loss '{self.name}' cannot be called with {self.loss_kwargs}: {error}. It takes "
                f"(logits, labels, mask) and the keyword arguments {own or 'none'}."
            ) from error

    def _check_smoothing(self) -> None:
        if not self._smoothing:
            return
        if not 0 < self._smoothing < 1:
            raise ValueError(f"label_smoothing_factor={self._smoothing} is no share. Needed: 0 to below 1.")
        if not self.calibrated:
            raise ValueError(
                f"label_smoothing_factor={self._smoothing} makes labels uncertain, and the loss '{self.name}' does "
                "not learn probabilities. Use 'bce' or 'ce', or leave label_smoothing_factor out."
            )

    def _try(self) -> None:
        """Call the loss on two sequences of one token."""
        shape = (2, 1, self.categories)
        labels = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(shape)
        mask = torch.ones(shape, dtype=torch.bool)
        batch = {"token_labels": labels, "label_mask": mask}
        sums = self.sums(torch.zeros(*shape, self.outputs), batch)
        averaging_items(mask, self.averaging)
        if not isinstance(sums, torch.Tensor) or sums.shape != (2,):
            found = tuple(sums.shape) if isinstance(sums, torch.Tensor) else type(sums).__name__
            raise ValueError(
                f"The loss '{self.name}' returned {found} for 2 sequences. Needed: a tensor of shape (2,), the sum "
                "over the labels of each."
            )


class _LabelCheck:
    """
    Raises an error at the first label that a loss cannot use. It remembers whether -1 and 0 both occurred.

    Args:
        loss (`str`): the name of the loss, for messages.
        signs (`bool`): labels are +1 and -1, or 1 and 0. Otherwise they are probabilities, or with three outputs -1,
            0 and 1.
        outputs (`int`): outputs of the head for each category.
        name, column (`str`): the data set and the column that the labels came from, for messages.
    """

    def __init__(self, loss: str, signs: bool, outputs: int, name: str, column: str):
        self._range = not signs and outputs < 3
        self._signs = signs
        self._loss, self._outputs, self._name, self._column = loss, outputs, name, column
        self._seen: set[float] = set()

    def __call__(self, values: np.ndarray, rows: np.ndarray) -> None:
        if self._range:
            self._refuse(values, rows, ~((values >= 0) & (values <= 1)), "labels in [0, 1]")
            return
        self._refuse(values, rows, ~np.isin(values, (-1.0, 0.0, 1.0)), "labels -1, 0 or 1")
        if self._signs:
            self._seen.update(np.unique(values).tolist())
            if {-1.0, 0.0} <= self._seen:
                self._refuse(values, rows, np.isin(values, (-1.0, 0.0)), "labels +1 and -1, or 1 and 0, not all three")

    def row(self, row: dict[str, Any]) -> bool:
        """Check a row of a stream. Always returns True."""
        values = np.asarray(row["label_values"], dtype=np.float64)
        self(values, np.full(len(values), row["row_index"]))
        return True

    def _refuse(self, values: np.ndarray, rows: np.ndarray, wrong: np.ndarray, needed: str) -> None:
        if wrong.any():
            first = int(wrong.argmax())
            outputs = f" of {self._outputs} outputs" if self._outputs > 1 else ""
            raise DataError(
                f"the label {values[first]:g}, which the loss '{self._loss}'{outputs} cannot use",
                needed,
                "Map the labels, set those that are not annotated to null, or use loss_type='mse' for numbers.",
                row=int(rows[first]),
                column=self._column,
                dataset=self._name,
            )
