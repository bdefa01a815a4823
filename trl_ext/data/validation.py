"""Checks single values of a row. Each error names the row, the column, what was found and what to do.

Knows the valid forms of a text, a message, a rating and a margin. Knows nothing of data sets.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from jinja2 import TemplateError

from trl_ext.data.chat_templates import Completion, Prompt, content_text


Kind = Literal["text", "chat"]


class DataError(ValueError):
    """A row that cannot be used, or a whole data set (``row=None``).

    Args:
        found (`str`): what the data has.
        needed (`str`): what the data must have instead.
        fix (`str`): what the user can do about it.
        row (`int`, *optional*): index of the row in the data set, counted from 0.
        column (`str`, *optional*): name of the column.
        dataset (`str`, *optional*): name of the data set ("train", "eval").
        reader (`str`, *optional*): who counted the row, where several readers share a stream and each counts from 0.
    """

    def __init__(
        self,
        found: str,
        needed: str,
        fix: str,
        row: int | None = None,
        column: str | None = None,
        dataset: str | None = None,
        reader: str | None = None,
    ):
        self.found, self.needed, self.fix = found, needed, fix
        self.row, self.column, self.dataset, self.reader = row, column, dataset, reader
        place = f"{dataset} data" if dataset else "data"
        if row is not None:
            place += f", row {row}" + (f" as counted by {reader}" if reader else "")
        if column is not None:
            place += f", column {column!r}"
        super().__init__(f"{place}: found {found}; needed {needed}. {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes pickle exceptions. By default, pickle rebuilds them from `args`, which hold the message.
        return type(self), (self.found, self.needed, self.fix, self.row, self.column, self.dataset, self.reader)


def unknown_token(token_id: int, vocab_size: int, tokenizer: Any = None) -> tuple[str, str, str]:
    """`found`, `needed` and `fix` of the error for a token that has no embedding in the model."""
    token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token_id)!r})"
    return (
        f"the token id {token_id}{token}",
        f"ids below {vocab_size}, the model's vocabulary",
        "The tokenizer knows a token that the model does not. Pass the model's tokenizer as `processing_class`, or "
        "call `model.resize_token_embeddings(len(tokenizer))` before training and pass the model.",
    )


def shown(value: Any) -> str:
    """A value with its type, cut to a readable length."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "None" if value is None else f"{type(value).__name__} {text}"


class RowChecks:
    """
    The checks for one row. It keeps the row's index, so that each error can name the row.

    Args:
        row (`int`): index of the row, from 0.
        dataset (`str`): name of the data set.
        vocab_size (`int`, *optional*): size of the model's vocabulary. Without it, token ids are not checked against
            the model.
    """

    def __init__(self, row: int, dataset: str, vocab_size: int | None = None):
        self.row = row
        self.dataset = dataset
        self.vocab_size = vocab_size

    def error(self, column: str, found: str, needed: str, fix: str) -> DataError:
        """A `DataError` at this row."""
        return DataError(found, needed, fix, row=self.row, column=column, dataset=self.dataset)

    @contextmanager
    def tokenizing(self, column: str, kind: Kind | None) -> Iterator[None]:
        """Turns an error of the tokenizer or the chat template into a `DataError` at this row."""
        try:
            yield
        except DataError:
            raise
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise self.error(
                column,
                f"a {kind} row on which the tokenizer fails with {type(error).__name__}: {error}",
                "a row that the tokenizer and its chat template accept",
                "Correct or remove the row, or give another chat template (chat_template_path).",
            ) from error

    def number(self, value: Any, column: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
        """A finite number in [minimum, maximum], as a float. A bool counts as 0 or 1."""
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or not minimum <= value <= maximum:
            needed = "a finite number"
            if minimum > -math.inf:
                needed += f" >= {minimum:g}" if maximum == math.inf else f" from {minimum:g} to {maximum:g}"
            raise self.error(column, shown(value), needed, "Correct the value, or remove the row or the column.")
        return float(value)

    def number_list(self, values: Any, column: str, length: int) -> list[float]:
        """`length` finite numbers, as floats."""
        return [self.number(value, column) for value in self._list(values, column, length)]

    def ranks(self, values: Any, column: str, length: int) -> list[float]:
        """Turns `length` ranks (whole, >= 0, lower is better, equal is a tie) into ratings: the negative ranks."""
        for value in self._list(values, column, length):
            whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            if not whole or value < 0 or value != int(value):
                raise self.error(
                    column,
                    shown(value),
                    "a whole number >= 0 (0 is best, equal ranks are a tie)",
                    "Correct the rank. If higher numbers are better, put them into a column 'ratings'.",
                )
        return [0.0 - float(value) for value in values]

    def _list(self, values: Any, column: str, length: int) -> Sequence[Any]:
        if not isinstance(values, (list, tuple)):
            raise self.error(column, shown(values), f"a list of {length} numbers", "Give one number per completion.")
        if len(values) != length:
            raise self.error(
                column, f"{len(values)} values", f"{length}, one per completion", "Give one number per completion."
            )
        return values

    def token_ids(self, value: Any, column: str) -> list[int]:
        """A non-empty list of token ids."""
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(isinstance(item, int) and item >= 0 for item in value)
        ):
            raise self.error(column, shown(value), "a non-empty list of token ids", "Tokenize the row again.")
        if self.vocab_size is not None and max(value) >= self.vocab_size:
            found, needed, _ = unknown_token(max(value), self.vocab_size)
            raise self.error(column, found, needed, "Tokenize the rows with the tokenizer of this model.")
        return list(value)

    def known_ids(self, ids: Sequence[int], column: str, tokenizer: Any) -> None:
        """Raise [`DataError`] if the tokenizer made a token id that the model has no embedding for."""
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            raise self.error(column, *unknown_token(max(ids), self.vocab_size, tokenizer))

    def candidate_list(self, value: Any, column: str) -> list[Any]:
        """A list of at least two candidates."""
        if not isinstance(value, (list, tuple)):
            raise self.error(
                column, shown(value), "a list of completions", "Put the completions of a row into a list."
            )
        if len(value) < 2:
            raise self.error(
                column,
                f"{len(value)} completion(s)",
                "at least 2 to rank",
                f"Remove such rows: dataset.filter(lambda row: len(row[{column!r}]) > 1).",
            )
        return list(value)

    def prompt(self, value: Any, column: str = "prompt") -> Prompt:
        """A text, a list of messages, or ``None``; an empty prompt is returned as ``None``."""
        if value is None or (isinstance(value, (str, list, tuple)) and len(value) == 0):
            return None
        if isinstance(value, str):
            return value
        self._messages(value, column)
        return list(value)

    def completion(self, value: Any, column: str) -> Kind:
        """Check one completion (a text, a message or a list of messages). Returns its kind."""
        if isinstance(value, str):
            if not value:
                raise self._empty(column, "an empty string")
            return "text"
        messages = [value] if isinstance(value, dict) else value
        if isinstance(messages, (list, tuple)) and not messages:
            raise self._empty(column, "an empty list")
        self._messages(messages, column)
        last = messages[-1]
        if not content_text(last.get("content")) and not last.get("tool_calls"):
            raise self._empty(column, f"an empty {last['role']} message")
        return "chat"

    def _empty(self, column: str, found: str) -> DataError:
        return self.error(
            column, found, "a completion with at least one character", "Remove such rows with dataset.filter."
        )

    def _messages(self, value: Any, column: str) -> None:
        needed = "a string, or a list of messages {'role': ..., 'content': ...}"
        if not isinstance(value, (list, tuple)):
            raise self.error(column, shown(value), needed, "Convert the value or remove the row.")
        for message in value:
            if not isinstance(message, dict):
                raise self.error(
                    column,
                    f"a list that holds {shown(message)}",
                    needed,
                    "Give one string, or make each item a message. Several completions go into 'completions'.",
                )
            if not isinstance(message.get("role"), str):
                raise self.error(column, f"the message {shown(message)}", "a 'role' in it", "Add the role.")
            if message.get("content") is None and not message.get("tool_calls"):
                raise self.error(
                    column, f"the message {shown(message)}", "a 'content' (or 'tool_calls') in it", "Add the content."
                )
            if message.get("content") is not None and content_text(message["content"]) is None:
                raise self.error(
                    column,
                    f"a message with the content {shown(message['content'])}",
                    "a string, or a list of parts {'type': 'text', 'text': ...}",
                    "Remove parts that are not text (images, audio): the model does not see them.",
                )

    def one_kind(
        self, prompt: Prompt, completions: Sequence[Completion], columns: Sequence[str]
    ) -> tuple[Kind, Prompt]:
        """Check that prompt and completions go together. Returns the kind of the row and its prompt.

        Completions after a chat prompt may be strings. A text prompt with chat completions is valid only if all of the
        completions contain it, as in some public data sets. Then it is not added again.
        """
        kinds = [self.completion(value, column) for value, column in zip(completions, columns, strict=True)]
        for kind, value, column in zip(kinds, completions, columns, strict=True):
            if kind != kinds[0]:
                raise self.error(
                    column,
                    f"{shown(value)} beside a completion that is {'text' if kinds[0] == 'text' else 'messages'}",
                    "completions of one kind, all text or all messages",
                    "Convert the row to one kind.",
                )
        if isinstance(prompt, str) and kinds[0] == "chat":
            for value, column in zip(completions, columns, strict=True):
                earlier = [] if isinstance(value, dict) else value[:-1]
                if not any(message.get("content") == prompt for message in earlier):
                    raise self.error(
                        "prompt",
                        f"a text, but the messages in {column!r} do not contain it",
                        "prompt and completions of one kind",
                        "Make the prompt a list of messages: [{'role': 'user', 'content': prompt}].",
                    )
            return "chat", None
        chat = kinds[0] == "chat" or (prompt is not None and not isinstance(prompt, str))
        return ("chat" if chat else "text"), prompt


def named_by_row(
    function: Callable[[list[Any]], list[Any]],
    groups: Sequence[list[Any]],
    checks: Sequence[RowChecks],
    column: str,
    kind: Kind | None,
) -> list[list[Any]]:
    """Calls `function`, which tokenizes a list of items, once for all rows. Returns its results row by row.

    If the call fails, `function` is called again for each row, so that the error names the row.

    Args:
        groups (sequence of lists): the items of each row.
        checks (sequence of [`RowChecks`]): the checks of each row.
        column (`str`): the column that the error names.
        kind (`str`, *optional*): the kind of the rows, "text" or "chat".

    Raises:
        [`DataError`]: the tokenizer or the chat template fails on a row.
    """
    try:
        made = function([item for group in groups for item in group])
    except Exception:
        made = []
        for group, row_checks in zip(groups, checks, strict=True):
            with row_checks.tokenizing(column, kind):
                made += function(group)
    in_order = iter(made)
    return [[next(in_order) for _ in group] for group in groups]
