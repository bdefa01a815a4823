"""Turns rows with labelled tokens into tensors, and adds tensors that only the evaluation uses.

It knows prepared rows and their original columns. `trl_ext.data.collators` makes the tensors of the labels.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from trl_ext.data.collators import SpanCollator
from trl_ext.data.span_rows import SpanKind


def question_number(prompt: Any) -> int:
    """A number in [-2^63, 2^63) for a prompt (text or messages), the same in every process and run."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


@dataclass
class TokenRewardCollator:
    """
    What [`SpanCollator`] returns, followed by

    - for `"outcome"` rows: `question` (B,) int64, a number that is equal for rows with the same prompt;
    - for `"stepwise"` rows: `unannotated_steps` (B, S) bool, True for a step whose label is on no token: the label is
      null, was cut off, or contradicts the label of another step on the same token. (If two steps share a token and
      their labels agree, both count as annotated, but for the end of a completion that was cut.)

    Rows without the needed column (`prompt` or `labels`) do not get the tensor.

    Args:
        spans ([`SpanCollator`]): collates the rows.
        kind (`str`): `"outcome"`, `"stepwise"` or `"segment"`.
        max_completion_length (`int`, *optional*): after how many tokens completions were cut.

    Example:

    ```python
    >>> batch = TokenRewardCollator(SpanCollator(pad_token_id=0), "stepwise")(prepared_rows)
    >>> batch["unannotated_steps"]
    tensor([[False, False, True], [False, True, False]])
    ```
    """

    spans: SpanCollator
    kind: SpanKind
    max_completion_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.spans(rows)
        if self.kind == "outcome" and "prompt" in rows[0]:
            batch["question"] = torch.tensor([question_number(row["prompt"]) for row in rows])  # (B,)
        if self.kind == "stepwise" and "labels" in rows[0]:
            width = max(len(row["labels"]) for row in rows)
            missing = torch.zeros(len(rows), width, dtype=torch.bool)  # (B, S)
            for number, row in enumerate(rows):
                shown, before = set(row["label_steps"]), None  # before: the last label that is shown
                end = max(shown, default=-1) if self._may_be_cut(row) else len(row["labels"])
                for step, label in enumerate(row["labels"]):
                    if step in shown:
                        before = label
                    else:
                        missing[number, step] = label is None or label != before or step > end
            batch["unannotated_steps"] = missing
        return batch

    def _may_be_cut(self, row: dict[str, Any]) -> bool:
        """Whether a completion is as long as those that were cut."""
        length = len(row["span_input_ids"]) - row["completion_start"]
        return self.max_completion_length is not None and length >= self.max_completion_length
