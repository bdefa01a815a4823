"""The ranking loss of a training run, its arguments, and checks that the data suits the loss.

It knows losses, batches and column names, and nothing of models or trainers. A loss declares its properties (see
[`RankingLossProperties`]); undeclared properties have strict defaults. Data that the loss cannot use raises an error
before training.
"""

import inspect
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from trl_ext.data.validation import DataError
from trl_ext.losses.penalties import batch_sum_to_zero
from trl_ext.losses.ranking import center_rewards, ranking_losses


logger = logging.getLogger(__name__)

PER_GROUP = {"margin": "group_margin", "target": "group_target"}
"""Argument of a loss that has one value per group, and the prepared column with its values."""

SOURCES = {"margin": "margin", "target": "preference_probability"}
"""The same arguments, and the column of the user's rows that each comes from."""

PAIR_COLUMNS = {"chosen", "chosen_ids"}
RATING_COLUMNS = {"chosen_rating", "ratings"}


class RankingObjective:
    """
    A ranking loss with its arguments. The constructor tries it on a small example.

    Args:
        loss_type (`str` or `Callable`): name in the registry, or a function with the signature of `trl_ext.losses`.
        loss_kwargs (`dict`, *optional*): keyword arguments of the loss.
        center_rewards_coefficient (`float`, *optional*): weight of the centring penalty.
        label_smoothing (`float`, *optional*, defaults to `0.0`): probability, below 0.5, that a preference is the
            wrong way round. This is the conservative loss of *A note on DPO with noisy preferences & relationship to
            IPO* by E. Mitchell (https://ericmitchell.ai/cdpo.pdf).
        batch_sum_to_zero_coefficient (`float`, *optional*): weight of [`~trl_ext.losses.batch_sum_to_zero`].

    Raises:
        ValueError: if the name is unknown, the loss does not accept an argument, or it does not return one number per
            group.
    """

    def __init__(
        self,
        loss_type: str | Callable,
        loss_kwargs: dict[str, Any] | None = None,
        center_rewards_coefficient: float | None = None,
        label_smoothing: float = 0.0,
        batch_sum_to_zero_coefficient: float | None = None,
    ):
        self._loss = ranking_losses.get(loss_type)
        self._properties = ranking_losses.properties_of(loss_type)
        self.name = loss_name(loss_type)
        self.loss_kwargs = dict(loss_kwargs or {})
        self._center = center_rewards_coefficient
        self._smoothing = label_smoothing
        self._sum_to_zero = batch_sum_to_zero_coefficient
        if self._sum_to_zero is not None and not self._sum_to_zero >= 0:
            raise ValueError(f"batch_sum_to_zero_coefficient={self._sum_to_zero}; needed: a number of at least 0.")
        if label_smoothing and not 0 < label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing_factor={label_smoothing} is no share of wrong preferences. Needed: at least 0 and "
                "below 0.5."
            )
        if label_smoothing and not self._properties.takes_target:
            raise ValueError(
                f"label_smoothing_factor={label_smoothing} makes preferences uncertain, and the loss '{self.name}' "
                "takes no probability. Use 'bradley_terry', or leave label_smoothing_factor out."
            )
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
        """Whether the loss uses the size of the ratings, so that it cannot use `ranks`."""
        return self._properties.needs_ratings(self._arguments())

    @property
    def uses_pair_ratings(self) -> bool:
        """Whether the loss reads `chosen_rating` and `rejected_rating`, for their size or for ties."""
        return self.needs_ratings or self._properties.learns_from_ties

    def _arguments(self) -> dict[str, Any]:
        """The keyword arguments of the loss, including those that a `functools.partial` binds."""
        bound, loss = {}, self._loss
        while isinstance(loss, partial):
            bound, loss = {**loss.keywords, **bound}, loss.func
        return {**bound, **self.loss_kwargs}

    def __call__(self, scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each group, (B,), from scores (B, K) and the batch of a `GroupCollator`."""
        given = {name: batch[name] for name in PER_GROUP if name in batch}
        if self._smoothing:
            target = given.get("target", batch["ratings"].new_ones(len(scores)))  # (B,)
            given["target"] = target + self._smoothing * (1 - 2 * target)
        limit = self._properties.max_candidates
        if limit is not None and scores.shape[1] > limit:  # `check_data` cannot see the rows of a stream
            found = int(batch["group_mask"].sum(-1).max())
            if found > limit:
                raise ValueError(
                    f"The loss '{self.name}' compares {limit} candidates, found {found} in a row: use `pairwise` or "
                    "`plackett_luce`, or a loss that is declared with max_candidates=None."
                )
        losses = self._loss(scores, batch["ratings"], batch["group_mask"], **given, **self.loss_kwargs)
        if self._center is not None:
            losses = losses + self._center * center_rewards(scores, batch["group_mask"])
        return losses

    def with_batch_penalty(
        self,
        losses: torch.Tensor,
        scores: torch.Tensor,
        mask: torch.Tensor,
        members: int = 1,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Add the penalty of the batch to the loss of each of its groups, for training.

        A batch is what one process runs at a time. Groups have the same weight in an optimizer step, so with gradient
        accumulation or several processes the step has the mean of the penalties, weighted by numbers of groups.

        Args:
            losses (`torch.Tensor` of shape `(M * B,)`): losses of the groups, all of the first member first.
            scores, mask (`torch.Tensor` of shape `(M * B, K)`): the scores, and True for a real candidate.
            members (`int`, *optional*, defaults to `1`): M; the batch of each member has its own penalty.
            weights (`torch.Tensor` of shape `(M, B)`, *optional*): how often a member counts a group.
        """
        if not self._sum_to_zero:
            return losses
        shape = (members, -1, mask.shape[1])
        penalty = batch_sum_to_zero(scores.view(shape), mask.view(shape), weights)  # (M,)
        return losses + self._sum_to_zero * penalty.repeat_interleave(len(losses) // members)

    def check_data(self, dataset: Dataset | IterableDataset, name: str) -> None:
        """Raise [`DataError`] if the prepared data set has columns or group sizes that the loss cannot use."""
        # a mapped stream does not know its columns; one without a row that is kept has nothing to check
        columns = set(dataset.column_names or next(iter(dataset), {}))
        switch = self._properties.uses_distances
        if not self.uses_pair_ratings and "chosen_rating" in columns:
            how = f" It uses them with loss_kwargs={{{switch!r}: True}}." if isinstance(switch, str) else ""
            logger.info(
                f"{name} data: `chosen_rating` and `rejected_rating` are not used by the loss '{self.name}'.{how}"
            )
        on = isinstance(switch, str) and self.needs_ratings
        if on and columns & PAIR_COLUMNS and not columns & RATING_COLUMNS:
            raise DataError(
                f"pairs without ratings, and {switch}={self._arguments()[switch]!r}, which needs them",
                "`chosen_rating` and `rejected_rating`",
                f"Add the two columns, or leave `{switch}` out of loss_kwargs.",
                column="chosen_rating",
                dataset=name,
            )
        for argument, column in PER_GROUP.items():
            if column in columns:
                self._check_takes(argument, name)
        if self._smoothing and PER_GROUP["margin"] in columns:
            raise DataError(
                f"a margin beside label_smoothing_factor={self._smoothing}",
                "one of the two",
                "Drop the column with dataset.remove_columns('margin'), or leave label_smoothing_factor out.",
                column="margin",
                dataset=name,
            )
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
        limit = self._properties.max_candidates
        if limit is not None and isinstance(dataset, Dataset):
            columns = dataset.select_columns(["candidate_ratings", "row_index"]).with_format("arrow")[:]
            sizes = pc.list_value_length(columns["candidate_ratings"]).to_numpy()
            if (sizes > limit).any():
                position = int((sizes > limit).argmax())
                raise DataError(
                    f"{sizes[position]} candidates, and the loss '{self.name}' compares {limit}",
                    f"{limit} candidates in every row",
                    "Use loss_type='plackett_luce' or 'pairwise', or declare the loss with "
                    "`@ranking_losses.declare(max_candidates=None)` if it takes any number.",
                    row=columns["row_index"][position].as_py(),
                    column="completions" if "completions" in dataset.column_names else "candidate_ids",
                    dataset=name,
                )

    def _check_takes(self, argument: str, name: str) -> None:
        """Raise [`DataError`] unless the loss declares that it uses this argument and accepts it."""
        source, reason, cause = SOURCES[argument], None, None
        try:
            self._try(**{argument: torch.tensor([0.5, 0.25])})
        except (TypeError, ValueError) as error:
            reason, cause = str(error), error
        if reason is None and not getattr(self._properties, f"takes_{argument}"):
            reason = f"it does not declare takes_{argument}=True"
        if reason is not None:
            raise DataError(
                f"a column that the loss '{self.name}' cannot use ({reason})",
                f"a loss that takes a {argument}, or data without one",
                f"Use 'bradley_terry', or drop the column with dataset.remove_columns({source!r}). A loss that you "
                f"wrote says that it uses the column with `@ranking_losses.declare(takes_{argument}=True)`.",
                column=source,
                dataset=name,
            ) from cause

    def _check_arguments(self) -> None:
        switch = self._properties.uses_distances
        known = inspect.signature(self._loss).parameters
        if isinstance(switch, str) and switch not in known:
            raise ValueError(
                f"The loss '{self.name}' declares uses_distances={switch!r}, but it has no such keyword argument. "
                f"Needed: True, False, or one of {[*known][3:]}."
            )
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
        """Call the loss on two pairs. Raises the loss's own errors, and `ValueError` for a result of a wrong shape."""
        scores, ratings = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        losses = self._loss(scores, ratings, torch.ones(2, 2, dtype=torch.bool), **given, **self.loss_kwargs)
        if not isinstance(losses, torch.Tensor) or losses.shape != (2,):
            found = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"The loss '{self.name}' returned {found} for 2 groups. Needed: a tensor of shape (2,), one loss per "
                "group, not reduced."
            )


def loss_name(loss_type: str | Callable) -> str:
    """The loss as text: its name, or the module and name of a callable. For a partial also the arguments it binds."""
    if isinstance(loss_type, str):
        return loss_type
    if isinstance(loss_type, partial):
        bound = [*map(repr, loss_type.args), *(f"{name}={value!r}" for name, value in loss_type.keywords.items())]
        return f"{loss_name(loss_type.func)}({', '.join(bound)})"
    if inspect.isfunction(loss_type):
        return f"{loss_type.__module__}.{loss_type.__qualname__}"
    return f"{type(loss_type).__module__}.{type(loss_type).__qualname__}"


def check_loss_type(loss_type: str | Callable) -> None:
    """Raise `ValueError` for a value that cannot be a loss, such as a number in a config file."""
    if not isinstance(loss_type, str) and not callable(loss_type):
        raise ValueError(f"loss_type={loss_type!r} is no loss. Needed: its name, or in Python a callable.")


def parse_loss_kwargs(loss_kwargs: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Read `loss_kwargs` of a config, a dictionary or JSON text. Raises `ValueError` for anything else."""
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
