"""Loads the members of an ensemble and runs them. Adapters on one base are loaded together.

This module knows paths, models, scorers and reward functions. It knows nothing of normalising or reducing.
"""

import inspect
import logging
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.models.bases import BaseMismatchError, check_probes
from trl_ext.models.ensemble.ensemble_files import member_folders, read_ensemble
from trl_ext.models.ensemble.shared_base import base_key, changes_of, check_leaves_base, load_adapters, use_adapter
from trl_ext.models.ensemble.stacked_model import StackedRewardModel
from trl_ext.models.fingerprint import MODEL_FILES, TOKENIZER_FILES
from trl_ext.models.inputs import load_tokenizer, text_tokenizer
from trl_ext.models.loading import local_folder, save_sidecar
from trl_ext.models.sidecar import get_sidecar, read_sidecar
from trl_ext.scoring.batches import RUNNING
from trl_ext.scoring.raw_scorer import RawScorer
from trl_ext.scoring.remote import RemoteModel, files_of, is_served, local_files
from trl_ext.scoring.rows import row_error
from trl_ext.scoring.scales import changing_options, changing_readings
from trl_ext.scoring.scorer import RewardScorer


logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None]]
# Arguments that every reward function gets; columns of these names are not passed on.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
Member = str | Path | PreTrainedModel | PeftModel | RewardScorer | RewardFunction
Scores = list[float | None]
Base = nn.Module | str | Path
"""The base of adapters: a model in memory, or the path or Hub id where the base is now."""


class Source(ABC):
    """
    One member, or several members that score together.

    Attributes:
        names (`list[str]`): names of its members.
        normalizers (`list[dict | None]`): the normaliser that each member has stored.
        num_truncated (`int`): rows cut to `max_length` so far, summed over its members.
        models (`list[nn.Module]`): the models that it runs.
    """

    models: list[nn.Module]
    names: list[str]
    normalizers: list[dict[str, float] | None]
    num_truncated: int

    @abstractmethod
    def raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Scores]:
        """The scores of all rows by each member, not normalised."""

    @abstractmethod
    def save(self, number: int, folder: Path) -> None:
        """Save one member as an ordinary reward model folder. Raises `ValueError` if it is no reward model."""


class FunctionSource(Source):
    """A TRL reward function."""

    num_truncated = 0

    def __init__(self, function: RewardFunction):
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise TypeError(
                f"The reward function {function_name(function)} is asynchronous, and an ensemble calls its members "
                "one after the other. Pass a function that waits for the result and returns it."
            )
        self._function = function
        self.models = []
        self.names, self.normalizers = [function_name(function)], [None]

    def raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Scores]:
        found = list(self._function(prompts=prompts, completions=completions, **columns))
        if len(found) != len(completions):
            raise ValueError(
                f"The reward function {self.names[0]} returned {len(found)} rewards for {len(completions)} "
                "completions; needed: one reward for each, None where it does not apply."
            )
        return [[None if value is None else float(value) for value in found]]

    def save(self, number: int, folder: Path) -> None:
        raise ValueError(
            f"The member {self.names[0]} is a reward function, which cannot be saved. Save an ensemble of the reward "
            "models only, and add the function in code: RewardEnsemble([folder, function])."
        )


class ScorerSource(Source):
    """One reward model that shares nothing with other members."""

    def __init__(self, scorer: RewardScorer):
        _refuse_scales(vars(scorer), scorer.__name__)
        self._scorer = scorer
        self.models = [] if isinstance(scorer.model, RemoteModel) else [scorer.model]
        self.names, self.normalizers = [scorer.__name__], [scorer.normalizer]

    @property
    def num_truncated(self) -> int:
        return self._scorer.num_truncated

    def raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Scores]:
        return [self._scorer.raw.scores(prompts, completions, columns)]

    def save(self, number: int, folder: Path) -> None:
        _refuse_readings(self._scorer.choices, self.names[0])
        if self._scorer.folder is not None:
            copy_model(self._scorer.folder, folder)
            return
        model = self._scorer.model
        if isinstance(model, RemoteModel):
            raise ValueError(
                f"The member {self.names[0]} is on a server, and its weights are not here. Download it, and make the "
                "ensemble of its folder."
            )
        model.save_pretrained(folder)
        self._scorer.processing_class.save_pretrained(folder)
        sidecar = get_sidecar(model)
        if sidecar is not None:
            save_sidecar(model, sidecar, folder)


class StackedSource(Source):
    """
    Adapters of one LoRA configuration on one base. All members score in one pass, and the layers below the first
    adapter run only once.

    Args:
        folders (`list[Path]`): the adapters.
        base_model (`str` or `Path`, *optional*): where the base is now, if it moved.
        scorer_kwargs (`dict`): arguments of the scorer.

    Raises:
        `ValueError`: the adapters cannot be stacked.
    """

    def __init__(self, folders: list[Path], base_model: str | Path | None, scorer_kwargs: dict[str, Any]):
        kwargs = dict(scorer_kwargs)
        sidecars = [read_sidecar(folder) for folder in folders]
        scalar = all(one.kind == "scalar" or (one.kind == "outcome" and one.num_labels == 1) for one in sidecars)
        if not scalar or kwargs.get("aggregation") is not None:
            raise ValueError("Only members whose score is the output at the last token can be stacked.")
        settings = [one.token_policy for one in sidecars]
        if any(one != settings[0] for one in settings) or len(set(map(_tokenizer_files, folders))) > 1:
            raise ValueError("The members turn a text into different token ids.")
        device = torch.device(kwargs.pop("device", None) or PartialState().device)
        model = StackedRewardModel.from_folders(folders, base_model=base_model, device_map={"": device})
        for number, (folder, sidecar) in enumerate(zip(folders, sidecars, strict=True)):
            model.use_rows(alone=number)
            try:
                check_probes(model, sidecar, folder, allow_base_mismatch=False)
            finally:
                model.use_rows()
        tokenizer = text_tokenizer(kwargs.pop("processing_class", None) or load_tokenizer(str(folders[0])))
        self._raw = RawScorer(model, tokenizer, **kwargs)
        self._folders, self.models = folders, [model]
        self.names = [folder.name for folder in folders]
        self.normalizers = [sidecar.normalizer for sidecar in sidecars]

    @property
    def num_truncated(self) -> int:
        return len(self._folders) * self._raw.num_truncated

    def raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Scores]:
        nothing = [None] * len(self._folders)
        rows = [nothing if scores is None else scores for scores in self._raw.scores(prompts, completions, columns)]
        return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in self._folders]

    def save(self, number: int, folder: Path) -> None:
        copy_model(self._folders[number], folder)


class SharedBaseSource(Source):
    """
    Adapters on one base, which is in memory once. The adapters score one after the other.

    Args:
        folders (`list[Path]`): the adapters.
        base_model (`nn.Module`, `str` or `Path`, *optional*): a model in memory whose backbone is the base, or where
            the base is now, if it moved.
        scorer_kwargs (`dict`): arguments of the scorers.
    """

    def __init__(self, folders: list[Path], base_model: Base | None, scorer_kwargs: dict[str, Any]):
        kwargs = dict(scorer_kwargs)
        device = torch.device(kwargs.pop("device", None) or PartialState().device)
        given = kwargs.pop("processing_class", None)
        in_memory = isinstance(base_model, nn.Module)
        load_kwargs = {} if in_memory else {"device_map": {"": device}}
        self._model, self._adapters = load_adapters(folders, base_model, **load_kwargs)
        self.models = [self._model]
        self._folders, self._sidecars = folders, [read_sidecar(folder) for folder in folders]
        self._raw: list[RawScorer] = []
        for number, folder in enumerate(folders):
            with self._member(number):
                tokenizer = text_tokenizer(given or load_tokenizer(str(folder)))
                self._raw.append(RawScorer(self._model, tokenizer, **(kwargs | {"name": folder.name})))
        self.names = [folder.name for folder in folders]
        self._options = scorer_kwargs
        own = bool(changing_readings(scorer_kwargs))  # then the stored normalisers are of other scores
        self.normalizers = [None if own else sidecar.normalizer for sidecar in self._sidecars]

    @property
    def num_truncated(self) -> int:
        return sum(raw.num_truncated for raw in self._raw)

    def raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Scores]:
        scores = []
        for number, raw in enumerate(self._raw):
            with RUNNING, self._member(number):
                scores.append(raw.scores(prompts, completions, columns))
        return scores

    def save(self, number: int, folder: Path) -> None:
        _refuse_readings(self._options, self.names[number])
        copy_model(self._folders[number], folder)

    def _member(self, number: int) -> AbstractContextManager:
        return use_adapter(self._model, self._adapters[number], self._sidecars[number])


def make_sources(
    members: Sequence[Member], base_model: Base | None, scorer_kwargs: dict[str, Any]
) -> list[tuple[Source, list[int]]]:
    """
    Make the sources of an ensemble; each comes with the places of its members in `members`.

    Adapters that were trained on one base share it, except adapters whose loading changes the base weights.

    Args:
        members (`Sequence`): see [`~trl_ext.RewardEnsemble`].
        base_model (`nn.Module`, `str` or `Path`, *optional*): see [`~trl_ext.RewardEnsemble`].
        scorer_kwargs (`dict`): arguments of the scorers.

    Raises:
        `TypeError`: an entry cannot be a member.
        `ValueError`: `base_model` is given and no member is an adapter, a member would change a model in memory, or a
            scorer is `calibrated`, or has a `reference` or a `std_coefficient`.
    """
    _refuse_scales(scorer_kwargs, "scorer_kwargs")
    sources: list[tuple[Source, list[int]]] = []
    shared: dict[str, list[tuple[int, Path]]] = {}
    in_memory = isinstance(base_model, nn.Module)
    where = None if in_memory else base_model
    for place, member in enumerate(members):
        if is_served(member):
            scorer = RewardScorer(member, **({"name": Path(files_of(member)).name} | scorer_kwargs))
            sources.append((ScorerSource(scorer), [place]))
        elif isinstance(member, (str, Path)):
            folder = Path(local_folder(member, None))
            key = base_key(folder)
            if key is not None and in_memory:
                check_leaves_base(folder)
            if key is None or (not in_memory and changes_of(folder)):
                own = where if (folder / "adapter_config.json").is_file() else None  # a full model has no base
                scorer = RewardScorer(folder, **(scorer_kwargs | {"name": folder.name, "base_model": own}))
                sources.append((ScorerSource(scorer), [place]))
            else:
                shared.setdefault(key, []).append((place, folder))
        elif isinstance(member, (PreTrainedModel, PeftModel)):
            scorer = RewardScorer(member, **({"name": f"member-{place}"} | scorer_kwargs))
            sources.append((ScorerSource(scorer), [place]))
        elif isinstance(member, RewardScorer):
            sources.append((ScorerSource(member), [place]))
        elif callable(member) and not isinstance(member, (nn.Module, type)):
            sources.append((FunctionSource(member), [place]))
        else:
            raise TypeError(
                f"Member {place} is a {type(member).__name__}; needed: a reward model's path, a `PreTrainedModel` or "
                "`PeftModel`, a `RewardScorer`, or a function (prompts, completions, **columns) -> list of rewards."
            )
    if in_memory and not shared:
        raise ValueError("`base_model` was given, but no member is an adapter with a reward_model.json to put on it.")
    for group in shared.values():
        places, folders = [place for place, _ in group], [folder for _, folder in group]
        if len(folders) == 1 and not in_memory:
            scorer = RewardScorer(folders[0], **(scorer_kwargs | {"name": folders[0].name, "base_model": where}))
            sources.append((ScorerSource(scorer), places))
        else:
            sources.append((_shared_source(folders, base_model, scorer_kwargs), places))
    return sources


def is_ensemble(member: Member) -> bool:
    """Whether a member is the folder or Hub id of a saved ensemble."""
    return isinstance(member, (str, Path)) and read_ensemble(local_files(member)) is not None


def has_adapter(member: Member) -> bool:
    """Whether a member is an adapter that is loaded here, or an ensemble with one."""
    if not isinstance(member, (str, Path)) or is_served(member):
        return False
    folder = Path(local_files(member))
    file = read_ensemble(folder)
    if file is not None:
        return any(map(has_adapter, member_folders(folder, file)))
    return (folder / "adapter_config.json").is_file()


def _refuse_scales(options: dict[str, Any], name: str) -> None:
    """Raise `ValueError` for options of a scorer that change its scores after the model gave them."""
    found = changing_options(options)
    if found:
        raise ValueError(
            f"{name} has {', '.join(found)}, but an ensemble combines the raw scores of its members, on its own "
            "scale. Leave it out, or pass the scorer's call as a function: RewardEnsemble([scorer.__call__, ...])."
        )


def _refuse_readings(options: dict[str, Any], name: str) -> None:
    """Raise `ValueError` for a member that would have other scores when the ensemble is loaded again."""
    found = changing_readings(options)
    if found:
        raise ValueError(
            f"The member {name} has its own {' and '.join(found)}, which an ensemble's folder does not store: its "
            "scores would change when the ensemble is loaded. Make the ensemble without it, save it, and pass "
            "`scorer_kwargs` when you load it."
        )


def _shared_source(folders: list[Path], base_model: Base | None, scorer_kwargs: dict[str, Any]) -> Source:
    """Adapters on one base, stacked if possible."""
    if not isinstance(base_model, nn.Module):
        try:
            return StackedSource(folders, base_model, scorer_kwargs)
        except BaseMismatchError:
            raise
        except ValueError as error:
            logger.info(f"The members score one after the other, not in one pass. {error}")
    return SharedBaseSource(folders, base_model, scorer_kwargs)


def _tokenizer_files(folder: Path) -> tuple[tuple[Path, bytes], ...]:
    """The files that, with the tokenization settings, determine the token ids of a text: their names and contents."""
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    return tuple((file.relative_to(folder), file.read_bytes()) for file in sorted(files))


def function_name(function: Callable) -> str:
    """The name of a reward function, found as TRL does; a partial function has the name of the function in it."""
    if isinstance(function, partial):
        return function_name(function.func)
    if inspect.isroutine(function):
        return function.__name__
    # a callable object has a `__name__` only if its author set one
    return getattr(function, "__name__", type(function).__name__)


def check_finite(scores: Scores, name: str) -> None:
    """Raise [`DataError`] for a score that is not finite, naming the member and the row."""
    for row, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise row_error(
                row,
                f"the score {score} by the member {name}",
                "a finite score, or None where a member does not apply",
                "Correct the member, or choose another aggregation (`sum_log` of a probability of 0 is infinite).",
            )


def copy_model(origin: Path, folder: Path) -> None:
    """Copy the files of a saved reward model, unless the target folder is its own."""
    for pattern in ("*.json", "*.txt", *MODEL_FILES):
        for file in origin.glob(pattern):
            target = folder / file.relative_to(origin)
            if file.name != "trainer_state.json" and file.resolve() != target.resolve():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
