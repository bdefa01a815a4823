"""Makes the inputs of `trl-ext bench fit`: rows of given lengths for each trainer, and a model with random weights.

The values of weights and tokens affect neither memory nor time. This module knows rows, collators and files. It runs
nothing.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.synthetic import FIRST_WORD, VOCABULARY, random_words, words_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset
    from torch import dtype
    from transformers import PretrainedConfig

SHARD_BYTES = 4 * 2**30
SEPARATOR = f" w{FIRST_WORD}"
"""Text after each step of a solution: a word of the tokenizer."""
STEPS_OF_A_SOLUTION = 4


@dataclass(frozen=True)
class Sizes:
    """
    Lengths of the rows, in tokens.

    Args:
        prompt (`int`), completion (`int`): lengths in every row. The completion includes a final EOS.
        candidates (`int`): candidates of a group, or answers to a question that are kept together.
        rows (`int`): groups or rows in a micro-batch.
        words (`int`): number of different tokens.
    """

    prompt: int
    completion: int
    candidates: int
    rows: int
    words: int = VOCABULARY

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class PolicySizes(Sizes):
    """
    Sizes of a policy's step: `rows` are the completions of a micro-batch, and `candidates` those of a prompt.

    Args:
        generated (`int`): completions that are generated and scored at one time.
    """

    generated: int = 0


def rows_for(command: str, sizes: Sizes, number: int, categories: list[str] | None = None, seed: int = 0) -> "Dataset":
    """Make `number` rows of the type that the trainer of a command reads."""
    from datasets import Dataset

    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, sizes.words) for _ in range(length)]

    def text(length: int) -> str:
        return random_words(length, sizes.words, rng)

    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        if command in ("reward", "ensemble"):
            rows.append(_group(ids, rng, sizes))
            continue
        prompt = text(sizes.prompt)
        for _ in range(sizes.candidates):
            rows.append({"prompt": prompt, **_answer(command, text, sizes, categories)})
    return Dataset.from_list(rows[:number])


def _group(ids: Any, rng: random.Random, sizes: Sizes) -> dict[str, Any]:
    """A tokenized ranking. The last candidate is one token shorter, so that padded rows contain padding."""
    prompt, first = ids(sizes.prompt), rng.sample(range(FIRST_WORD, sizes.words), sizes.candidates)
    candidates = [[*prompt, own, *ids(sizes.completion - 1)] for own in first]
    candidates[-1] = candidates[-1][:-1] if sizes.completion > 1 else candidates[-1]
    return {"candidate_ids": candidates, "ratings": [float(-k) for k in range(sizes.candidates)]}


def _answer(command: str, text: Any, sizes: Sizes, categories: list[str] | None) -> dict[str, Any]:
    if command == "orm":
        return {"completion": f" {text(sizes.completion - 1)}", "label": True}
    if command == "prm":
        length = max(1, sizes.completion // STEPS_OF_A_SOLUTION - 1)  # the separator is a token
        steps = [f" {text(length)}" for _ in range(STEPS_OF_A_SOLUTION)]
        return {"completions": steps, "labels": [True] * STEPS_OF_A_SOLUTION}
    completion = f" {text(sizes.completion)}"
    named = [{"category": name} for name in categories] if categories else [{}]
    return {
        "completion": completion,
        "segments": [{"start": 1, "end": len(completion), "label": 1, **more} for more in named],
    }


def batch_for(command: str, sizes: Sizes, flat: bool, multiple: int | None = None, members: int = 1) -> dict[str, Any]:
    """One micro-batch, made by the trainer's collator. It has `members` times as many groups."""
    from trl_ext.data.collators import GroupCollator, SpanCollator

    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, sizes.words) for _ in range(length)]

    if command in ("reward", "ensemble"):
        rows = []
        for number in range(sizes.rows * members):
            group = _group(ids, rng, sizes)
            ratings = group.pop("ratings")
            rows.append({**group, "candidate_ratings": ratings, "row_index": number})
        return GroupCollator(0, multiple, flat)(rows)
    rows = []
    while len(rows) < sizes.rows:
        prompt = ids(sizes.prompt)
        for _ in range(sizes.candidates):
            labels = {"label_positions": [sizes.length - 1], "label_values": [1.0], "label_categories": [0]}
            own = {"span_input_ids": [*prompt, *ids(sizes.completion)], "completion_start": sizes.prompt}
            rows.append({**own, **labels, "label_steps": [0], "row_index": len(rows)})
    return SpanCollator(0, 1, multiple, flat)(rows[: sizes.rows])


def write_random_model(
    folder: Path, config: "PretrainedConfig", dtype: "dtype", words: int, seed: int = 0, language: bool = False
) -> None:
    """
    Write a checkpoint in files of up to 4 GiB, and a tokenizer with `words` tokens.

    The model has no head, or that of a `language` model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM

    tokenizer = words_tokenizer(words)
    tokenizer.save_pretrained(folder)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    with torch.device("meta"):
        model = (AutoModelForCausalLM if language else AutoModel).from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    places, size = {}, 0
    for number, names in enumerate(_shards(model.state_dict())):
        tensors = {}
        for name, like in names.items():
            new = torch.ones(like.shape, dtype=dtype, device=device)
            tensors[name] = (new.normal_(0.0, 0.02, generator=generator) if like.dim() > 1 else new).cpu()
            size += like.numel() * like.element_size()
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    shard, size = {}, 0
    for name, tensor in state.items():
        own = math.prod(tensor.shape) * tensor.element_size()
        if shard and size + own > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += own
    yield shard
