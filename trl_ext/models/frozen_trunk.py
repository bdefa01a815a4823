"""Keeps the hidden states of layers that are not trained, so that each text runs through them once.

With adapters only in the upper layers, the layers below (the *trunk*) give the same states in every epoch, for every
seed and for every ensemble member. The states are kept by the token ids of a text. A batch whose texts are all known
skips the trunk.

It knows layers, token ids and flat rows. It knows nothing of adapters, heads or losses.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trl_ext.data.prefix_layout import PrefixLayout


logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Consecutive tokens of a batch: a text or, in a flat row, a prompt or a completion behind its prompt."""

    key: bytes
    row: int
    start: int
    end: int


class FrozenTrunk:
    """
    Runs the first layers of a model without a gradient, and skips them for batches that it knows.

    It does so between [`FrozenTrunk.install`] and [`FrozenTrunk.remove`], which may be nested.

    Args:
        backbone (`nn.Module`): the model without its head. It takes `input_ids` and, if rows are padded,
            `attention_mask`.
        layers (`nn.ModuleList`): its layers.
        first (`int`): the first layer that is trained, at least 1.
        store ([`MemoryStates`] or [`StoredStates`]): where the states are kept.

    Attributes:
        passes, skipped (`int`): batches that ran through the model, and those of them that skipped the trunk.
    """

    def __init__(self, backbone: nn.Module, layers: nn.ModuleList, first: int, store: "MemoryStates | StoredStates"):
        self.passes = self.skipped = 0
        self._backbone, self._layers, self._first, self.store = backbone, layers, first, store
        self._pieces: list[Piece] = []
        self._known: torch.Tensor | None = None
        self._undo: list[Callable[[], Any]] = []
        self._installed = 0
        self._sample = self._sample_of_weights()

    def install(self) -> None:
        """
        Let the layers of the trunk keep and use states, until [`FrozenTrunk.remove`].

        Raises:
            ValueError: a weight of the trunk is trained or has changed, so states that are kept are not its own.
        """
        if self._installed == 0:
            trained = next((name for name, weight in self._weights() if weight.requires_grad), None)
            if trained is not None:
                raise ValueError(
                    f"trunk_cache: {trained} is to be trained now, and the layers up to {self._first - 1} were frozen "
                    "when their states were kept. Make a new trainer."
                )
            if self._sample_of_weights() != self._sample:
                raise ValueError(
                    f"trunk_cache: the weights of the layers up to {self._first - 1} have changed since their states "
                    "were kept. Make a new trainer."
                )
        self._installed += 1
        if self._installed > 1:
            return
        self._undo.append(self._backbone.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for number, layer in enumerate(self._layers[: self._first]):
            self._undo.append(partial(setattr, layer, "forward", layer.forward))
            layer.forward = partial(self._run, number, layer.forward)

    def remove(self) -> None:
        """Give the layers their own forward passes back, at the last of nested calls."""
        self._installed = max(0, self._installed - 1)
        if self._installed:
            return
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the states depend on."""
        yield from self._backbone.get_input_embeddings().named_parameters(prefix="embeddings")
        yield from self._layers[: self._first].named_parameters(prefix="layers")

    @torch.no_grad()
    def _sample_of_weights(self) -> list[bytes]:
        """A few numbers of each weight. A step of training or a scaling changes them."""
        found = []
        for _, weight in self._weights():
            flat = weight.detach().as_subclass(torch.Tensor).reshape(-1)  # a 4-bit weight keeps to its blocks
            some = flat[:: max(1, len(flat) // 16)].contiguous().cpu()
            found.append(some.view(torch.uint8).numpy().tobytes())
        return found

    def _begin(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for layer in self._layers[: self._first]:
            if getattr(layer, "gradient_checkpointing", False):  # there is nothing to recompute
                self._undo.append(partial(setattr, layer, "gradient_checkpointing", True))
                layer.gradient_checkpointing = False
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._pieces = list(_pieces(ids, kwargs.get("attention_mask"), kwargs.get("prefix_layout")))
        self._known = self._collect(ids)
        self.passes += 1
        self.skipped += self._known is not None

    def _collect(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The states of all tokens of the batch (padding gets 0), or `None` if a piece is not known."""
        found = []
        for piece in self._pieces:
            states = self.store.get(piece.key)
            if states is None:
                return None
            found.append(states)
        states = torch.zeros(*ids.shape, found[0].shape[-1], dtype=found[0].dtype)
        for piece, own in zip(self._pieces, found, strict=True):
            states[piece.row, piece.start : piece.end] = own
        return states.to(ids.device)

    def _run(self, number: int, forward: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a layer of the trunk does in place of its own forward pass."""
        last = number == self._first - 1
        if self._known is not None:
            states = self._known
        else:
            with torch.no_grad():
                states = forward(*args, **kwargs)
            if last:
                for piece in self._pieces:
                    self.store.put(piece.key, states[piece.row, piece.start : piece.end])
        if last and torch.is_grad_enabled() and getattr(self._layers[self._first], "gradient_checkpointing", False):
            states = states.detach().requires_grad_()  # reentrant checkpointing needs an input with a gradient
        return states


def _pieces(ids: torch.Tensor, attention_mask: torch.Tensor | None, layout: PrefixLayout | None) -> Iterator[Piece]:
    """The pieces of a batch. A state depends on the tokens up to it, so the key of a completion covers its prompt."""
    autocast = str(torch.get_autocast_dtype(ids.device.type)) if torch.is_autocast_enabled(ids.device.type) else ""
    rows = ids.cpu().numpy().astype(np.int64)
    if layout is not None:
        row, known = rows[0], set()
        for own in layout.completions:
            prompt = row[own.prefix_start : own.prefix_start + own.prefix_length]
            if own.prefix_length and own.prefix_start not in known:
                known.add(own.prefix_start)
                yield Piece(_key(prompt, 0, autocast), 0, own.prefix_start, own.prefix_start + own.prefix_length)
            text = np.concatenate([prompt, row[own.start : own.end]])
            yield Piece(_key(text, own.prefix_length, autocast), 0, own.start, own.end)
        return
    real = np.ones(rows.shape, dtype=bool) if attention_mask is None else attention_mask.bool().cpu().numpy()
    for number, (row, where) in enumerate(zip(rows, real, strict=True)):
        start, end = int(where.argmax()), len(where) - int(where[::-1].argmax())
        # padding on the left shifts the positions, so the first place is part of the key
        yield Piece(_key(row[start:end], 0, f"{autocast}{start or ''}"), number, start, end)


def _key(ids: np.ndarray, first: int, more: str) -> bytes:
    """The key of the states from number `first` on of a text."""
    digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
    digest.update(f"{first} {more}".encode())
    return digest.digest()


class MemoryStates:
    """States in main memory, by key."""

    def __init__(self):
        self._states: dict[bytes, torch.Tensor] = {}

    def get(self, key: bytes) -> torch.Tensor | None:
        """The states of a piece, `(T, H)`, or `None`."""
        return self._states.get(key)

    def put(self, key: bytes, states: torch.Tensor) -> None:
        """Keep the states of a piece, in their own precision."""
        if key not in self._states:
            self._states[key] = states.detach().cpu().clone()

    def is_like(self, other: "MemoryStates") -> bool:
        """Whether both hold the same texts with the same states, up to rounding."""
        return self._states.keys() == other._states.keys() and all(
            torch.allclose(own.float(), other._states[key].float(), atol=1e-5, rtol=1e-3)
            for key, own in self._states.items()
        )

    @property
    def size(self) -> int:
        """Bytes of the states."""
        return sum(states.nbytes for states in self._states.values())


class StoredStates:
    """
    States in a folder: each process appends to a file of its own and reads those that were there when it began.

    A line of the index is written behind the states that it points to, and holds their checksum. Entries that an
    interrupted run left unfinished, or that are damaged, are not used. If the disk is full, no more states are kept.

    Args:
        folder (`str` or `Path`): the folder; everything in it must come from the same trunk.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[Path, int, list[int], str, int]] = {}
        self._full = False
        self._maps: dict[Path, np.memmap] = {}
        for index in sorted(self.folder.glob("*.jsonl")):
            self._read(index)
        number = 0
        while True:  # no other process has a file that this one creates
            try:
                self._states = open(self.folder / f"{number}.states", "xb")  # noqa: SIM115 (open as long as the store)
                break
            except FileExistsError:
                number += 1
        self._index = open(self.folder / f"{number}.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def _read(self, index: Path) -> None:
        states = index.with_suffix(".states")
        length = states.stat().st_size if states.is_file() else 0
        damaged = 0
        for line in index.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the process was stopped while it wrote this line
            try:
                key, start, shape, dtype, checksum = json.loads(line)
                end = start + shape[0] * shape[1] * getattr(torch, dtype).itemsize
                name = bytes.fromhex(key)
            except (ValueError, TypeError, AttributeError, IndexError):
                damaged += 1
                continue
            if end <= length:
                self._places[name] = (states, start, shape, dtype, checksum)
        if damaged:
            logger.warning(f"{index} has {damaged} damaged lines. The states that they name are computed again.")

    def get(self, key: bytes) -> torch.Tensor | None:
        """The states of a piece, `(T, H)`, or `None`."""
        if key not in self._places:
            return None
        path, start, shape, dtype, checksum = self._places[key]
        end = start + shape[0] * shape[1] * getattr(torch, dtype).itemsize
        if path not in self._maps or len(self._maps[path]) < end:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        content = bytearray(self._maps[path][start:end])
        if zlib.crc32(content) != checksum:
            logger.warning(f"{path} is damaged at byte {start}. The states are computed again.")
            del self._places[key]
            return None
        return torch.frombuffer(content, dtype=getattr(torch, dtype)).view(*shape)

    def put(self, key: bytes, states: torch.Tensor) -> None:
        """Keep the states of a piece, in their own precision."""
        if key in self._places or self._full:
            return
        states = states.detach().cpu().contiguous()
        content = states.view(torch.uint8).numpy().tobytes()
        start, name, checksum = self._states.tell(), str(states.dtype).removeprefix("torch."), zlib.crc32(content)
        try:
            self._states.write(content)
            self._states.flush()
            self._index.write(json.dumps([key.hex(), start, list(states.shape), name, checksum]) + "\n")
            self._index.flush()
        except OSError as error:
            self._full = True
            logger.warning(f"No more states are kept in {self.folder}: {error}. Training goes on without them.")
            return
        self._places[key] = (Path(self._states.name), start, list(states.shape), name, checksum)

    @property
    def size(self) -> int:
        """Bytes of the states."""
        return sum(os.path.getsize(path) for path in self.folder.glob("*.states"))
