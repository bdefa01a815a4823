"""Scored samples as arrays of a few bytes per sample, and selections as row numbers.

This module knows prompts, samples and scores by number. It does not know texts, models or files.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Scored:
    """
    N scored samples as arrays, in any order.

    Args:
        prompt (`np.ndarray` of `int64`, shape `(N,)`):
            The prompt's place in the data set.
        sample (`np.ndarray` of `int64`, shape `(N,)`):
            Index of the sample among those of the prompt.
        score (`np.ndarray` of `float64`, shape `(N,)`):
            Higher is better; NaN if no function could score it.
        text_hash (`np.ndarray` of `uint64`, shape `(N,)`):
            [`text_hash`] of the completion. Equal hashes within a prompt mean the same text.
        length (`np.ndarray` of `int64`, shape `(N,)`):
            Length of the completion in tokens.
        finished (`np.ndarray` of `bool`, shape `(N,)`):
            Whether the completion ended before the length limit.
    """

    prompt: np.ndarray
    sample: np.ndarray
    score: np.ndarray
    text_hash: np.ndarray
    length: np.ndarray
    finished: np.ndarray

    def __post_init__(self):
        types = {"prompt": np.int64, "sample": np.int64, "score": np.float64}
        types |= {"text_hash": np.uint64, "length": np.int64, "finished": np.bool_}
        for name, dtype in types.items():
            setattr(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {name: getattr(self, name).shape for name in types}
        if any(shape != (len(self.prompt),) for shape in shapes.values()):
            raise ValueError(f"The columns of scored samples must have one shape (N,), found {shapes}.")

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: np.ndarray) -> "Scored":
        """The samples in these rows, in this order."""
        return Scored(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(slots=True)
class Selection:
    """
    A selection, as row numbers of the [`Scored`] that it was made from.

    Args:
        rows (`np.ndarray` of `int64`):
            The selected samples. For pairs the chosen ones; for groups the members of each group, best first, one
            group after the other.
        rejected (`np.ndarray` of `int64`, *optional*):
            For pairs: the rejected samples, as many as `rows`.
        margin (`np.ndarray` of `float64`, *optional*):
            For pairs: score of the chosen minus score of the rejected sample, above 0.
        starts (`np.ndarray` of `int64`, *optional*):
            For groups: the index in `rows` where each group starts.
        counts (`dict[str, int]`):
            How many samples were used or left out; see [`~trl_ext.pipelines.rejection_sampling.selection.select`].
    """

    rows: np.ndarray
    rejected: np.ndarray | None = None
    margin: np.ndarray | None = None
    starts: np.ndarray | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`"rows"`, `"pairs"` or `"groups"`."""
        return "pairs" if self.rejected is not None else "groups" if self.starts is not None else "rows"

    @property
    def groups(self) -> list[np.ndarray]:
        """The rows of each group, best first."""
        if self.starts is None:
            raise ValueError(f"This selection holds {self.kind}, not groups. Select with 'ranked_groups'.")
        return np.split(self.rows, self.starts[1:])


def text_hash(text: str) -> int:
    """A hash of a text in 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def group_numbers(prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group number of each row and the size of each group, for rows that are sorted by prompt."""
    new = np.ones(len(prompt), dtype=bool)
    new[1:] = np.diff(prompt) != 0
    group = np.cumsum(new) - 1
    return group, np.bincount(group) if len(group) else np.zeros(0, dtype=np.int64)
