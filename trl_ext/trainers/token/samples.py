"""The sample table of an evaluation: completions as text, with the score of each labelled span after it.

It knows token ids, a tokenizer and scores. It knows nothing of models, or of where tables go.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase


COLUMNS = ["row", "prompt", "completion", "scores", "labels"]

_READ = ["token_labels", "label_mask", "label_steps", "completion_start", "row_index", "input_ids", "attention_mask"]

MOST_SCORES = 8192
"""The histogram keeps only this many scores, the first ones. It bounds the memory."""


@dataclass
class SampleTable:
    """
    Keeps the first rows of an evaluation, and its first scores.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns ids into text.
        size (`int`): number of rows of the table.
        categories (`list[str]`): names that stand before the scores. An empty name is not shown.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    categories: list[str]
    rows: list[list] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """
        Take a batch.

        Args:
            scores (`torch.Tensor` of shape `(B, T, G)`): score of every token.
            batch (`dict`): what `TokenRewardCollator` returns.
        """
        room = MOST_SCORES - len(self.scores)
        if room > 0:
            self.scores.extend(scores[batch["label_mask"]][:room].tolist())
        for number in range(min(len(scores), self.size - len(self.rows))):
            self.rows.append(self._row(scores[number].cpu(), {name: batch[name][number].cpu() for name in _READ}))

    def _row(self, scores: torch.Tensor, row: dict[str, torch.Tensor]) -> list:
        ids = row["input_ids"][: int(row["attention_mask"].sum())].tolist()
        start = int(row["completion_start"])
        text, values, labels, cut = "", [], [], start
        for token, category in last_of_spans(row["label_mask"], row["label_steps"]):
            score = scores[token, category].item()
            name = self.categories[category]
            text += self.tokenizer.decode(ids[cut : token + 1]) + f"[{f'{name} ' if name else ''}{score:+.2f}]"
            values.append(score)
            labels.append(row["token_labels"][token, category].item())
            cut = max(cut, token + 1)
        text += self.tokenizer.decode(ids[cut:])
        return [int(row["row_index"]), self.tokenizer.decode(ids[:start]), text, str(values), str(labels)]


def last_of_spans(mask: torch.Tensor, steps: torch.Tensor) -> list[tuple[int, int]]:
    """Token and category of the last labelled token of each span, in the order of the text; mask, steps (T, G)."""
    last = {(category, int(steps[token, category])): (token, category) for token, category in mask.nonzero().tolist()}
    return sorted(last.values())
