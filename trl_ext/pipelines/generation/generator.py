"""The interface of all generation backends (`Generator`), and the code that they share.

The backends are `transformers_backend`, `vllm_backend` and `openai_backend`; `backends` makes them by name.
`PromptEncoder` turns prompts into token ids and generated ids into texts. This module knows nothing of scores or of
where completions are kept.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from trl_ext.data.chat_templates import conversation, template_options, without_nulls
from trl_ext.data.token_ids import token_ids
from trl_ext.data.validation import DataError, unknown_token
from trl_ext.pipelines.generation.records import (
    Completion,
    FinishReason,
    canonical,
    ends_with_begun_answer,
    text_of,
)
from trl_ext.pipelines.generation.sampling import Chat, Sampling


Columns = dict[str, Any]


class GenerationError(RuntimeError):
    """A backend cannot go on; the message says what was found and what to do."""


class LabelError(ValueError):
    """A label is not a single token of the model's tokenizer in its place; the message names its tokens."""


class Generator(Protocol):
    """Something that completes prompts."""

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int | Sequence[int],
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """
        Complete each prompt `num_generations` times.

        Args:
            prompts (sequence of `str` or lists of messages): none of them empty.
            num_generations (`int` or sequence of `int`): completions of each, or one number for each prompt.
            seed (`int`): the same call with the same seed gives the same completions, if the backend supports it.
                Equal prompts in one call get different ones.
            columns (sequence of `dict`, *optional*): each prompt's `tools` and `chat_template_kwargs`.

        Returns:
            `list[list[Completion]]`: those of each prompt, in the order of the prompts.

        Raises:
            [`GenerationError`]: the backend fails. [`DataError`]: a prompt cannot be used; names its index.
        """

    def label_logprobs(self, prompts: Sequence[str | Chat], labels: Sequence[str]) -> list[list[float | None]]:
        """
        Read the probability of each label as the next token after each prompt, without sampling.

        A label may have two tokens, with and without a space before it. Their probabilities are added.

        Args:
            prompts (sequence of `str` or lists of messages): none of them empty.
            labels (sequence of `str`): `L` labels, each a single token after the prompt.

        Returns:
            `list[list[float | None]]`: for each prompt the natural log-probabilities of the `L` labels, which need not
            add up to 1. A server only returns the likeliest tokens; see [`with_bounds`] for labels that are not
            among them.

        Raises:
            [`LabelError`]: a label is not a single token. [`GenerationError`]: the backend fails, or returns no
            log-probabilities. [`DataError`]: a prompt cannot be used; names its index.
        """


_CONTEXT = 8  # tokens of a text that can change how the next token is decoded
_TAIL = 64  # characters at the end of a prompt that can change how a label after it is tokenized
# Labels that many tokenizers know as single tokens; an error suggests those that this one knows.
_USUAL_LABELS = ("A", "B", "C", "D", "E", "1", "2", "3", "4", "5", "yes", "no", "first", "second", "a", "b")


class PromptEncoder:
    """
    Encodes prompts, with the chat template, system prompt and examples of `Sampling`, and decodes completions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's tokenizer.
        sampling ([`~trl_ext.pipelines.generation.sampling.Sampling`]): template, examples, system prompt, stop texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling):
        self.tokenizer = tokenizer
        self._sampling = sampling
        self._label_tokens: dict[tuple[Any, ...], list[list[int]]] = {}

    def ids(self, prompts: Sequence[str | Chat], columns: Sequence[Columns] | None) -> list[list[int]]:
        """Return the token ids of each prompt. Raises [`DataError`] with the index of one that cannot be encoded."""
        encoded = []
        for row, prompt in enumerate(prompts):
            own = columns[row] if columns is not None else {}
            try:
                ids = self._encode(self._sampling.context(prompt), own)
            except Exception as error:  # templates may raise anything
                raise DataError(
                    f"a prompt on which the tokenizer fails with {type(error).__name__}: {error}",
                    "a prompt that the tokenizer and its chat template accept",
                    "Correct or remove the row, or give another `chat_template`.",
                    row=row,
                    column="prompt",
                ) from error
            if not ids:
                raise DataError(
                    "a prompt without a token", "at least one token", "Remove the row.", row=row, column="prompt"
                )
            encoded.append(ids)
        return encoded

    def check_tokens(self, encoded: Sequence[list[int]], known: int) -> None:
        """Raise [`DataError`] for a prompt with a token that the model, which knows the ids below `known`, lacks."""
        for row, ids in enumerate(encoded):
            if max(ids) >= known:
                raise DataError(*unknown_token(max(ids), known, self.tokenizer), row=row, column="prompt")

    @staticmethod
    def check_lengths(encoded: Sequence[list[int]], longest: int, limit: int | None) -> None:
        """Raise [`DataError`] for a prompt that leaves no room for `longest` new tokens among the model's `limit`."""
        for row, ids in enumerate(encoded):
            if limit is not None and len(ids) + longest > limit:
                raise DataError(
                    f"a prompt of {len(ids)} tokens, which with {longest} new ones is longer than the model's {limit} "
                    "positions",
                    f"at most {limit} in all",
                    "Lower max_completion_length, or remove long prompts with dataset.filter.",
                    row=row,
                    column="prompt",
                )

    def _encode(self, prompt: str | Chat, columns: Columns) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        begun = text_of(prompt[-1:]) if ends_with_begun_answer(prompt) else ""
        space = begun[len(begun.rstrip()) :]
        if space:
            text = self._apply_template(prompt, columns, tokenize=False)
            if not text.endswith(space):  # the template trims messages; the model must see where a line ended
                return token_ids(self.tokenizer, [text + space], add_special_tokens=False)[0]
        return self._apply_template(prompt, columns, return_dict=False)

    def _apply_template(self, prompt: Chat, columns: Columns, **arguments: Any) -> Any:
        goes_on = ends_with_begun_answer(prompt)  # the model continues it, as in TRL
        options = template_options(columns.get("tools"), template_kwargs(self._sampling, columns))
        if self._sampling.chat_template is not None:
            options["chat_template"] = self._sampling.chat_template
        return self.tokenizer.apply_chat_template(
            conversation(self.tokenizer, prompt, [], options),
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **arguments,
            **options,
        )

    def label_tokens(self, prompt: str | Chat, labels: Sequence[str]) -> list[list[int]]:
        """
        The token of each label after a prompt: without a space before the label, with one, or both.

        The prompt and the label are tokenized together, because the text before a label can change its token. A
        spelling counts if all labels are single tokens in it.

        Returns:
            `list[list[int]]`: one or two token ids for each label.

        Raises:
            [`LabelError`]: a label is several tokens after this prompt, or two labels are the same token.
        """
        context = self._sampling.context(prompt)
        text = context if isinstance(context, str) else self._apply_template(context, {}, tokenize=False)
        key = (*labels, text[-_TAIL:])
        if key not in self._label_tokens:
            self._label_tokens[key] = self._find_label_tokens(text, labels)
        return self._label_tokens[key]

    def _find_label_tokens(self, text: str, labels: Sequence[str]) -> list[list[int]]:
        def tokens_after(label: str) -> list[list[int]]:
            """The tokens of a label without and with a space before it, and without those of the text."""
            whole = token_ids(self.tokenizer, [text, text + label, f"{text} {label}"], add_special_tokens=False)
            start = len(whole[0])
            # if the label changes the tokens before it, no next token gives it
            return [ids[start:] if ids[:start] == whole[0] else ids for ids in whole[1:]]

        def single(label: str) -> list[int | None]:
            """The token of each spelling; `None` for a spelling of several tokens."""
            unknown = self.tokenizer.unk_token_id
            return [ids[0] if len(ids) == 1 and ids[0] != unknown else None for ids in tokens_after(label)]

        # a spelling counts if all labels have it, since otherwise one label would collect more probability
        spellings = [row for row in zip(*map(single, labels), strict=True) if None not in row]
        if spellings and all(len(set(row)) == len(labels) for row in spellings):
            return [list(dict.fromkeys(ids)) for ids in zip(*spellings, strict=True)]
        usual = [label for label in _USUAL_LABELS if single(label) != [None, None]]
        hint = f"Single tokens here are: {', '.join(usual)}." if usual else "None of the usual labels is one here."
        if spellings:
            raise LabelError(f"Two of the labels {', '.join(labels)} are the same token. Give other labels. {hint}")
        wrong = max(labels, key=lambda label: single(label).count(None))
        pieces = [self.tokenizer.convert_ids_to_tokens(ids[-12:]) for ids in tokens_after(wrong)]
        raise LabelError(
            f"The label {wrong!r} is not a single token after {text[-30:]!r}: it is {pieces[0]}, and {pieces[1]} with "
            f"a space before it. Give other labels, with the template that asks for them. {hint}"
        )

    def finished(
        self, prompt: str | Chat, before: list[int], ids: list[int], ends: set[int], max_length: int
    ) -> tuple[str, list[int], FinishReason]:
        """
        Cut the generated ids at the first end token or text of `stop`.

        Args:
            prompt (`str` or `list[dict]`): the prompt, and `before` (`list[int]`) its token ids.
            ids (`list[int]`): the generated ids; at most `max_length` were requested.
            ends (`set[int]`): end tokens.

        Returns:
            `tuple`: text, token ids with the end token, finish reason.
        """
        goes_on = isinstance(prompt, str) or ends_with_begun_answer(prompt)
        before = before[-_CONTEXT:] if goes_on else []
        for place, token in enumerate(ids):
            if token in ends:
                ids, reason = ids[: place + 1], "stop"
                break
        else:
            reason = "length" if len(ids) >= max_length else "stop"
        text = self._text(before, ids)
        cut = cut_at_stop(text, self._sampling.stop)
        if cut != text:
            reason = "stop"
            while ids and cut_at_stop(self._text(before, ids[:-1]), self._sampling.stop) == cut:
                ids = ids[:-1]  # what came after the text, and its end
        return cut, ids, reason

    def _text(self, before: list[int], ids: list[int]) -> str:
        """The text that ids add to those before. Decoded alone, SentencePiece would drop the space at their start."""
        whole = self.tokenizer.decode([*before, *ids], skip_special_tokens=True)
        start = self.tokenizer.decode(before, skip_special_tokens=True) if before else ""
        return whole[len(start) :] if whole.startswith(start) else self.tokenizer.decode(ids, skip_special_tokens=True)


def too_long(
    generator: Generator,
    prompts: Sequence[str | Chat],
    max_length: int | None = None,
    columns: Sequence[Columns] | None = None,
) -> list[bool]:
    """
    Which prompts have more than `max_length` tokens, or leave no room for the longest completion.

    Only backends with a tokenizer can count. For the others no prompt is too long.

    Raises:
        [`DataError`]: a prompt cannot be encoded; names its index.
    """
    lengths_of = getattr(generator, "prompt_lengths", None)
    if lengths_of is None:
        return [False] * len(prompts)
    limits = (max_length, generator.longest_prompt)
    limit = min((one for one in limits if one is not None), default=math.inf)
    return [length > limit for length in lengths_of(prompts, columns)]


def calls_together(generator: Generator) -> AbstractContextManager:
    """
    A block of calls, also from several threads, that end together: with a server, the first failure or an interruption
    stops all of them. A backend without a server has nothing to stop.
    """
    return getattr(generator, "together", nullcontext)()


def template_kwargs(sampling: Sampling, columns: Columns) -> dict[str, Any]:
    """The `chat_template_kwargs` of the run, and in their place those of the row; a null there sets nothing."""
    return {**(sampling.chat_template_kwargs or {}), **without_nulls(columns.get("chat_template_kwargs") or {})}


def cut_at_stop(text: str, stop: Sequence[str] | None) -> str:
    """The part of a text before the first stop text."""
    places = [place for item in stop or () if (place := text.find(item)) >= 0]
    return text[: min(places)] if places else text


def number_for_each(prompts: Sequence[Any], num_generations: int | Sequence[int]) -> list[int]:
    """How many completions each prompt gets, from one number for all or one for each."""
    if isinstance(num_generations, int):
        return [num_generations] * len(prompts)
    if len(num_generations) != len(prompts):
        raise ValueError(f"num_generations has {len(num_generations)} numbers for {len(prompts)} prompts.")
    return list(num_generations)


def log_sum(logprobs: Collection[float]) -> float:
    """The log of a sum of probabilities that are given as logs; `-inf` for none."""
    top = max(logprobs, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in logprobs))


def with_bounds(found: Sequence[Collection[float]], returned: Collection[float]) -> list[float | None]:
    """
    The log-probability of each label on a server that only returns those of the likeliest tokens.

    A label that is not among them has at most the smallest probability that is returned. It gets that bound if another
    label is there, so the preference is understated. If none is there, all are `None`.

    Args:
        found (sequence of collections of `float`): log-probabilities of each label's tokens.
        returned (collection of `float`): all log-probabilities that the server returned.
    """
    if not any(found):
        return [None] * len(found)
    return [log_sum(values) if values else min(returned) for values in found]


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one request, computed from the run's seed and the sample; every server accepts seeds below 2³¹."""
    return int.from_bytes(hashlib.sha256(canonical([seed, prompt_id, sample_index])).digest()[:4], "little") >> 1
