"""`i/n`: the part of a run that one machine makes, and a merge that takes the parts from several folders.

Machines that share a folder need no merge: each makes its own shards of the same store. This module knows shards and
their stores. It does not know what a shard holds.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trl_ext.pipelines.stages.store import ShardStore, StoreError


logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """
    Part `number` of `count`; the whole run is part 1 of 1.

    Args:
        number (`int`): from 1 to `count`.
        count (`int`): number of parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: "str | Part | None") -> "Part":
        """
        Read a part from its text; `None` is the whole run.

        Raises:
            ValueError: the text is not `i/n` with `1 <= i <= n`.

        Example:

        ```python
        >>> Part.parse("2/4")
        Part(number=2, count=4)
        ```
        """
        if text is None or isinstance(text, Part):
            return text or cls()
        first, slash, last = str(text).partition("/")
        if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"shard={text!r}; needed: i/n with i from 1 to n, e.g. 1/4, 2/4, 3/4 and 4/4.")
        return cls(int(first), int(last))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, total: int) -> range:
        """Its shards among `total`: every `count`-th one, so that all parts meet rows from all of the data."""
        return range(self.number - 1, total, self.count)

    def rows(self, total: int) -> range:
        """Its rows among `total`: those of one block, so that the parts in their order are the whole."""
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)


def take_shards(store: ShardStore, roots: Sequence[Path], what: str) -> None:
    """
    Copy the finished shards of a store from other folders, and check that the store is complete then.

    Shards that are here already stay, so a merge that failed can be run again, with more folders or with the same.

    Args:
        store ([`~trl_ext.pipelines.stages.store.ShardStore`]): where the shards go.
        roots (sequence of `Path`): the folders that stand in the place of `store.root` elsewhere.
        what (`str`): what the shards hold, for messages: `"completions"`.

    Raises:
        [`~trl_ext.pipelines.stages.store.StoreError`]: a folder has shards of other settings or none, two folders have
            different shards of one number, or a shard is in no folder.
    """
    others = [ShardStore(root, store.manifest, store.sizes) for root in roots]
    for other in others:
        if not other.folder.is_dir():
            near = other.nearest()
            found = f"holds no {what}" if near is None else f"holds {what} made with other settings ({near[1]})"
            raise StoreError(f"{other.root} {found}. Make every part with the arguments of the merge.")
    store.create()
    taken: dict[int, ShardStore] = {}
    for other in others:
        for shard in range(len(store.sizes)):
            if not other.path(shard).is_file():
                continue
            if not store.is_complete(shard):
                store.copy(shard, other)
                taken[shard] = other
            elif other.path(shard).read_bytes() != store.path(shard).read_bytes():
                first = taken.get(shard, store)
                raise StoreError(
                    f"Shard {shard} of the {what} is there twice, with different content: {first.path(shard)} and "
                    f"{other.path(shard)}. Give only one of the folders, or delete one of the files and "
                    f"{store.path(shard)}."
                )
    missing = store.missing()
    logger.info(f"{store.folder}: {len(taken)} shards of {what} copied, {len(missing)} missing.")
    if missing:
        some = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise StoreError(
            f"The folders lack {len(missing)} of {len(store.sizes)} shards of {what} (number {some}). Those found are "
            f"kept in {store.folder}. Finish the parts with `--shard` and merge again, or run the same command "
            "without the merge, which makes the missing ones here."
        )
