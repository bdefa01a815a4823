"""`RewardEnsemble`: several reward models and functions as one TRL reward function, with their disagreement.

It normalises the scores of its members, reduces them, and reads and writes ensemble folders. `members.py` loads and
runs members; `reducers.py` combines their scores. It knows nothing of training.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.logs import follow_transformers
from trl_ext.models.ensemble.ensemble_files import (
    EnsembleFile,
    EnsembleFileError,
    check_normalizer,
    member_folders,
    read_ensemble,
    write_ensemble,
)
from trl_ext.models.sidecar import read_sidecar
from trl_ext.scoring.fusion import FusionMethod, fit_fusion_weights
from trl_ext.scoring.member_table import ROWS_TO_TELL, check_scales, log_members, to_list, to_table
from trl_ext.scoring.members import Member, check_finite, has_adapter, is_ensemble, make_sources
from trl_ext.scoring.normalizer import mean_and_std
from trl_ext.scoring.raw_scorer import as_list, by_place
from trl_ext.scoring.reducers import combine, disagreement, reducers, takes_weights
from trl_ext.scoring.remote import files_of, is_served, local_files, on_server
from trl_ext.scoring.scales import changing_readings
from trl_ext.scoring.scorer import RewardScorer


logger = logging.getLogger(__name__)

Normalizer = dict[str, float]


class ScoreWithInterval(NamedTuple):
    """The score of a row, with the lowest and highest score of its members; `None` where there is no score."""

    reward: float | None
    lower: float | None
    upper: float | None


class RewardEnsemble:
    """
    Scores completions with several reward models, reward functions or both. It is a TRL reward function:
    `reward_funcs=[ensemble]`.

    A member with a stored or fitted normaliser has its scores normalised: minus the mean, divided by the standard
    deviation. A reducer then combines the members' scores into one number. Scores come back in the order of the rows
    and do not depend on the batch. Members that are adapters on one base, quantized in one way, share one copy of it
    in memory.

    A member may give `None` for a row that it does not apply to. The row is then reduced over the other members;
    `weighted` and `fusion` add nothing for the missing one, as TRL does with several reward functions. The result is
    `None` if no member has a score. A score that is not finite raises an error.

    As a reward function in `GRPOTrainer` or `RLOOTrainer` it logs `<name>/disagreement` (population standard deviation
    of the members, mean over the batch) and `<name>/<member>` (mean score) as metrics, and the disagreement and the
    score of each member as columns of the completions table.

    Args:
        members (`str`, `Path`, `PeftModel`, or a sequence):
            The folder of a saved ensemble (with `reward_ensemble.json`), `URL#FOLDER` of one whose members a server
            holds, or a list in which each member is the path of a reward model, a reward model in memory, a
            [`RewardScorer`] (to give a member other arguments), a TRL reward function, or another ensemble.
        reduce (`str` or `Callable`, *optional*):
            Reducer, see `trl_ext.scoring.reducers`: `"mean"`, `"weighted"`, `"min"`, `"median"`, `"mean_minus_std"`,
            `"mean_minus_var"`, `"fusion"`, the name of a plugin, or a function of scores (N, M). Defaults to the
            reducer that the folder stores, else `"mean"`.
        weights (`Sequence[float]`, *optional*):
            One weight per member, for `"weighted"` and `"fusion"`. [`~RewardEnsemble.fit_fusion`] learns the weights
            of `"fusion"`.
        normalize (`bool`, *optional*):
            Whether normalisers are applied. Defaults to the setting that the folder stores, else `True`.
        name (`str`, *optional*):
            The name of the ensemble in messages and metrics. Defaults to `"RewardEnsemble"`.
        base_model (`PreTrainedModel`, `PeftModel`, `str` or `Path`, *optional*):
            A model in memory whose backbone serves as the base of the adapters, e.g. the policy that is trained with
            this ensemble: policy and ensemble then share one 4-bit base. The weights of the policy do not change
            (they are compared before and after); adapters that would change them are refused. If `base_model` is a
            path, it says where the base is now, if it moved.
        scorer_kwargs (`dict`, *optional*):
            Arguments for each [`RewardScorer`] that the ensemble makes from a path or model, e.g.
            `{"max_length": 1024}`. With an `aggregation` or `segmenter` stored normalisers do not hold and are not
            applied, and what is fitted stays in memory.
        **reduce_kwargs:
            Arguments of the reducer, e.g. `coefficient=0.1`.

    Attributes:
        members (`list[str]`): names of the members, in order.
        normalizers (`list[dict | None]`): the normaliser `{"mean", "std"}` of each member, if it has one.
        num_truncated (`int`): rows cut to `max_length` so far, summed over the members.
        models (`list[nn.Module]`): the models in memory that the members use.

    Raises:
        `ValueError`: there is no member, the weights do not fit, the reducer is unknown, or `base_model` is given and
            no member is an adapter.
        `TypeError`: an entry cannot be a member, or the reducer does not have an argument.

    Example:

    ```python
    >>> ensemble = RewardEnsemble(["outputs/a", "outputs/b"], reduce="mean_minus_std", coefficient=0.5)
    >>> ensemble(prompts=["2 + 2 =", "2 + 2 ="], completions=[" 4", " 5"])
    [0.9310, -1.2054]
    >>> ensemble.score_with_interval(["2 + 2 ="], [" 4"])
    [ScoreWithInterval(reward=0.9310, lower=0.9002, upper=1.1207)]
    ```
    """

    def __init__(
        self,
        members: str | Path | Sequence[Member],
        reduce: str | Callable | None = None,
        weights: Sequence[float] | None = None,
        normalize: bool | None = None,
        *,
        name: str | None = None,
        base_model: nn.Module | str | Path | None = None,
        scorer_kwargs: dict[str, Any] | None = None,
        **reduce_kwargs: Any,
    ):
        self.__name__ = name or type(self).__name__  # where TRL looks for a reward function's name
        follow_transformers()
        self._folder: Path | None = None
        self._file = EnsembleFile(members=["none"])
        if isinstance(members, (str, Path)):
            source = members
            self._folder, self._file = _read(source)
            members = member_folders(self._folder, self._file)
            members = [on_server(source, member) for member in members] if is_served(source) else members
            if reduce is None:
                weights = self._file.weights if weights is None else weights
                reduce_kwargs = self._file.reduce_kwargs | reduce_kwargs
            reduce = self._file.reduce if reduce is None else reduce
        members = list(members)
        if not members:
            raise ValueError("The ensemble has no members; needed: at least one.")
        if scorer_kwargs and not any(isinstance(member, (str, Path, nn.Module)) for member in members):
            raise TypeError(
                f"scorer_kwargs has {sorted(scorer_kwargs)}, and no member uses them. Needed: a member that is a path "
                "or a model, because the arguments are for the RewardScorer that the ensemble makes of it."
            )
        self.normalize = self._file.normalize if normalize is None else normalize
        self.set_reducer(reduce or "mean", weights, size=len(members), **reduce_kwargs)

        moved_to = None if isinstance(base_model, nn.Module) else base_model
        if moved_to is not None and not any(map(has_adapter, members)):
            raise ValueError("`base_model` says where the base of adapters is, and no member is one. Leave it out.")
        nested = [_nested(m, moved_to, scorer_kwargs) if is_ensemble(m) else m for m in members]
        self._sources = make_sources(nested, base_model, scorer_kwargs or {})
        by_place = {place: (source, number) for source, places in self._sources for number, place in enumerate(places)}
        self._members = [by_place[place] for place in range(len(members))]
        self.members = _unique([source.names[number] for source, number in self._members])
        stored = [source.normalizers[number] for source, number in self._members]
        self._readings = changing_readings(scorer_kwargs or {})
        if self._folder is not None and not self._readings:  # else they are of other scores
            stored = [mine or own for mine, own in zip(self._file.normalizers, stored, strict=True)]
        self.normalizers: list[Normalizer | None] = stored
        self._scales_checked = False
        names = ", ".join(self.members)
        logger.info(f"{self.__name__} starts: {len(self.members)} members ({names}), reduced by {reduce or 'mean'}")

    # ---------------------------------------------------------------------------------------------------------- scores
    def __call__(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """
        Score each completion after its prompt. The arguments are those of a [`RewardScorer`] call; reward functions
        among the members get all columns.

        Returns:
            `list[float | None]`: one score per row, in the order of the rows.
        """
        table = self._table(prompts, completions, columns)
        log_members(table, self.members, self.__name__, columns)
        return to_list(self._combine(table))

    def score_members(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[float | None]]:
        """
        The score of each member, normalised as for the reducer: a list of M scores per row. Arguments as in a call.
        """
        return [to_list(row) for row in self._table(prompts, completions, columns)]

    def score_with_interval(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[ScoreWithInterval]:
        """
        Each score with the range of its members' scores. Arguments as in a call.

        `lower` and `upper` are the lowest and highest member score, normalised as for the reducer, without weights. A
        wide range means that the members disagree. With `"min"` the reward is `lower`.
        """
        table = self._table(prompts, completions, columns)
        present = ~table.isnan().all(dim=1)
        lower = table.nan_to_num(nan=torch.inf).amin(dim=1).where(present, torch.nan)
        upper = table.nan_to_num(nan=-torch.inf).amax(dim=1).where(present, torch.nan)
        parts = (to_list(self._combine(table)), to_list(lower), to_list(upper))
        return [ScoreWithInterval(*row) for row in zip(*parts, strict=True)]

    def combine(self, member_scores: Sequence[Sequence[float | None]]) -> list[float | None]:
        """Reduce the result of [`~RewardEnsemble.score_members`] to one score per row."""
        return to_list(self._combine(to_table(member_scores, len(self.members))))

    def disagreement(self, member_scores: Sequence[Sequence[float | None]]) -> list[float | None]:
        """
        The population standard deviation of each row in the result of [`~RewardEnsemble.score_members`]; 0 if only one
        member has a score, `None` if none has.
        """
        return to_list(combine(to_table(member_scores, len(self.members)), disagreement))

    # --------------------------------------------------------------------------------------------------------- fitting
    def set_reducer(
        self,
        reduce: str | Callable,
        weights: Sequence[float] | None = None,
        *,
        size: int | None = None,
        **reduce_kwargs: Any,
    ) -> None:
        """
        Change the reducer. The arguments are those of the class.

        Raises:
            `ValueError`: the reducer is unknown, takes no weights, or needs weights that are missing or of the wrong
                number.
            `TypeError`: the reducer does not have an argument.
        """
        size = len(self.members) if size is None else size
        reducer = reducers.get(reduce)
        wanted = takes_weights(reducer)
        if weights is None and wanted and reduce != "fusion":
            raise ValueError(f"The reducer {reduce!r} needs `weights`: a number for each of the {size} members.")
        if weights is not None:
            if not wanted:
                raise ValueError(
                    f"The reducer {reduce!r} takes no weights. Leave them out, or pass reduce='weighted'."
                )
            weights = [float(weight) for weight in weights]
            if len(weights) != size or not torch.tensor(weights).isfinite().all():
                raise ValueError(f"weights={weights}; needed: {size} finite numbers, one for each member.")
        self._reduce, self._reducer, self._reduce_kwargs, self.weights = reduce, reducer, reduce_kwargs, weights
        # finds wrong arguments now, before the first batch is scored
        if not (wanted and weights is None):
            combine(torch.zeros(2, size), reducer, weights, **reduce_kwargs)

    def fit_normalizer(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[Normalizer]:
        """
        Fit a normaliser for each member: its scores of these rows get mean 0 and (population) standard deviation 1.

        If the ensemble was made from its folder, `reward_ensemble.json` is updated; the members' files are not. A row
        without a score from a member does not count for that member. The weights of `"fusion"` are rescaled, so that
        differences of the fused scores stay as they were learnt. Arguments as in a call.

        Returns:
            `list[dict[str, float]]`: `mean` and `std` of each member's raw scores.

        Raises:
            `ValueError`: a member has a score for fewer than two rows, or the same score for all rows.
        """
        raw = self._raw_table(prompts, completions, columns)
        columns_of = zip(self.members, raw.T, strict=True)
        normalizers = [mean_and_std(to_list(column), f"the member {name}") for name, column in columns_of]
        fields: dict[str, Any] = {"normalizers": [dict(one) for one in normalizers]}
        if self._reduce == "fusion" and self.weights is not None and self.normalize:
            rows = zip(self.weights, self.normalizers, normalizers, strict=True)
            weights = [weight * new["std"] / (1.0 if old is None else old["std"]) for weight, old, new in rows]
            self.set_reducer("fusion", weights)
            fields |= {"weights": weights} if self._file.reduce == "fusion" else {}
        self.normalizers = normalizers
        self._update_file(**fields)
        return [dict(one) for one in normalizers]

    def fit_fusion(
        self,
        prompts: Sequence[Prompt] | None,
        chosen: Sequence[Completion],
        rejected: Sequence[Completion],
        method: FusionMethod = "logistic",
        l2: float = 1.0,
        **columns: Any,
    ) -> list[float]:
        """
        Learn weights of the members from preferences, and use them from now on (`reduce="fusion"`).

        Do not use preferences that a member was trained on. If the ensemble was made from its folder,
        `reward_ensemble.json` is updated: it gets the weights, and whether scores are normalised for them and how.

        Args:
            prompts (sequence or `None`): one for each pair, as in a call.
            chosen, rejected (sequences): the completions.
            method (`str`, *optional*, defaults to `"logistic"`):
                `"logistic"` or `"bma"`, see [`~trl_ext.scoring.fusion.fit_fusion_weights`].
            l2 (`float`, *optional*, defaults to `1.0`): strength of the penalty.
            **columns: as in a call, a value for each pair.

        Returns:
            `list[float]`: a weight for each member.
        """
        if len(chosen) != len(rejected):
            raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected completions; needed: pairs.")
        difference = self._table(prompts, chosen, columns) - self._table(prompts, rejected, columns)  # (P, M)
        whole = ~difference.isnan().any(dim=1)
        if not whole.all():
            logger.warning(
                f"{self.__name__}: the fusion ignores {int((~whole).sum())} of {len(chosen)} pairs, because a member "
                "has no score for one of their texts."
            )
        weights = fit_fusion_weights(difference[whole].numpy(), method, l2)
        if sum(weights) < 0:
            logger.warning(
                f"{self.__name__}: the weights {[round(weight, 3) for weight in weights]} reverse the members' order, "
                f"because on these {int(whole.sum())} pairs they prefer the rejected text more often. Check that "
                "chosen and rejected are not swapped, give more pairs, or choose another reducer."
            )
        self.set_reducer("fusion", weights)
        fields = {"reduce": "fusion", "weights": weights, "reduce_kwargs": {}, "normalize": self.normalize}
        self._update_file(**fields | ({"normalizers": list(self.normalizers)} if self.normalize else {}))
        return list(weights)

    def save(self, folder: str | Path) -> None:
        """
        Save the ensemble: a folder `member-<i>` for each member, and `reward_ensemble.json`.

        Adapters are saved as adapters, without their base. `scorer_kwargs` are not stored.

        Raises:
            `ValueError`: a member is a reward function or has its own `aggregation` or `segmenter`, or `reduce` is a
                function without a registered name.
        """
        file = EnsembleFile(
            members=[f"member-{place}" for place in range(len(self._members))],
            reduce=self._reduce,
            reduce_kwargs=dict(self._reduce_kwargs),
            weights=self.weights,
            normalize=self.normalize,
            normalizers=list(self.normalizers),
            branch_layer=self._file.branch_layer,
        )
        for name, (source, number), normalizer in zip(file.members, self._members, self.normalizers, strict=True):
            source.save(number, Path(folder, name))
            sidecar = read_sidecar(Path(folder, name))
            if normalizer is None and sidecar is not None and sidecar.normalizer is not None:  # loading would apply it
                sidecar.normalizer = None
                sidecar.save(Path(folder, name))
        write_ensemble(folder, file)

    @property
    def num_truncated(self) -> int:
        return sum(source.num_truncated for source, _ in self._sources)

    @property
    def models(self) -> list[nn.Module]:
        """The models that the members use; adapters on one base have one together, reward functions have none."""
        return [model for source, _ in self._sources for model in source.models]

    # --------------------------------------------------------------------------------------------------------- private
    def _raw_table(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> torch.Tensor:
        """Raw scores (N, M), fp64, NaN where a member has none."""
        prompts, completions = None if prompts is None else as_list(prompts), as_list(completions)
        columns = {name: by_place(values) for name, values in columns.items()}
        table = torch.full((len(completions), len(self._members)), torch.nan, dtype=torch.float64)
        for source, places in self._sources:
            for place, scores in zip(places, source.raw_scores(prompts, completions, columns), strict=True):
                check_finite(scores, self.members[place])
                table[:, place] = to_table([scores], len(completions))[0]
        return table

    def _table(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> torch.Tensor:
        """Normalised scores (N, M), fp64, NaN where a member has none."""
        table = self._raw_table(prompts, completions, columns)
        if self.normalize:
            for place, normalizer in enumerate(self.normalizers):
                check_normalizer(normalizer)
                if normalizer is not None:
                    table[:, place] = (table[:, place] - normalizer["mean"]) / normalizer["std"]
            if not self._scales_checked and len(table) >= ROWS_TO_TELL:
                self._scales_checked = True
                check_scales(table, self.members, self.normalizers, self.__name__)
        return table

    def _combine(self, table: torch.Tensor) -> torch.Tensor:
        if self.weights is None and takes_weights(self._reducer):
            raise ValueError(
                f"The reducer {self._reduce!r} has no weights yet. Call `fit_fusion` first, or pass `weights`."
            )
        return combine(table, self._reducer, self.weights, **self._reduce_kwargs)

    def _update_file(self, **fields: Any) -> None:
        if self._readings:
            held = " and ".join(self._readings)
            logger.warning(f"{self.__name__}: the fitted values stay in memory, as they hold for this {held} alone.")
        elif self._folder is None:
            logger.info(f"{self.__name__}: the fitted values are only in memory. Call `save` to keep them.")
        else:
            vars(self._file).update(fields)
            write_ensemble(self._folder, self._file)


def load_scorer(
    path: str | Path, name: str | None = None, base_model: str | Path | None = None, **scorer_kwargs: Any
) -> "RewardScorer | RewardEnsemble":
    """Load the [`RewardEnsemble`] or the single model ([`RewardScorer`]) saved at a path, or on a server."""
    folder = local_files(path)
    if read_ensemble(folder) is not None:
        return RewardEnsemble(
            on_server(path, folder) if is_served(path) else folder,
            name=name,
            base_model=base_model,
            scorer_kwargs=scorer_kwargs,
        )
    return RewardScorer(path, name=name, base_model=base_model, **scorer_kwargs)


def _nested(source: str | Path, moved_to: str | Path | None, scorer_kwargs: dict[str, Any] | None) -> RewardEnsemble:
    """A saved ensemble as a member of another."""
    base = moved_to if has_adapter(source) else None
    return RewardEnsemble(source, name=Path(files_of(source)).name, base_model=base, scorer_kwargs=scorer_kwargs)


def _read(path: str | Path) -> tuple[Path, EnsembleFile]:
    folder = Path(local_files(path))
    file = read_ensemble(folder)
    if file is None:
        raise EnsembleFileError(
            f"{path} has no reward_ensemble.json. Needed: the folder of a saved ensemble, or a list of members, e.g. "
            f"[{str(path)!r}]."
        )
    return folder, file


def _unique(names: list[str]) -> list[str]:
    """Append the place to each name that occurs more than once."""
    return [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names)]
