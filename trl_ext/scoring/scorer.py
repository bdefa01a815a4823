"""`RewardScorer`: a reward model as a TRL reward function, `(prompts, completions, **columns) -> list[float | None]`.

It loads the model and its tokenizer, gets scores from a `RawScorer`, and normalises them. It knows nothing of training
or of files of rows.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_ext.data.offsets import completion_text
from trl_ext.data.segmentation import CharSpan
from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.logs import follow_transformers
from trl_ext.models.inputs import load_tokenizer, text_tokenizer
from trl_ext.models.loading import load_reward_model
from trl_ext.scoring.calibration import check_usable
from trl_ext.scoring.raw_scorer import RawScorer, check_lengths, check_limits
from trl_ext.scoring.remote import RemoteModel, is_served, read_address
from trl_ext.scoring.scales import Scales, changing_readings
from trl_ext.scoring.shaping import relative_to_reference
from trl_ext.scoring.token_views import Aggregation, Cut, Neutral, Segmenter, Value, refuse, total
from trl_ext.scoring.uncertainty import Uncertainty


logger = logging.getLogger(__name__)


class RewardScorer(Scales, Uncertainty):
    """
    Scores completions with a reward model. It is a TRL reward function: `reward_funcs=[scorer]`.

    The scorer makes the same token ids as training, by the tokenization settings stored with the model. For a model
    without our `reward_model.json` (from the Hub, or trained by plain TRL) chats get its chat template, and plain text
    gets the special tokens that the tokenizer adds and no EOS; a warning says so once. Rows are sorted by length and
    run in batches. Scores come back in the order of the rows and, in fp32, do not depend on the batch (1e-6; less
    exactly in bf16). They are computed in eval mode, without autocast and without gradients, and the model's mode is
    restored. Calls from several threads wait for each other.

    In detail:

    - A text completion counts as finished: EOS is appended if the settings say so, even to a completion that a policy
      in training did not finish within its length limit. Training treated every completion in this way.
    - An empty completion gets the score of the prompt alone (with EOS). The score is `None` only if there is no token
      at all: no prompt, no text, and no token that the tokenizer adds.
    - A stored normaliser (see [`~RewardScorer.fit_normalizer`]) is applied; set `scorer.normalizer = None` for raw
      scores. A scorer with an `aggregation` or `segmenter` has other scores, and applies only what it has fitted.

    Args:
        model_or_path (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Folder or Hub id of a reward model (full or adapter), or a sequence-classification model in memory with one
            label. A model in memory is used as it is and may continue training; the scorer does not change it. Or the
            URL of a vLLM server that serves the model (several with commas between, to which requests go in turn);
            `processing_class` is then the model's folder. One string may hold both:
            `"http://host:8000#FOLDER"`, or `"http://host:8000?model=NAME#FOLDER"`.
        processing_class (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*):
            The model's tokenizer. Defaults to the one saved at the path; for a full model in memory to that of
            `config._name_or_path`, as in TRL. An adapter in memory does not say where its tokenizer is, so pass it.
            For a model on a server the model's folder or Hub id: everything but the weights is read there, and the
            server's scores of the probes in it must be those that were saved.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch, or `"auto"`: as many as fit in 16,384 padded tokens. When a GPU runs out of memory,
            batches are halved from then on, and a warning says so once. For a model on a server the rows of a
            request; `"auto"` is 64.
        max_length (`int`, *optional*):
            Longest row in tokens. A longer row is cut, the prompt from the left first (see
            [`~trl_ext.data.tokenization.encode`]), and counted in `num_truncated`; a warning says so once. No limit by
            default.
        device (`str` or `torch.device`, *optional*):
            Where the model runs; a model in memory is moved there. Defaults to the device of a model in memory, and
            for a path to this process's GPU if there is one, else the CPU.
        aggregation (`str`, `Callable` or `Mapping`, *optional*):
            How a token-level model gives one number per completion, see `trl_ext.scoring.aggregation`. An outcome
            model gives the raw output at the last token by default; an aggregator is applied to P(right) at each
            token. For a process model the aggregator is applied to P(correct) of the steps and defaults to `"min"`
            (Math-Shepherd, https://huggingface.co/papers/2312.08935). For a segment model it is applied to the
            segments of each category and defaults to `"sum"`; the categories are then added up. A mapping gives the
            weight of each category in that sum. A callable gets the result of `score_steps` or `score_segments` for
            one completion. A scalar model refuses this argument.
        segmenter (`str` or `Callable`, *optional*):
            How a process or segment model divides a completion when the scorer is called for one number, see
            `trl_ext.data.segmentation`. `score_steps` and `score_segments` get the steps and spans from the caller. A
            process model by default cuts after each step separator of training, and an empty line belongs to the step
            before it (in `score_steps` it is a separate step); with an empty separator there is no default. A segment
            model by default cuts into English sentences, for all categories alike, because training may have had
            segments of any size in each; pass `functools.partial(sentences, language=...)` or your own function for
            anything else. An outcome model needs no segmenter.
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run rows with the same prompt as one flat row that holds the prompt once, if that saves at least 5 % of the
            tokens. `"auto"` does so if the model passes a numerical check; `True` raises an error if it does not.
        name (`str`, *optional*):
            The scorer's name in messages and in the metrics of `GRPOTrainer` and `RLOOTrainer`
            (`rewards/<name>/mean`). Defaults to `"RewardScorer"`, as TRL names a callable object by its class. Give
            each of several scorers a different name.
        calibrated (`bool`, *optional*, defaults to `False`):
            Give scores as calibrated log-odds, by the calibration stored with the model (see `fit_calibration`).
        reference (`str` or `float`, *optional*):
            Give `sigmoid(score - reference score)` in place of the score: a column that holds a reference completion
            (or several) of each row, or one fixed score. See https://huggingface.co/papers/2502.18770.
        std_coefficient (`float`, *optional*, defaults to `0.0`):
            Give scores minus this many of their standard deviations (see `score_with_uncertainty`), at least 0: a
            lower confidence bound from one model, as `mean_minus_std` is from an ensemble.
        base_model (`str` or `Path`, *optional*):
            Where the base of an adapter is now, if it moved. It must hold the same weights; the probes check this.
        model (`str`, *optional*):
            The name of the model on a server. Defaults to the served model of that folder or name.

    Attributes:
        model (`PreTrainedModel`, `PeftModel` or [`~trl_ext.scoring.remote.RemoteModel`]): the reward model.
        folder (`Path` or `None`): the local folder that it was loaded from.
        raw ([`~trl_ext.scoring.raw_scorer.RawScorer`]): gives scores before they are normalised.
        processing_class (`PreTrainedTokenizerBase`): the tokenizer.
        choices (`dict`): the values of `max_length`, `aggregation` and `segmenter` that were passed.
        normalizer (`dict` or `None`): `{"mean", "std"}`, used to normalise scores.
        calibration (`dict` or `None`): what `fit_calibration` found; applied where `calibrated` is true.
        num_truncated (`int`): rows cut to `max_length` so far.
        num_unseen (`int`):
            Rows so far with text of the prompt or the completion, tools among them, that the model does not see,
            because the chat template leaves it out or the tokenizer knows no token of it. A warning shows the first
            one.

    Raises:
        `ValueError`: the model has several outputs and no sidecar that describes them, its tokenizer cannot be found,
            `batch_size` or `max_length` is not positive, or `aggregation` or `segmenter` does not fit.
        [`~trl_ext.serving.server_pool.ServerError`]: a server does not answer, does not have the model, or gives other
            scores than the saved model.

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
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | str | Path | None = None,
        batch_size: int | Literal["auto"] = "auto",
        max_length: int | None = None,
        aggregation: Aggregation | None = None,
        device: str | torch.device | None = None,
        shared_prefix: bool | Literal["auto"] = "auto",
        name: str | None = None,
        segmenter: Segmenter | None = None,
        base_model: str | Path | None = None,
        model: str | None = None,
        calibrated: bool = False,
        reference: str | float | None = None,
        std_coefficient: float = 0.0,
    ):
        self.__name__ = name or type(self).__name__  # where TRL looks for a reward function's name
        follow_transformers()
        check_limits(batch_size, max_length)  # before a model is loaded
        if is_served(model_or_path):
            folder = processing_class if isinstance(processing_class, (str, Path)) else None
            processing_class = None if folder is not None else processing_class
            source = _open_served(model_or_path, folder, model, batch_size, device or base_model)
        elif model is not None or isinstance(processing_class, (str, Path)):
            raise ValueError("`model` and a folder as `processing_class` are for a model on a server: give its URL.")
        else:
            source = _open(model_or_path, device, base_model)
        self.model = source.model
        self.folder = source.folder
        if isinstance(model_or_path, (str, Path)) and not is_served(model_or_path) and source.folder is None:
            self._hub_id = str(model_or_path)
        self.processing_class = text_tokenizer(processing_class or load_tokenizer(source.tokenizer))
        self.choices = {"max_length": max_length, "aggregation": aggregation, "segmenter": segmenter}
        self.raw = RawScorer(
            self.model,
            self.processing_class,
            batch_size=batch_size,
            max_length=max_length,
            aggregation=aggregation,
            segmenter=segmenter,
            shared_prefix=shared_prefix,
            name=self.__name__,
        )
        stored, readings = self.raw.sidecar, changing_readings(self.choices)
        if stored is not None and readings and (stored.normalizer or stored.calibration):
            held = f"{self.__name__} has its own {' and '.join(readings)}"
            logger.warning(f"{held}, so the stored normaliser and calibration do not hold and are not applied.")
            stored = None
        self.normalizer = None if stored is None else stored.normalizer
        self.calibration = None if stored is None else stored.calibration
        self.calibrated, self.reference, self.std_coefficient = calibrated, reference, std_coefficient
        if calibrated:
            check_usable(self.calibration, self.normalizer, self.__name__)
        if not std_coefficient >= 0:
            raise ValueError(f"std_coefficient={std_coefficient}; needed: 0 or more.")
        if std_coefficient and (self.folder is not None or self._hub_id is not None):
            _ = self.posterior  # an error now, not at the first batch
        done = {"normalised": self.normalizer, "calibrated": calibrated, "compared": reference is not None}
        words = [self.raw.in_words(self.folder), *(name for name, is_done in done.items() if is_done)]
        logger.info(f"{self.__name__} starts: {', '.join(words)}")

    @property
    def kind(self) -> str:
        """`"scalar"`, `"outcome"`, `"process"` or `"segment"`."""
        return self.raw.kind

    @property
    def num_truncated(self) -> int:
        """Rows cut to `max_length` so far."""
        return self.raw.num_truncated

    @property
    def num_unseen(self) -> int:
        """Rows so far with text that the model does not see."""
        return self.raw.num_unseen

    def __call__(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """
        Score each completion after its prompt.

        Args:
            prompts (sequence of `str`, lists of messages or `None`; or `None`):
                `None`, for a row or for all rows, if a completion is the whole text or conversation.
            completions (sequence of `str`, lists of messages, or single messages):
                After a chat prompt a string is one assistant message.
            **columns:
                Columns with one value per row, as TRL passes them. `tools` (a list, or JSON of one) and
                `chat_template_kwargs` go to the chat template as in training; all others are ignored.

        Returns:
            `list[float | None]`: one score per row, in the order of the rows. It is `None` if there is nothing to
            score: no token, or for a process or segment model no step or segment.

        Raises:
            [`DataError`]: a row cannot be read or tokenized, or its score is not finite. It names the row index.
            `ValueError`: `prompts`, `completions` and columns have different lengths.
        """
        if self.std_coefficient:
            scores, spread = self.score_with_uncertainty(prompts, completions, **columns)
            pairs = zip(scores, spread, strict=True)
            return [None if score is None else score - self.std_coefficient * std for score, std in pairs]
        scores = self._scaled(prompts, completions, columns)
        if self.reference is None:
            return scores
        return relative_to_reference(self._scaled, scores, prompts, columns, self.reference)

    # --------------------------------------------------------------------------------------------- token-level models
    def score_tokens(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[float]] | list[list[list[float]]]:
        """
        The raw output of a token-level model at each token of the completions. Arguments as in a call.

        The tokens are those that cover a part of the completion, and those that close it (EOS, the end of a turn). A
        model with one output gives a number per token. A model with several gives a list per token: all classes of the
        first category, then those of the next.

        Raises:
            `ValueError`: the model is a scalar reward model.
        """
        refuse("score_tokens", self.raw.kind, self.__name__)
        cuts = [Cut(completion, []) for completion in completions]
        return self.raw.read(
            prompts, cuts, columns, lambda located, outputs, spans: self.raw.views.tokens(located, outputs)
        )

    def token_texts(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[str]]:
        """
        The piece of the completion that belongs to each output of `score_tokens`; empty for tokens that close it.

        The joined pieces are the completion (up to `max_length`). Arguments and errors as in `score_tokens`. The model
        does not run.
        """
        refuse("score_tokens", self.raw.kind, self.__name__)
        return self.raw.token_texts(prompts, completions, columns)

    def score_steps(
        self,
        prompts: Sequence[Prompt] | None,
        steps: Sequence[Sequence[str]],
        neutral: Neutral = "negative",
        **columns: Any,
    ) -> list[list[float]]:
        """
        P(correct) of each step, from one forward pass per completion.

        A model whose outputs are no probabilities gives the output itself; with `loss_type="hinge"` a step is right
        above 0.

        The steps are joined as in training, with the separator after each. The score of a step is read at the token
        where training put its label (with label placement `"all"` at the step's last token). Every step gets a score:
        steps that share a token (empty steps, or `\\n\\n` as one token) get the same one. Only steps that
        `max_length` cuts off have no score: `None`.

        Args:
            prompts (sequence of `str`, lists of messages or `None`; or `None`): as in a call.
            steps (sequence of lists of `str`): the steps of each completion, also after a chat prompt.
            neutral (`str`, *optional*, defaults to `"negative"`):
                With three classes (-1, 0, 1), `"positive"` gives P(0) + P(1) instead of P(1).
            **columns: as in a call.

        Raises:
            `ValueError`: the model is not a process reward model.
        """
        refuse("score_steps", self.raw.kind, self.__name__)
        self.raw.views.check_neutral(neutral)
        cuts = [self.raw.views.join_steps(own) for own in steps]
        return self.raw.read(prompts, cuts, columns, partial(self.raw.views.steps, neutral=neutral))

    def score_segments(
        self,
        prompts: Sequence[Prompt] | None,
        completions: Sequence[Completion],
        spans: Sequence[Sequence[CharSpan]],
        **columns: Any,
    ) -> list[list[Value]]:
        """
        The estimated label of each segment: one number, or one for each category if the categories have names.

        It is on the scale of the labels. With `bce` and `ce` it is the expected label (a probability, or for three
        classes P(1) - P(-1)), else the output. A segment that `max_length` cuts off has no score: `None`.

        Args:
            prompts, completions, **columns: as in a call.
            spans (sequence of lists of `(start, end)`):
                Character spans of each completion, without the end. If the completion is messages, they refer to the
                content of the last message.

        Raises:
            `ValueError`: the model is not a segment reward model, or a span is empty or not inside its completion.
        """
        refuse("score_segments", self.raw.kind, self.__name__)
        check_lengths(len(completions), {"spans": spans})
        cuts = [Cut(*pair) for pair in zip(completions, spans, strict=True)]
        self.raw.views.check_spans(cuts)
        return self.raw.read(prompts, cuts, columns, self.raw.views.segments)

    def score_spans(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[tuple[int, int, float]]]:
        """
        The scored parts of completions that a policy wrote, as `DenseGRPOTrainer` takes them: `(start, end, reward)`.

        A process model gives P(correct) of each step, a segment model the estimated label of each segment (categories
        are added up); both are cut as in a call of the scorer. An outcome model gives for each token by how much it
        changes P(right), so that the rewards of a completion add up to P(right) at its last token, whatever its
        length. What `max_length` cuts off has no reward. Arguments as in a call.

        Returns:
            `list[list[tuple[int, int, float]]]`: characters of each completion (of messages: of the last content).

        Raises:
            `ValueError`: the model is a scalar one.
        """
        refuse("score_spans", self.raw.kind, self.__name__)
        views = self.raw.views
        cuts = [views.cut(completion) for completion in completions]
        if self.kind == "outcome":
            texts = self.raw.token_texts(prompts, completions, columns)
            changes = self.raw.read(prompts, cuts, columns, views.changes)
            return [_spans_of_pieces(*row) for row in zip(texts, changes, strict=True)]
        view = views.steps if self.kind == "process" else views.segments
        scores = self.raw.read(prompts, cuts, columns, view)
        lengths = [len(completion_text(completion)) if completion else 0 for completion in completions]
        return [
            [
                (start, min(end, length), total(v))
                for (start, end), v in zip(cut.spans, values, strict=True)
                if v is not None
            ]
            for cut, values, length in zip(cuts, scores, lengths, strict=True)
        ]

    def combine(self, scores: Sequence[Sequence[Value | None]]) -> list[float | None]:
        """
        Aggregate and normalise the results of `score_steps` or `score_segments`, as a call of the scorer does.

        Steps and segments that were cut off do not count. A completion without any gets `None`.

        Raises:
            `ValueError`: the model is neither a process nor a segment reward model.
        """
        refuse("combine", self.raw.kind, self.__name__)
        return self._normalized([self.raw.views.combine(own) for own in scores])


def _spans_of_pieces(pieces: Sequence[str], rewards: Sequence[float]) -> list[tuple[int, int, float]]:
    """Characters of each piece with its reward; what closes a completion is put on the last piece with a text."""
    spans: list[tuple[int, int, float]] = []
    start = waiting = 0
    for piece, reward in zip(pieces, rewards, strict=True):
        waiting += reward
        if piece:
            spans.append((start, start + len(piece), waiting))
            start, waiting = start + len(piece), 0
    if spans and waiting:
        spans[-1] = (*spans[-1][:2], spans[-1][2] + waiting)
    return spans


class _Source(NamedTuple):
    """A reward model, the folder that it was loaded from, and where its tokenizer is; each may be `None`."""

    model: PreTrainedModel | PeftModel | RemoteModel
    folder: Path | None
    tokenizer: str | None


def _open(
    model_or_path: str | Path | PreTrainedModel | PeftModel,
    device: str | torch.device | None,
    base_model: str | Path | None,
) -> _Source:
    """Load the reward model that the first argument of a scorer names. Raises `TypeError` for other types."""
    if isinstance(model_or_path, (str, Path)):
        path = str(model_or_path)
        where = {"": torch.device(device or PartialState().device)}
        model = load_reward_model(path, base_model=base_model, device_map=where)
        return _Source(model, Path(path) if Path(path).is_dir() else None, path)
    if not isinstance(model_or_path, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"model_or_path is a {type(model_or_path).__name__}; needed: a path, a Hub id, a `PreTrainedModel` or "
            "a `PeftModel`. If the model is wrapped (DDP), pass `accelerator.unwrap_model(model)`."
        )
    if base_model is not None:
        raise ValueError(
            "`base_model` says where the base of a saved adapter is, but this model is in memory already. Leave it "
            "out."
        )
    model = model_or_path if device is None else model_or_path.to(device)
    return _Source(model, None, None if isinstance(model, PeftModel) else model.config._name_or_path)


def _open_served(
    text: str, folder: str | Path | None, name: str | None, batch_size: int | Literal["auto"], unused: Any
) -> _Source:
    """The reward model on a server. Raises `ValueError` if it is not said which one."""
    if unused is not None:
        raise ValueError("`device` and `base_model` say how a model is loaded here, and this one is on a server.")
    address = read_address(text, folder, name)
    model = RemoteModel(address, None if batch_size == "auto" else batch_size)
    return _Source(model, Path(address.folder) if Path(address.folder).is_dir() else None, model.folder)
