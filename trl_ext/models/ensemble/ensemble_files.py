"""`reward_ensemble.json`: lists the member folders of an ensemble and says how their scores are combined.

An ensemble folder holds this file and a folder for each member, which is an ordinary reward model that loads alone:

```
ensemble/
  reward_ensemble.json
  member-0/            adapter + fp32 head + tokenizer + reward_model.json, as `save_model()` writes them
  member-1/
  ...
```

This module knows the fields of the file. It knows nothing of models, scoring, or what a reducer computes.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from trl_ext.models.sidecar import SidecarError, known_fields


ENSEMBLE_NAME = "reward_ensemble.json"
SCHEMA_VERSION = 1


class EnsembleFileError(SidecarError):
    """`reward_ensemble.json` is unreadable, of a newer schema, or contradicts itself or its folder."""


@dataclass
class EnsembleFile:
    """
    Description of a saved ensemble.

    Args:
        members (`list[str]`): folders of the members, relative to the ensemble's folder, e.g.
            `["member-0", "member-1"]`.
        reduce (`str`): name of a reducer (see `trl_ext.scoring.reducers`).
        reduce_kwargs (`dict`): its arguments.
        weights (`list[float]`, *optional*): one per member, for reducers that take weights.
        normalize (`bool`): whether members are normalised before they are reduced.
        normalizers (`list[dict | None]`, *optional*): `{"mean": float, "std": float}` of each member, or `None` to use
            the one in the member's `reward_model.json`, if it has one. `None` for all is the same as a list of `None`.
        branch_layer (`int`, *optional*): first layer in which members differ. It is informative only; loading does
            not need it.
        schema_version (`int`): version of this file.

    Raises:
        [`EnsembleFileError`]: there is no member, a member is listed twice or lies outside the folder, or a list does
            not have one entry for each member.
    """

    members: list[str]
    reduce: str = "mean"
    reduce_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: list[float] | None = None
    normalize: bool = True
    normalizers: list[dict[str, float] | None] | None = None
    branch_layer: int | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self):
        wanted = "needed: a list of folder names, e.g. ['member-0', 'member-1']"
        if not isinstance(self.members, list) or not self.members:
            raise EnsembleFileError(f"members={self.members!r}; {wanted}.")
        for name in self.members:
            if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
                raise EnsembleFileError(f"The member {name!r} is not inside the ensemble's folder; {wanted}.")
        if len(set(self.members)) != len(self.members):
            raise EnsembleFileError(f"members={self.members!r} names a folder twice; {wanted}.")
        if not isinstance(self.reduce, str):
            raise EnsembleFileError(
                f"reduce={self.reduce!r} cannot be saved; needed: the name of a reducer. Publish your function as a "
                "plugin (entry-point group `trl_ext.reducers`) and pass its name."
            )
        if not isinstance(self.reduce_kwargs, dict):
            raise EnsembleFileError(f"reduce_kwargs={self.reduce_kwargs!r}; needed: the reducer's arguments by name.")
        if self.normalizers is None:
            self.normalizers = [None] * len(self.members)
        self._check_length("weights", self.weights)
        self._check_length("normalizers", self.normalizers)
        for weight in self.weights or []:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise EnsembleFileError(f"weights={self.weights!r}; needed: finite numbers, one per member.")
        for normalizer in self.normalizers:
            check_normalizer(normalizer)

    def _check_length(self, name: str, values: Sequence | None) -> None:
        if values is not None and (not isinstance(values, list) or len(values) != len(self.members)):
            raise EnsembleFileError(
                f"{name}={values!r} with {len(self.members)} members; needed: a list with an entry for each."
            )


def check_normalizer(normalizer: dict[str, float] | None) -> None:
    """Raise [`EnsembleFileError`] unless the normaliser is `None` or a finite mean and positive standard deviation."""
    if normalizer is None:
        return
    valid = isinstance(normalizer, dict) and set(normalizer) == {"mean", "std"}
    valid = valid and all(isinstance(value, (int, float)) and math.isfinite(value) for value in normalizer.values())
    if not valid or normalizer["std"] <= 0:
        raise EnsembleFileError(
            f"Found the normaliser {normalizer!r}; needed: {{'mean': float, 'std': float}}, finite, std above 0."
        )


def write_ensemble(folder: str | Path, ensemble: EnsembleFile) -> None:
    """
    Write `reward_ensemble.json` into a folder that holds the members already.

    Raises [`EnsembleFileError`] if a member's folder is not there.
    """
    _check_members(folder, ensemble)
    text = json.dumps(dataclasses.asdict(ensemble), indent=2, ensure_ascii=False)
    Path(folder, ENSEMBLE_NAME).write_text(text + "\n", encoding="utf-8")


def read_ensemble(folder: str | Path) -> EnsembleFile | None:
    """
    Read `reward_ensemble.json` from a local folder; `None` where there is none.

    Unknown keys (of a newer minor version) are ignored with a warning. Raises [`EnsembleFileError`] if the file is not
    JSON, lacks a field, has a newer schema version, or names a member whose folder is not there.
    """
    path = Path(folder, ENSEMBLE_NAME)
    if not path.is_file():
        return None
    restore = "Restore the file from the same run, or write a new one that lists the members."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EnsembleFileError(f"{path} is not valid JSON ({error}). {restore}") from error
    if not isinstance(content, dict) or "members" not in content:
        raise EnsembleFileError(f"{path} does not describe an ensemble: it has no `members`. {restore}")
    version = content.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise EnsembleFileError(
            f"{path} has schema version {version!r}; this trl_ext reads up to {SCHEMA_VERSION}. Upgrade trl-ext."
        )
    try:
        ensemble = EnsembleFile(**known_fields(EnsembleFile, content, path))
    except EnsembleFileError as error:
        raise EnsembleFileError(f"{path}: {error}") from error
    _check_members(folder, ensemble)
    return ensemble


def member_folders(folder: str | Path, ensemble: EnsembleFile) -> list[Path]:
    """The folders of the members, in order."""
    return [Path(folder, name) for name in ensemble.members]


def _check_members(folder: str | Path, ensemble: EnsembleFile) -> None:
    missing = [str(path) for path in member_folders(folder, ensemble) if not path.is_dir()]
    if missing:
        raise EnsembleFileError(
            f"{folder} lacks the folders of {len(missing)} of {len(ensemble.members)} members: {', '.join(missing)}. "
            "Restore them; an ensemble without them would give other scores."
        )
