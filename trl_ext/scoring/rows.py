"""Turns one row into token ids, or raises an error that names the row.

It makes the same checks as training and calls the same function, `trl_ext.data.tokenization.encode`. It knows nothing
of models except their numbers of token ids and positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_ext.data.chat_templates import content_text
from trl_ext.data.offsets import Located, encode_with_offsets
from trl_ext.data.tokenization import Completion, Encoded, Prompt, TokenizationSettings, encode
from trl_ext.data.validation import DataError, RowChecks, unknown_token


# A row without a token.
NOTHING = Located([], np.empty(0, np.int64), np.empty(0, np.int64), 0, truncated=False, stripped=False)


@dataclass
class RowEncoder:
    """
    Makes the token ids of rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        tokenization (`TokenizationSettings`): the settings that the model was trained with.
        vocab_size (`int`): the model has embeddings for token ids below this number.
        max_positions (`int` or `None`): longest row, in tokens, that the model can process.
        max_length (`int` or `None`): longer rows are cut to this number of tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenization: TokenizationSettings
    vocab_size: int
    max_positions: int | None
    max_length: int | None

    def __call__(
        self, row: int, prompt: Prompt, completion: Completion, tools: Any, chat_template_kwargs: Any
    ) -> Encoded:
        """
        Token ids of row number `row`; empty if there is nothing to score.

        Raises:
            [`DataError`]: a value has the wrong type, the tokenizer or chat template refuses the row, or the model has
                no embedding for a token id.
        """
        return self._encode(encode, row, prompt, completion, tools, chat_template_kwargs) or Encoded([], False)

    def locate(
        self, row: int, prompt: Prompt, completion: Completion, tools: Any, chat_template_kwargs: Any
    ) -> Located:
        """The same ids, with the characters of the completion that each token covers. Raises [`DataError`]."""
        return self._encode(encode_with_offsets, row, prompt, completion, tools, chat_template_kwargs) or NOTHING

    def _encode(
        self, function: Callable, row: int, prompt: Prompt, completion: Completion, tools: Any, template: Any
    ) -> Any:
        """Check the row and encode it with `function`; `None` if it has no text."""
        checks = RowChecks(row, "scored")
        prompt = checks.prompt(prompt, "prompts")
        if not _is_empty(completion):
            _, prompt = checks.one_kind(prompt, [completion], ["completions"])
        elif prompt is None and isinstance(completion, (list, tuple)):
            return None
        try:
            encoded = function(
                self.tokenizer,
                prompt,
                completion,
                self.tokenization,
                tools=tools,
                chat_template_kwargs=template,
                max_length=self.max_length,
            )
        except Exception as error:  # a tokenizer or chat template may raise anything; the error must name the row
            raise row_error(
                row,
                f"a row on which tokenizing fails with {type(error).__name__}: {error}",
                "one that the tokenizer and its chat template accept",
                "Correct the row, or pass a tokenizer that fits it (for messages, one with a chat template).",
            ) from error
        if self.max_positions is not None and len(encoded.ids) > self.max_positions:
            raise row_error(
                row,
                f"{len(encoded.ids)} tokens",
                f"at most {self.max_positions}, which is all that the model (or its server) takes",
                f"Pass max_length={self.max_positions} or less to cut long rows.",
            )
        largest = max(encoded.ids, default=0)
        if largest >= self.vocab_size:
            raise row_error(row, *unknown_token(largest, self.vocab_size, self.tokenizer))
        return encoded


def row_error(row: int, found: str, needed: str, fix: str) -> DataError:
    """A `DataError` for row number `row` of the rows that are scored."""
    return DataError(found, needed, fix, row=row, column="completions", dataset="scored")


def _is_empty(completion: Completion) -> bool:
    """Whether a completion is an empty text or ends in an empty message, as a policy may generate.

    ```python
    >>> _is_empty([{"role": "assistant", "content": ""}])
    True
    ```
    """
    if isinstance(completion, (list, tuple)) and completion and isinstance(completion[-1], dict):
        completion = completion[-1]
    if isinstance(completion, dict):
        return not content_text(completion.get("content")) and not completion.get("tool_calls")
    return isinstance(completion, (str, list, tuple)) and not completion
