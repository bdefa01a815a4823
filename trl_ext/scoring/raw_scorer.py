"""`RawScorer`: scores rows of text with one reward model, in order and without normalising.

It checks rows, makes their token ids (`rows`), runs the model (`batches`) and reads the outputs of token-level models
(`token_views`). It knows nothing of normalisers, of names in metrics, or of how a model is loaded.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.offsets import Located, completion_text
from trl_ext.data.tokenization import Completion, Prompt, TokenizationSettings
from trl_ext.data.validation import DataError, shown
from trl_ext.models.heads import unwrap
from trl_ext.models.inputs import InputLimits, writes_a_date
from trl_ext.models.sidecar import Sidecar, get_sidecar
from trl_ext.scoring.batches import BatchRunner
from trl_ext.scoring.remote import RemoteModel
from trl_ext.scoring.rows import RowEncoder, row_error
from trl_ext.scoring.token_views import Aggregation, Cut, Segmenter, TokenViews


logger = logging.getLogger(__name__)

# Tokens of a batch with batch_size="auto": our choice. It is halved when a batch does not fit in memory.
TOKEN_BUDGET = 16_384
# Rows whose token ids are in memory at a time. Rows are sorted by length within such a chunk.
CHUNK_ROWS = 4096


class RawScorer:
    """
    Scores rows with one reward model, without normalising.

    Args:
        model (`PreTrainedModel`, `PeftModel` or [`RemoteModel`]): the reward model, with its sidecar if it has one. A
            model on a server makes its own batches.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        batch_size, max_length, aggregation, segmenter, shared_prefix: see [`~trl_ext.RewardScorer`].
        name (`str`, *optional*, defaults to `"RewardScorer"`): name in messages.

    Attributes:
        kind (`str`): kind of reward model: `"scalar"`, `"outcome"`, `"process"` or `"segment"`.
        views ([`TokenViews`] or `None`): reads the outputs of a token-level model.
        sidecar ([`Sidecar`] or `None`): what the model is.
        encoder ([`RowEncoder`]): makes token ids.
        runner ([`BatchRunner`] or [`RemoteModel`]): runs the model.
        num_truncated (`int`): rows cut to `max_length` so far.
        num_unseen (`int`): rows so far with text that the model does not see.

    Raises:
        `ValueError`: the model has several outputs and no sidecar that describes them, or an argument does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | RemoteModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | Literal["auto"] = "auto",
        max_length: int | None = None,
        aggregation: Aggregation | None = None,
        segmenter: Segmenter | None = None,
        shared_prefix: bool | Literal["auto"] = "auto",
        name: str = "RewardScorer",
    ):
        check_limits(batch_size, max_length)
        self.model = model
        self.sidecar, self._num_labels, limits = _describe(model, tokenizer)
        sidecar = self.sidecar
        _check_labels(self._num_labels, None if sidecar is None else sidecar.num_labels)
        self.name = name
        self.kind = "scalar" if sidecar is None else sidecar.kind
        _check_choices(self.kind, aggregation, segmenter)
        self.views = None if self.kind == "scalar" else TokenViews(sidecar, aggregation, segmenter)
        self.num_truncated = 0
        self.num_unseen = 0
        self._said: set[str] = set()
        if sidecar is None:
            tokenization = TokenizationSettings.without_sidecar()
            self._say_once(
                "the model has no reward_model.json, so its tokenization settings are unknown. Chats get its chat "
                "template; plain text gets the special tokens that the tokenizer adds, and no EOS.",
                "sidecar",
            )
        else:
            tokenization = TokenizationSettings.from_dict(sidecar.token_policy)
        if writes_a_date(tokenizer):
            self._say_once(
                "the chat template writes today's date into each chat, so scores of chats change from day to day. "
                "Trainers of trl_ext freeze the date in the template that they save.",
                "date",
            )

        # then only the output at the last token is needed
        self._gives_scalars = self.views is None or self.views.is_scalar
        positions = limits.max_positions
        self.encoder = RowEncoder(
            tokenizer=tokenizer,
            tokenization=tokenization,
            vocab_size=limits.vocab_size,
            max_positions=positions,
            max_length=max_length if max_length is None or positions is None else min(max_length, positions),
        )
        if isinstance(model, RemoteModel):
            self.runner: BatchRunner | RemoteModel = model
            return
        pad = tokenizer.pad_token_id
        by_tokens = batch_size == "auto"
        self.runner = BatchRunner(
            model,
            pad_id=pad if pad is not None and pad < limits.vocab_size else 0,  # masked: any id will do
            limit=TOKEN_BUDGET if by_tokens else batch_size,
            by_tokens=by_tokens,
            shared_prefix=shared_prefix if self._gives_scalars else False,
            max_length=max_length,
            say=self._say_once,
        )

    def in_words(self, folder: Path | None) -> str:
        """What scores, for the log: the kind of model, its class and folder, its precision, the longest row."""
        if isinstance(self.model, RemoteModel):
            return f"{self.kind} reward model on a server, described by {folder}"
        model, limit = unwrap(self.model), self.encoder.max_length
        weights = next(model.parameters())
        dtype = str(weights.dtype).removeprefix("torch.")
        rows = "rows of any length" if limit is None else f"rows of up to {limit} tokens"
        source = folder or model.config._name_or_path or "memory"
        return f"{self.kind} reward model, {type(model).__name__} from {source}, {dtype} on {weights.device}, {rows}"

    def scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[Any]:
        """
        One score per row, `None` for a row without tokens. A stacked model gives a list of its members' scores.

        Raises:
            [`DataError`]: a row cannot be read or tokenized, or its score is not finite.
            `ValueError`: `prompts`, `completions` and columns have different lengths.
        """
        if not self._gives_scalars:
            return self.read(
                prompts, [self.views.cut(item) for item in as_list(completions)], columns, self.views.scalar
            )

        def check(row: int, encoded: Any, score: float | list[float] | None) -> Any:
            # the ensemble checks the members of a stacked model, because it knows their names
            if isinstance(score, float) and not math.isfinite(score):
                raise _not_finite(row, f"the score {score}")
            return score

        return self._map(prompts, completions, columns, self.encoder, self.runner.scores, check)

    def features(
        self,
        prompts: Sequence[Prompt] | None,
        completions: Sequence[Completion],
        columns: dict[str, Any],
        reduce: Callable[[list[torch.Tensor | None]], list[Any]] = list,
    ) -> list[Any]:
        """
        The head's features of each row, (H,) in fp32: a score is their product with the weight of the output layer.
        `None` for a row without tokens. Arguments and errors as in `scores`.

        Args:
            reduce (`Callable`, *optional*):
                What makes numbers of the features of some rows, so that not all of them are in memory at a time. It
                gets and returns a list with an item for each row; `None` stays `None`.

        Raises:
            `ValueError`: the score is not the output at one token. A model on a server has no features either.
        """
        if not self._gives_scalars:
            raise ValueError(
                f"The score of {self.name} ({self.kind}) is put together from several outputs, so it has no features. "
                "Needed: a scalar model, or an outcome model without `aggregation`."
            )

        def check(row: int, encoded: Any, found: Any) -> Any:
            if found is not None and not torch.as_tensor(found).isfinite().all():
                raise _not_finite(row, "a feature that is not finite")
            return found

        def run(prompts: Sequence[Prompt] | None, ids: Sequence[list[int]]) -> list[Any]:
            return reduce(self.runner.features(prompts, ids))

        return self._map(prompts, completions, columns, self.encoder, run, check)

    def read(
        self, prompts: Sequence[Prompt] | None, cuts: list[Cut], columns: dict[str, Any], view: Callable
    ) -> list[Any]:
        """Apply `view` to the outputs of each row of a token-level model; a row without tokens has no outputs."""

        def read(row: int, located: Located, outputs: torch.Tensor | None) -> Any:
            if outputs is None:
                return view(located, torch.empty(0, self._num_labels), cuts[row].spans)
            if not outputs.isfinite().all():
                raise _not_finite(row, "an output that is not finite")
            return view(located, outputs, cuts[row].spans)

        completions = [cut.completion for cut in cuts]
        return self._map(prompts, completions, columns, self.encoder.locate, self.runner.token_outputs, read)

    def token_texts(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[list[str]]:
        """The piece of the completion that belongs to each token's output. The model does not run."""
        given = self._given(prompts, completions, columns)
        rows = [[v if v is None else v[row] for v in given.values()] for row in range(len(given["completions"]))]
        return [
            self.encoder.locate(number, *row).texts(completion_text(row[1]) if row[1] else "")
            for number, row in enumerate(rows)
        ]

    def _map(
        self,
        prompts: Sequence[Prompt] | None,
        completions: Sequence[Completion],
        columns: dict[str, Any],
        make: Callable,
        run: Callable,
        read: Callable,
    ) -> list[Any]:
        """For each row: `make` its token ids, `run` the model on them, and `read` the output."""
        given = self._given(prompts, completions, columns)
        prompts, size = given["prompts"], len(given["completions"])
        results: list[Any] = []
        truncated, unseen = 0, []
        with self.runner.mode():
            for start in range(0, size, CHUNK_ROWS):
                rows = range(start, min(start + CHUNK_ROWS, size))
                made = [make(row, *(v if v is None else v[row] for v in given.values())) for row in rows]
                truncated += sum(item.truncated for item in made)
                texts = [item.unseen or item.unknown or item.unseen_prompt for item in made]
                unseen += [(row, text) for row, text in zip(rows, texts, strict=True) if text]
                found = run(None if prompts is None else prompts[rows.start : rows.stop], [item.ids for item in made])
                results += [read(*item) for item in zip(rows, made, found, strict=True)]
        self.num_truncated += truncated
        self.num_unseen += len(unseen)
        if unseen:
            row, text = unseen[0]
            self._say_once(
                f"{len(unseen)} of {size} rows have text that the model does not see: the chat template leaves it out "
                f"or the tokenizer knows none of its words. The first is row {row}: {shown(text)}. `num_unseen` goes "
                "on counting.",
                "unseen",
            )
        if truncated:
            self._say_once(
                f"{truncated} of {size} rows were longer than max_length={self.encoder.max_length} tokens and were "
                "cut, the prompt from the left first. This is logged once; `num_truncated` counts all of them.",
                "truncated",
            )
        return results

    def _given(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> dict[str, list[Any] | None]:
        """The columns that token ids depend on, by name and as lists of one length."""
        given = {"prompts": prompts, "completions": completions}
        given |= {name: columns.get(name) for name in ("tools", "chat_template_kwargs")}
        check_lengths(len(completions), given)
        return {name: None if values is None else as_list(values) for name, values in given.items()}

    def _say_once(self, message: str, topic: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(f"{self.name}: {message}")


def as_list(values: Sequence[Any]) -> list[Any]:
    """
    A list of the values in order: of a list, tuple, array, column of a data set, or a pandas Series with any index.

    ```python
    >>> as_list(pandas.Series(["a", "b"], index=[1, 0]))
    ['a', 'b']
    ```
    """
    return values if isinstance(values, list) else list(values)


def by_place(values: Any) -> Any:
    """A column that can be indexed by place. A pandas Series is converted, because it is indexed by its labels."""
    return list(values) if hasattr(values, "iloc") else values


def check_lengths(size: int, given: dict[str, Any]) -> None:
    """Raise `ValueError` unless each given column has one value for each of `size` rows."""
    for name, values in given.items():
        single = isinstance(values, (str, dict))
        if single or (values is not None and len(values) != size):
            found = f"a {type(values).__name__}" if single else f"{len(values)} values"
            raise ValueError(f"`{name}` is {found}; needed: a list with one value for each of {size} completions.")


def check_limits(batch_size: int | str, max_length: int | None) -> None:
    """Raise `ValueError` unless both are positive."""
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}; needed: 'auto' or a number of rows >= 1.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}; needed: a number of tokens >= 1, or None for no limit.")


def _describe(
    model: PreTrainedModel | PeftModel | RemoteModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sidecar | None, int, InputLimits]:
    """What a model is, how many outputs its head has, and what rows it takes."""
    if isinstance(model, RemoteModel):
        return model.sidecar, model.num_labels, model.limits(tokenizer)
    return get_sidecar(model), unwrap(model).config.num_labels, InputLimits.of(model)


def _check_labels(found: int, described: int | None) -> None:
    """Raise `ValueError` unless the head has as many outputs as the sidecar says (one if there is no sidecar)."""
    if found != (described or 1):
        what = "one score per text" if described is None else f"the {described} that its reward_model.json describes"
        raise ValueError(f"The model has {found} labels; needed: {what}.")


def _check_choices(kind: str, aggregation: Aggregation | None, segmenter: Segmenter | None) -> None:
    """Raise `ValueError` for arguments that a kind of model does not use."""
    if kind == "scalar" and (aggregation is not None or segmenter is not None):
        raise ValueError(
            "A scalar model has one score, so nothing to aggregate. Leave `aggregation` and `segmenter` out."
        )
    if kind == "outcome" and segmenter is not None:
        raise ValueError("An outcome model gives a score per token, not per segment. Leave `segmenter` out.")


def _not_finite(row: int, found: str) -> DataError:
    return row_error(row, found, "a finite score", "Check the weights, and whether the dtype overflows on this row.")
