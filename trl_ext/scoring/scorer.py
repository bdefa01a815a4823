"""`RewardScorer`: a reward model as a TRL reward function, `(prompts, completions, **columns) -> list[float | None]`.

Knows what a user may ask of a model. `rows` makes token ids, `batches` runs them, `token_views` reads the outputs of
token-level models; building, loading and the head are `trl_ext.models`. Knows nothing of training or files of rows.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.offsets import completion_text
from trl_ext.data.segmentation import CharSpan
from trl_ext.data.tokenization import Completion, Prompt, TokenizationSettings
from trl_ext.data.validation import DataError
from trl_ext.models.heads import unwrap
from trl_ext.models.inputs import load_tokenizer, max_positions, text_tokenizer
from trl_ext.models.loading import load_reward_model
from trl_ext.models.sidecar import get_sidecar, read_sidecar, set_sidecar, vocab_size
from trl_ext.scoring.batches import BatchRunner
from trl_ext.scoring.normalizer import mean_and_std
from trl_ext.scoring.rows import RowEncoder, row_error
from trl_ext.scoring.token_views import Aggregation, Cut, Neutral, Segmenter, TokenViews, Value, refuse


logger = logging.getLogger(__name__)

# Tokens of a batch with batch_size="auto": our choice. It is halved when a batch does not fit in memory.
TOKEN_BUDGET = 16_384
# Rows whose token ids are held at a time. They are sorted by length within such a chunk.
CHUNK_ROWS = 4096


class RewardScorer:
    """
    Scores completions with a reward model. It is a TRL reward function: `reward_funcs=[scorer]`.

    A score is the model applied to the token ids that training made of the same text, by the tokenization settings
    stored with the model. A model without our `reward_model.json` (from the Hub, or trained by plain TRL) gets its
    chat template, or its tokenizer's own special tokens and no EOS, which is said once. Rows are sorted by length and
    run in batches; scores come back in the order of the rows and, in fp32, do not depend on the batch (1e-6; less
    exactly in bf16). They are computed in eval mode, without autocast and without gradients, and the model's mode is
    put back. Calls from several threads wait for each other.

    In detail:

    - A text completion counts as finished: EOS is appended where the settings say so, also behind a completion that a
      policy in training could not finish within its length limit. That is how training saw every completion.
    - An empty completion gets the score of the prompt alone (with EOS). `None` comes back only where there is no token
      at all: no prompt, no text, and nothing that the tokenizer adds.
    - A stored normaliser (see [`~RewardScorer.fit_normalizer`]) is applied; set `scorer.normalizer = None` for raw
      scores.

    Args:
        model_or_path (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Folder or Hub id of a reward model (full or adapter), or a sequence-classification model in memory with one
            label. A model in memory is used as it is, and may go on training: nothing of it is changed.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. Defaults to the one saved at the path; for a full model in memory to that of
            `config._name_or_path`, as in TRL. An adapter in memory does not know where its tokenizer is: pass it.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch, or `"auto"`: as many as fit in 16,384 padded tokens. When a GPU runs out of memory,
            batches are halved from then on, which is said once.
        max_length (`int`, *optional*):
            Longest row in tokens. A longer one is cut, the prompt from the left first (see
            [`~trl_ext.data.tokenization.encode`]), counted in `num_truncated`, and reported once. No limit by default.
        device (`str` or `torch.device`, *optional*):
            Defaults to where a model in memory is; for a path to this process's GPU if there is one, else the CPU. A
            model in memory is moved there.
        aggregation (`str`, `Callable` or `Mapping`, *optional*):
            How a token-level model gives one number a completion; refused by a scalar model. An outcome model gives by
            default the raw output at the last token, else an aggregator (see `trl_ext.scoring.aggregation`) over
            P(right) at each token. A process model takes one over P(correct) of the steps, by default `"min"`
            (Math-Shepherd, https://huggingface.co/papers/2312.08935). A segment model takes one over the segments of
            each category, by default `"sum"`, and adds up the categories: weighted, if this maps each to its weight.
            A callable gets what `score_steps` or `score_segments` gives for a completion.
        segmenter (`str` or `Callable`, *optional*):
            What cuts a completion for the scalar call of a process or segment model, see `trl_ext.data.segmentation`;
            `score_steps` and `score_segments` are told the steps and spans. Default for a process model: cut behind
            each step separator of training, where an empty line belongs to the step before it (in `score_steps` it is
            a step of its own); an empty separator has no default. Default for a segment model: English sentences, for
            all categories alike, since training may have had segments of any size in each; pass
            `functools.partial(sentences, language=...)` or your own for others. An outcome model needs none.
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run rows with the same prompt as one flat row that holds the prompt once, where that saves at least 5 % of
            the tokens. `"auto"` does so if the model passes a numerical check; `True` raises if it does not.
        name (`str`, *optional*):
            Its name in messages and in the metrics of `GRPOTrainer` and `RLOOTrainer` (`rewards/<name>/mean`).
            Defaults to `"RewardScorer"`, as TRL names a callable object by its class; give each of several scorers
            its own.

    Attributes:
        processing_class (`PreTrainedTokenizerBase`): the tokenizer.
        choices (`dict`): `max_length`, `aggregation` and `segmenter` as they were given.
        normalizer (`dict` or `None`): the `{"mean", "std"}` that scores are normalised by.
        num_truncated (`int`): rows cut to `max_length` so far.

    Raises:
        `ValueError`: the model has several outputs of which it is not known what they are, its tokenizer cannot be
            found, `batch_size` or `max_length` is not positive, or `aggregation` or `segmenter` does not fit.

    Example:

    ```python
    >>> scorer = RewardScorer("outputs/rankings", name="helpfulness")
    >>> scorer(prompts=["2 + 2 =", "2 + 2 ="], completions=[" 4", " 5"])
    [1.3127, -0.4410]
    ```
    """

    def __init__(
        self,
        model_or_path: str | Path | PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int | Literal["auto"] = "auto",
        max_length: int | None = None,
        aggregation: Aggregation | None = None,
        device: str | torch.device | None = None,
        shared_prefix: bool | Literal["auto"] = "auto",
        name: str | None = None,
        segmenter: Segmenter | None = None,
    ):
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r}; needed: 'auto' or a number of rows >= 1.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}; needed: a number of tokens >= 1, or None for no limit.")
        self.__name__ = name or type(self).__name__  # where TRL looks for a reward function's name
        self._folder: Path | None = None
        if isinstance(model_or_path, (str, Path)):
            source = str(model_or_path)
            self._folder = Path(source) if Path(source).is_dir() else None
            model = load_reward_model(source, device_map={"": torch.device(device or PartialState().device)})
        elif isinstance(model_or_path, (PreTrainedModel, PeftModel)):
            model = model_or_path if device is None else model_or_path.to(device)
            source = None if isinstance(model, PeftModel) else model.config._name_or_path
        else:
            raise TypeError(
                f"model_or_path is a {type(model_or_path).__name__}; needed: a path, a Hub id, a `PreTrainedModel` or "
                "a `PeftModel`. Of a wrapped model (DDP) pass `accelerator.unwrap_model(model)`."
            )
        sidecar = get_sidecar(model)
        labels = unwrap(model).config.num_labels
        expected = 1 if sidecar is None else sidecar.num_labels
        if labels != expected:
            what = "one score a text" if sidecar is None else f"the {expected} that its reward_model.json describes"
            raise ValueError(f"The model has {labels} labels; needed: {what}.")
        self._kind = "scalar" if sidecar is None else sidecar.kind
        if self._kind == "scalar" and (aggregation is not None or segmenter is not None):
            raise ValueError("A scalar model has nothing to aggregate: leave `aggregation` and `segmenter` out.")
        if self._kind == "outcome" and segmenter is not None:
            raise ValueError("An outcome model is read at each token and not by segment: leave `segmenter` out.")
        self._views = None if self._kind == "scalar" else TokenViews(sidecar, aggregation, segmenter)
        self._gives_scalars = self._views is None or self._views.is_scalar  # the last token's output is all
        if sidecar is None:
            tokenization = TokenizationSettings.without_sidecar()
            logger.warning(
                f"{self.__name__}: the model has no reward_model.json, so it is not known how it was trained to see "
                "text. Chats get its chat template; plain text gets the tokenizer's own special tokens and no EOS."
            )
        else:
            tokenization = TokenizationSettings.from_dict(sidecar.token_policy)

        self.model = model
        self.normalizer = None if sidecar is None else sidecar.normalizer
        self.num_truncated = 0
        self.processing_class = text_tokenizer(processing_class or load_tokenizer(source))
        self.choices = {"max_length": max_length, "aggregation": aggregation, "segmenter": segmenter}
        positions = max_positions(unwrap(model))
        self._encoder = RowEncoder(
            tokenizer=self.processing_class,
            tokenization=tokenization,
            vocab_size=vocab_size(model),
            max_positions=positions,
            max_length=max_length if max_length is None or positions is None else min(max_length, positions),
        )
        pad = self._encoder.tokenizer.pad_token_id
        by_tokens = batch_size == "auto"
        self._said: set[str] = set()
        self._runner = BatchRunner(
            model,
            pad_id=pad if pad is not None and pad < self._encoder.vocab_size else 0,  # masked: any id will do
            limit=TOKEN_BUDGET if by_tokens else batch_size,
            by_tokens=by_tokens,
            shared_prefix=shared_prefix if self._gives_scalars else False,
            max_length=max_length,
            say=self._say_once,
        )

    def __call__(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """
        Score each completion after its prompt.

        Args:
            prompts (sequence of `str`, lists of messages or `None`; or `None`):
                `None`, for a row or altogether, where a completion is the whole text or conversation.
            completions (sequence of `str`, lists of messages, or single messages):
                After a chat prompt a string is one assistant message.
            **columns:
                One value a row, as TRL passes them. `tools` (a list, or JSON of one) and `chat_template_kwargs` go to
                the chat template as in training; everything else is meant for other reward functions and ignored.

        Returns:
            `list[float | None]`: a score a row, in the order of the rows; `None` where there is nothing to score: no
            token, or for a process or segment model no step or segment.

        Raises:
            [`DataError`]: a row cannot be read or tokenized, or its score is not finite; names the row index.
            `ValueError`: `prompts`, `completions` and columns of different lengths.
        """
        return self._normalized(self._raw_scores(prompts, completions, columns))

    def fit_normalizer(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> dict[str, float]:
        """
        From now on scale scores so that these rows have mean 0 and (population) standard deviation 1.

        No ranking moves. If the scorer was made from a local folder with a `reward_model.json`, the normaliser is
        written there, and every scorer made from it later applies it. Else it lasts as long as this object. One that
        was there before is replaced. Arguments as in a call.

        Returns:
            `dict[str, float]`: `mean` and `std` of the raw scores.

        Raises:
            `ValueError`: fewer than two rows have a score, or all have the same.
        """
        self.normalizer = mean_and_std(self._raw_scores(prompts, completions, columns))
        sidecar = None if self._folder is None else read_sidecar(self._folder)
        if sidecar is None:
            logger.info(f"{self.__name__}: the normaliser is not saved: no local reward_model.json to hold it.")
        else:
            sidecar.normalizer = dict(self.normalizer)
            sidecar.save(self._folder)
            set_sidecar(self.model, sidecar)
        return dict(self.normalizer)

    # --------------------------------------------------------------------------------------------- token-level models
    def score_tokens(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[float]] | list[list[list[float]]]:
        """
        The raw output of a token-level model at each token of the completions. Arguments as in a call.

        The tokens are those that hold anything of the completion, and what closes it (EOS, the end of a turn). With
        one output that is a number per token, with more a list: class by class, category after category.

        Raises:
            `ValueError`: the model is a scalar one.
        """
        refuse("score_tokens", self._kind, self.__name__)
        cuts = [Cut(completion, []) for completion in completions]
        return self._read(prompts, cuts, columns, lambda located, outputs, spans: self._views.tokens(located, outputs))

    def token_texts(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[str]]:
        """
        The piece of the completion behind each output of `score_tokens`, empty for what closes it. Joined they are the
        completion (up to `max_length`). Arguments and errors as there; the model is not run.
        """
        refuse("score_tokens", self._kind, self.__name__)
        given = {"prompts": prompts, "completions": completions}
        given |= {name: columns.get(name) for name in ("tools", "chat_template_kwargs")}
        self._check_lengths(len(completions), given)
        rows = [[v if v is None else v[row] for v in given.values()] for row in range(len(completions))]
        return [
            self._encoder.locate(number, *row).texts(completion_text(row[1]) if row[1] else "")
            for number, row in enumerate(rows)
        ]

    def score_steps(
        self,
        prompts: Sequence[Prompt] | None,
        steps: Sequence[Sequence[str]],
        neutral: Neutral = "negative",
        **columns: Any,
    ) -> list[list[float]]:
        """
        P(correct) of each step, from one forward pass a completion.

        The steps are joined as in training, with the separator after each, and the score of one is read where training
        put its label (of `"all"` at the last token). As many scores come out as steps go in: a step without a token of
        its own, and steps that end in the same token (empty ones, `\\n\\n` as one token), get the same output. Only
        what `max_length` cuts off has no score: `None`.

        Args:
            prompts (sequence of `str`, lists of messages or `None`; or `None`): as in a call.
            steps (sequence of lists of `str`): the steps of each completion; after a chat prompt too.
            neutral (`str`, *optional*, defaults to `"negative"`):
                Of three classes (-1, 0, 1), `"positive"` gives P(0) + P(1) in place of P(1).
            **columns: as in a call.

        Raises:
            `ValueError`: the model is no process reward model.
        """
        refuse("score_steps", self._kind, self.__name__)
        self._views.check_neutral(neutral)
        cuts = [self._views.join_steps(own) for own in steps]
        return self._read(prompts, cuts, columns, partial(self._views.steps, neutral=neutral))

    def score_segments(
        self,
        prompts: Sequence[Prompt] | None,
        completions: Sequence[Completion],
        spans: Sequence[Sequence[CharSpan]],
        **columns: Any,
    ) -> list[list[Value]]:
        """
        The estimated label of each segment: a number, or with named categories one for each of them.

        It is on the scale of the labels: with `bce` and `ce` the expected label (a probability, or for three classes
        P(1) - P(-1)), else the output itself. What `max_length` cuts off has no score: `None`.

        Args:
            prompts, completions, **columns: as in a call.
            spans (sequence of lists of `(start, end)`):
                Characters of each completion (of messages: of the last one's content), the end not included.

        Raises:
            `ValueError`: the model is no segment reward model, or a span is empty or not inside its completion.
        """
        refuse("score_segments", self._kind, self.__name__)
        self._check_lengths(len(completions), {"spans": spans})
        cuts = [Cut(*pair) for pair in zip(completions, spans, strict=True)]
        self._views.check_spans(cuts)
        return self._read(prompts, cuts, columns, self._views.segments)

    def combine(self, scores: Sequence[Sequence[Value | None]]) -> list[float | None]:
        """
        The scores that a call gives, of what `score_steps` or `score_segments` returned: aggregated and normalised.

        As there, what was cut off does not count, and a completion without a step or segment has none.

        Raises:
            `ValueError`: the model is no process or segment reward model.
        """
        refuse("combine", self._kind, self.__name__)
        return self._normalized([self._views.combine(own) for own in scores])

    def _read(
        self, prompts: Sequence[Prompt] | None, cuts: list[Cut], columns: dict[str, Any], view: Callable
    ) -> list[Any]:
        """What `view` makes of the outputs of each row; of a row without a token, of no outputs."""

        def read(row: int, located: Any, outputs: torch.Tensor | None) -> Any:
            if outputs is None:
                return view(located, torch.empty(0, unwrap(self.model).config.num_labels), cuts[row].spans)
            if not outputs.isfinite().all():
                raise _not_finite(row, "an output that is not finite")
            return view(located, outputs, cuts[row].spans)

        completions = [cut.completion for cut in cuts]
        return self._map(prompts, completions, columns, self._encoder.locate, self._runner.token_outputs, read)

    # ---------------------------------------------------------------------------------------------------------- rows
    def _raw_scores(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: dict[str, Any]
    ) -> list[float | None]:
        if not self._gives_scalars:
            cuts = [self._views.cut(completion) for completion in completions]
            return self._read(prompts, cuts, columns, self._views.scalar)

        def read(row: int, encoded: Any, score: float | None) -> float | None:
            if score is not None and not math.isfinite(score):
                raise _not_finite(row, f"the score {score}")
            return score

        return self._map(prompts, completions, columns, self._encoder, self._runner.scores, read)

    def _normalized(self, scores: list[float | None]) -> list[float | None]:
        if self.normalizer is None:
            return scores
        mean, std = self.normalizer["mean"], self.normalizer["std"]
        return [None if score is None else (score - mean) / std for score in scores]

    def _map(
        self,
        prompts: Sequence[Prompt] | None,
        completions: Sequence[Completion],
        columns: dict[str, Any],
        make: Callable,
        run: Callable,
        read: Callable,
    ) -> list[Any]:
        """`read` of each row, of what `run` gives for the token ids that `make` made of it."""
        size = len(completions)
        given = {"prompts": prompts, "completions": completions}
        given |= {name: columns.get(name) for name in ("tools", "chat_template_kwargs")}
        self._check_lengths(size, given)
        results: list[Any] = []
        truncated = 0
        with self._runner.mode():
            for start in range(0, size, CHUNK_ROWS):
                rows = range(start, min(start + CHUNK_ROWS, size))
                made = [make(row, *(v if v is None else v[row] for v in given.values())) for row in rows]
                truncated += sum(item.truncated for item in made)
                found = run(None if prompts is None else prompts[rows.start : rows.stop], [item.ids for item in made])
                results += [read(*item) for item in zip(rows, made, found, strict=True)]
        self.num_truncated += truncated
        if truncated:
            self._say_once(
                f"{truncated} of {size} rows were longer than max_length={self._encoder.max_length} tokens and were "
                "cut, the prompt from the left first. `num_truncated` goes on counting.",
                "truncated",
            )
        return results

    def _check_lengths(self, size: int, given: dict[str, Any]) -> None:
        for name, values in given.items():
            single = isinstance(values, (str, dict))
            if single or (values is not None and len(values) != size):
                found = f"a {type(values).__name__}" if single else f"{len(values)} values"
                raise ValueError(f"`{name}` is {found}; needed: a list with a value for each of {size} completions.")

    def _say_once(self, message: str, topic: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(f"{self.__name__}: {message}")


def _not_finite(row: int, found: str) -> DataError:
    return row_error(row, found, "a finite score", "Check the weights, and whether the dtype overflows on this row.")
