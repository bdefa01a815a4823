"""The loss of a training run: a ranking loss by name or as a callable, its arguments, and what data it can use.

Knows losses, batches and column names. Knows nothing of models or trainers. What cannot work is said before training.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from trl_ext.data.validation import DataError
from trl_ext.losses.ranking import bradley_terry, center_rewards, listnet, pointwise, ranking_losses


PER_GROUP = {"margin": "group_margin", "target": "group_target"}
"""What a loss may be given per group, and the prepared column that it comes from."""


PAIR_COLUMNS = {"chosen", "chosen_ids"}
RATING_COLUMNS = {"chosen_rating", "ratings"}


class RankingObjective:
    """
    A ranking loss with its arguments, checked on a small example when it is made.

    Args:
        loss_type (`str` or `Callable`): name in the registry, or a function with the signature of `trl_ext.losses`.
        loss_kwargs (`dict`, *optional*): keyword arguments of the loss.
        center_rewards_coefficient (`float`, *optional*): weight of the centring penalty.

    Raises:
        ValueError: an unknown name, an argument that the loss does not take or refuses, or a loss that does not return
            one number per group.
    """

    def __init__(
        self,
        loss_type: str | Callable,
        loss_kwargs: dict[str, Any] | None = None,
        center_rewards_coefficient: float | None = None,
    ):
        self._loss = ranking_losses.get(loss_type)
        self.name = loss_name(loss_type)
        self.loss_kwargs = dict(loss_kwargs or {})
        self._center = center_rewards_coefficient
        self._check_arguments()
        try:
            self._try()
        except TypeError as error:
            if not self.loss_kwargs:
                raise
            raise ValueError(
                f"The loss '{self.name}' cannot be computed with loss_kwargs={self.loss_kwargs}: {error}. Give values "
                "of the kind that it takes."
            ) from error

    @property
    def needs_ratings(self) -> bool:
        """Whether the size of the ratings matters, so that `ranks` cannot be used."""
        return self._loss in (listnet, pointwise) or bool(self.loss_kwargs.get("margin_from_ratings"))

    def __call__(self, scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each group, (B,), from scores (B, K) and the batch of a `GroupCollator`."""
        given = {name: batch[name] for name in PER_GROUP if name in batch}
        losses = self._loss(scores, batch["ratings"], batch["group_mask"], **given, **self.loss_kwargs)
        if self._center is not None:
            losses = losses + self._center * center_rewards(scores, batch["group_mask"])
        return losses

    def check_data(self, dataset: Dataset | IterableDataset, name: str) -> None:
        """Raise [`DataError`] if the prepared data set has columns or group sizes that the loss cannot use."""
        columns = set(dataset.column_names or [])
        if self.loss_kwargs.get("margin_from_ratings") and columns & PAIR_COLUMNS and not columns & RATING_COLUMNS:
            raise DataError(
                "pairs without ratings, and margin_from_ratings=True (every margin would be 1)",
                "`chosen_rating` and `rejected_rating`",
                "Add the two columns, or leave `margin_from_ratings` out of loss_kwargs.",
                column="chosen_rating",
                dataset=name,
            )
        for argument, column in PER_GROUP.items():
            if column not in (dataset.column_names or []):
                continue
            try:
                self._try(**{argument: torch.tensor([0.5, 0.25])})
            except (TypeError, ValueError) as error:
                source = {"margin": "margin", "target": "preference_probability"}[argument]
                raise DataError(
                    f"a column that the loss '{self.name}' cannot use ({error})",
                    f"a loss that takes a {argument}, or data without one",
                    f"Use 'bradley_terry', or drop it with dataset.remove_columns({source!r}).",
                    column=source,
                    dataset=name,
                ) from error
        if columns.issuperset(PER_GROUP.values()):
            try:
                self._try(**dict.fromkeys(PER_GROUP, torch.tensor([0.5, 0.25])))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"'margin' beside 'preference_probability', and the loss '{self.name}' cannot use both ({error})",
                    "one of the two",
                    "Drop the other with dataset.remove_columns.",
                    column="margin",
                    dataset=name,
                ) from error
        if self._loss is bradley_terry and isinstance(dataset, Dataset):  # of a stream the first batch tells
            columns = dataset.select_columns(["candidate_ratings", "row_index"]).with_format("arrow")[:]
            sizes = pc.list_value_length(columns["candidate_ratings"]).to_numpy()
            if (sizes > 2).any():
                position = int((sizes > 2).argmax())
                raise DataError(
                    f"{sizes[position]} candidates, and the loss 'bradley_terry' compares two",
                    "2 candidates in every row",
                    "Use loss_type='plackett_luce' or 'pairwise'.",
                    row=columns["row_index"][position].as_py(),
                    column="completions" if "completions" in dataset.column_names else "candidate_ids",
                    dataset=name,
                )

    def _check_arguments(self) -> None:
        clash = sorted({*PER_GROUP, "scores", "ratings", "mask"} & set(self.loss_kwargs))
        if clash:
            raise ValueError(f"loss_kwargs gives {clash}, which come from the data. Give them as columns.")
        parameters = inspect.signature(self._loss).parameters
        try:
            inspect.signature(self._loss).bind(None, None, None, **self.loss_kwargs)
        except TypeError as error:
            own = [
                name
                for name, parameter in list(parameters.items())[3:]
                if name not in PER_GROUP and parameter.kind is not inspect.Parameter.VAR_KEYWORD
            ]
            raise ValueError(
                f"The loss '{self.name}' cannot be called with loss_kwargs={self.loss_kwargs}: {error}. It takes "
                f"(scores, ratings, mask) and the keyword arguments {own or 'none'}."
            ) from error

    def _try(self, **given: torch.Tensor) -> None:
        """Call the loss on two pairs."""
        scores, ratings = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        losses = self._loss(scores, ratings, torch.ones(2, 2, dtype=torch.bool), **given, **self.loss_kwargs)
        if not isinstance(losses, torch.Tensor) or losses.shape != (2,):
            found = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"The loss '{self.name}' returned {found} for 2 groups. Needed: a tensor of shape (2,), one loss per "
                "group, not reduced."
            )


def loss_name(loss_type: str | Callable) -> str:
    """The loss as a word: its name, or where a callable was defined."""
    if isinstance(loss_type, str):
        return loss_type
    if inspect.isfunction(loss_type):
        return f"{loss_type.__module__}.{loss_type.__qualname__}"
    return f"{type(loss_type).__module__}.{type(loss_type).__qualname__}"


def check_loss_type(loss_type: str | Callable) -> None:
    """Raise `ValueError` for what a config file can hold and is no loss: a number, or nothing."""
    if not isinstance(loss_type, str) and not callable(loss_type):
        raise ValueError(f"loss_type={loss_type!r} is no loss. Needed: its name, or in Python a callable.")


def parse_loss_kwargs(loss_kwargs: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """`loss_kwargs` of a config as a dictionary; raises `ValueError` for anything else."""
    if isinstance(loss_kwargs, str):
        try:
            loss_kwargs = json.loads(loss_kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"loss_kwargs={loss_kwargs!r} is not JSON ({error}). Needed e.g. '{{\"temperature\": 0.5}}'."
            ) from error
    if loss_kwargs is not None and not isinstance(loss_kwargs, dict):
        raise ValueError(f"loss_kwargs={loss_kwargs!r} is not a dictionary of keyword arguments.")
    return loss_kwargs
