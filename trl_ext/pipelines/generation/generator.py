"""The interface of all generation backends (`Generator`), and the code that they share.

The backends are `transformers_backend`, `vllm_backend` and `openai_backend`; `backends` makes them by name.
`PromptEncoder` turns prompts into token ids and generated ids into texts. This module knows nothing of scores or of
where completions are kept.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from trl_ext.data.chat_templates import conversation, template_options
from trl_ext.data.validation import DataError, unknown_token
from trl_ext.pipelines.generation.records import Completion, FinishReason, canonical, ends_with_begun_answer
from trl_ext.pipelines.generation.sampling import Chat, Sampling


Columns = dict[str, Any]


class GenerationError(RuntimeError):
    """A backend cannot go on; the message says what was found and what to do."""


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
            columns (sequence of `dict`, *optional*): each prompt's `tools` and `chat_template_kwargs`.

        Returns:
            `list[list[Completion]]`: those of each prompt, in the order of the prompts.

        Raises:
            [`GenerationError`]: the backend fails. [`DataError`]: a prompt cannot be used; names its index.
        """


_CONTEXT = 8  # tokens of a text that can change how the next token is decoded


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
        goes_on = ends_with_begun_answer(prompt)  # the model continues it, as in TRL
        kwargs = {**(self._sampling.chat_template_kwargs or {}), **(columns.get("chat_template_kwargs") or {})}
        options = template_options(columns.get("tools"), kwargs)
        if self._sampling.chat_template is not None:
            options["chat_template"] = self._sampling.chat_template
        return self.tokenizer.apply_chat_template(
            conversation(self.tokenizer, prompt, [], options),
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_dict=False,
            **options,
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


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one request, computed from the run's seed and the sample; every server accepts seeds below 2³¹."""
    return int.from_bytes(hashlib.sha256(canonical([seed, prompt_id, sample_index])).digest()[:4], "little") >> 1
