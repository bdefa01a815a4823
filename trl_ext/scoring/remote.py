"""`RemoteModel`: a reward model on a server in the place of one in memory, and the strings that name it.

A string names it as `URL#FOLDER` or `URL?model=NAME#FOLDER`. The folder (or Hub id) says what the model is: tokenizer,
tokenization settings, normaliser and probes. Its weights are not read. `trl_ext.serving` asks the servers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from trl_ext.data.tokenization import Prompt
from trl_ext.models.inputs import InputLimits
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import Sidecar, read_sidecar
from trl_ext.serving.pooling import ROWS, ServedModel


# What is downloaded of a model on the Hub: everything but weights and code.
FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt")


class Address(NamedTuple):
    """
    Where a reward model is served, and what it is.

    Args:
        urls (`str`): the servers, with commas between.
        folder (`str`): folder or Hub id of the model.
        model (`str` or `None`): its name on the servers.
    """

    urls: str
    folder: str
    model: str | None


def is_served(source: Any) -> bool:
    """Whether a value names a model on a server, as opposed to a folder or Hub id."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_address(text: str, folder: str | Path | None = None, model: str | None = None) -> Address:
    """
    The parts of a string that names a served model.

    Args:
        text (`str`): `URL`, `URL#FOLDER` or `URL?model=NAME#FOLDER`.
        folder (`str` or `Path`, *optional*): the folder, if it is not in the text.
        model (`str`, *optional*): the model's name on the server, likewise.

    Raises:
        ValueError: no folder.

    Example:

    ```python
    >>> read_address("http://host:8000?model=helpful#outputs/helpful")
    Address(urls='http://host:8000', folder='outputs/helpful', model='helpful')
    ```
    """
    place, _, named = text.partition("#")
    urls, _, query = place.partition("?")
    folder = str(folder or named)
    if not folder:
        raise ValueError(
            f"{text} does not say which reward model is there. Give its folder too, which holds its tokenizer and "
            "settings: RewardScorer(url, folder), or url#folder."
        )
    return Address(urls, folder, model or parse_qs(query).get("model", [None])[0])


def files_of(source: str | Path) -> str:
    """The folder or Hub id with the files of a reward model; of one on a server that which its string names."""
    return read_address(source).folder if is_served(source) else str(source)


def local_files(source: str | Path) -> str:
    """The local folder of these files, downloaded if need be; of a model on a server without the weights."""
    return local_folder(files_of(source), None, FILES) if is_served(source) else local_folder(source, None)


def on_server(source: str, folder: str | Path) -> str:
    """
    The string that names another model on the servers of one, by its folder.

    ```python
    >>> on_server("http://host:8000#ensemble", "ensemble/member-0")
    'http://host:8000#ensemble/member-0'
    ```
    """
    return f"{read_address(source).urls}#{folder}"


class RemoteModel:
    """
    A reward model on servers, in the place of a model in memory and of its `BatchRunner`.

    Args:
        address ([`Address`]): where it is.
        rows (`int`, *optional*): rows of a request.

    Attributes:
        folder (`str`): local folder of the files that say what it is.
        sidecar ([`Sidecar`] or `None`): what it is.

    Raises:
        `FileNotFoundError`: there is no such folder.
        [`ServerError`]: no server answers, the model is not there, or it gives other scores than when it was saved.
    """

    def __init__(self, address: Address, rows: int | None = None):
        self.folder = local_folder(address.folder, None, FILES)
        self.sidecar: Sidecar | None = read_sidecar(self.folder)
        self.num_labels = 1 if self.sidecar is None else self.sidecar.num_labels
        self._served = ServedModel(address.urls, address.folder, address.model, self.sidecar, rows or ROWS)

    def limits(self, tokenizer: PreTrainedTokenizerBase) -> InputLimits:
        """The token ids that the model knows, and the longest row that the servers take."""
        known = None if self.sidecar is None else self.sidecar.base.vocab_size
        if known is None and Path(self.folder, "config.json").is_file():
            known = AutoConfig.from_pretrained(self.folder).get_text_config().vocab_size
        return InputLimits(known or len(tokenizer), self._served.max_tokens)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Nothing to prepare; several threads may ask at once."""
        yield

    def scores(self, prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[float | None]:
        """The scalar score of each list of token ids; `None` for an empty list. `prompts` are not used."""
        return _where_tokens(ids, lambda rows: [outputs[0] for outputs in self._served.outputs(rows)])

    def token_outputs(self, prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[torch.Tensor | None]:
        """The head's output for each token, (T, outputs) in fp32; `None` for an empty list."""
        return _where_tokens(ids, lambda rows: list(map(torch.tensor, self._served.token_outputs(rows))))


def _where_tokens(ids: Sequence[list[int]], ask: Callable[[list[list[int]]], list[Any]]) -> list[Any]:
    """What is asked for the rows with tokens, at their places; `None` for the others."""
    found = iter(ask([row for row in ids if row]))
    return [next(found) if row else None for row in ids]
