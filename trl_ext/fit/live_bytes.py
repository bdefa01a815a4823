"""Counts the bytes of live tensors while code runs, and their peak, on any device and for fake tensors too.

It knows tensors and their storages. It does not see memory that a kernel allocates internally, or that an allocator
adds by rounding up.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """
    Counts the storages that operations create while it is active. Each counts once, until it is freed.

    Args:
        known (`Iterable[torch.Tensor]`): existing tensors that do not count, such as weights and inputs.

    Attributes:
        live (`int`): bytes that are alive now.
        peak (`int`): the largest value of `live` so far.

    Example:

    ```python
    >>> with LiveBytes() as count:
    ...     a = torch.ones(1024)
    ...     b = (a + 1).sum()
    >>> count.peak, count.live
    (8192, 4100)
    ```
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return output

    def _note(self, tensor: torch.Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: Any, key: int = key, size: int = size) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
