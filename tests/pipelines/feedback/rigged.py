"""Judges whose label probabilities are known: a tiny model with a rigged head, and a function that plants a bias.

The tokenizer knows bytes. The head reads one channel that is the same for every token, so the next-token distribution
is the same after every prompt; or it reads nothing, and the answer depends on the text through a function.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny_model, tiny_tokenizer


def rigged_model(folder: Path, logits: dict[str, float], chat: bool = True) -> Any:
    """A model whose next token has these logits, by text of the token, after every prompt; all others have 0."""
    save_tiny_model(folder, tokenizer=tiny_tokenizer("llama", chat=chat))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # the final norm gives the same vector at every place: its weight is 0, and the head has a bias
    head = model.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        biased.weight.zero_()
        biased.bias.zero_()
        for text, value in logits.items():
            (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            biased.bias[token] = value
    model.set_output_embeddings(biased)
    return model, tokenizer


def shown_texts(chat: list[dict[str, str]]) -> list[str]:
    """The texts of the completions that a question of the package's templates shows, in their order."""
    return re.findall(r"### Answer(?: \w+)?\n(.*?)(?=\n\n###)", chat[-1]["content"], re.DOTALL)


def biased_judge(quality: Any, bias: float) -> Any:
    """A function that compares by the difference in quality, with `bias` added to the log-odds of the first place."""

    def judge(chats: list[list[dict[str, str]]]) -> list[dict[str, float]]:
        answers = []
        for chat in chats:
            first, second = map(quality, shown_texts(chat))
            chance = 1 / (1 + math.exp(-(first - second + bias)))
            answers.append({"A": chance, "B": 1 - chance})
        return answers

    return judge
