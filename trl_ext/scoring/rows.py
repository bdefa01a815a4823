"""One row to be scored -> its token ids, or an error that names it.

Checks as training does and makes ids by the same function, `trl_ext.data.tokenization.encode`. Knows nothing of models
beyond how many ids and positions they have.
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
    Makes token ids of rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        tokenization (`TokenizationSettings`): how the model was trained to see plain text.
        vocab_size (`int`): token ids the model knows.
        max_positions (`int` or `None`): longest row the model can take at all.
        max_length (`int` or `None`): longer rows are cut.
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
        Token ids of row number `row`, empty where there is nothing to score.

        Raises:
            [`DataError`]: values of the wrong kind, something the tokenizer or chat template refuses, or ids that the
                model does not have.
        """
        return self._encode(encode, row, prompt, completion, tools, chat_template_kwargs) or Encoded([], False)

    def locate(
        self, row: int, prompt: Prompt, completion: Completion, tools: Any, chat_template_kwargs: Any
    ) -> Located:
        """The same ids, with the characters of the completion that each token holds. Raises [`DataError`]."""
        return self._encode(encode_with_offsets, row, prompt, completion, tools, chat_template_kwargs) or NOTHING

    def _encode(
        self, function: Callable, row: int, prompt: Prompt, completion: Completion, tools: Any, template: Any
    ) -> Any:
        """What `function` makes of the row, checked; `None` where there is nothing."""
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
        except Exception as error:  # whatever a tokenizer or a chat template raises, the row is named
            raise row_error(
                row,
                f"a row on which tokenizing fails with {type(error).__name__}: {error}",
                "one that the tokenizer and its chat template accept",
                "Correct the row, or give the tokenizer (with a chat template, for messages) that fits it.",
            ) from error
        if self.max_positions is not None and len(encoded.ids) > self.max_positions:
            raise row_error(
                row,
                f"{len(encoded.ids)} tokens",
                f"at most {self.max_positions}, all the positions the model has",
                f"Pass max_length={self.max_positions} or less to cut long rows.",
            )
        largest = max(encoded.ids, default=0)
        if largest >= self.vocab_size:
            raise row_error(row, *unknown_token(largest, self.vocab_size, self.tokenizer))
        return encoded


def row_error(row: int, found: str, needed: str, fix: str) -> DataError:
    """A `DataError` at row number `row` of what is being scored."""
    return DataError(found, needed, fix, row=row, column="completions", dataset="scored")


def _is_empty(completion: Completion) -> bool:
    """Whether a completion is an empty text or ends in an empty message: a policy may well produce that.

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
