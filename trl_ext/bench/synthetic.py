"""Synthetic work for the benchmarks: tokenized groups, labelled rows, tokenizers, and models with random weights.

It knows rows, tokenizers and model files. It does not know what a benchmark measures.
"""

import argparse
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trl_ext.bench.runner import dtype_of


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 4096
FIRST_WORD = 3  # 0, 1, 2 are pad, bos and eos
SPAN = 16  # tokens of a step or segment
CHAT_TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"


def random_words(length: int, words: int, rng: random.Random) -> str:
    """Random text of `length` words of [`words_tokenizer`] with token ids below `words`; each word is one token."""
    return " ".join(f"w{rng.randrange(FIRST_WORD, words)}" for _ in range(length))


def synthetic_groups(number: int, prompt: int, completion: int, candidates: int, seed: int = 0) -> "Dataset":
    """
    Make `number` tokenized rankings: a random prompt of `prompt` tokens with `candidates` completions of `completion`.

    The completions' first tokens differ, so the candidates share exactly the prompt.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def words(length: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]

    rows = []
    for _ in range(number):
        shared, first = words(prompt), rng.sample(range(FIRST_WORD, VOCABULARY), candidates)
        ids = [[*shared, own, *words(completion - 1)] for own in first]
        rows.append({"candidate_ids": ids, "ratings": [float(candidates - k) for k in range(candidates)]})
    return Dataset.from_list(rows)


def labelled_rows(kind: str, prompts: int, p: int, c: int, k: int, seed: int = 0) -> "Dataset":
    """
    Make rows with random labels: for each prompt of `p` tokens, `k` completions of `c` tokens.

    `kind` is `"orm"`, `"prm"` or `"segment"`. For `"orm"`, EOS counts as one of the `c` tokens. A step or segment has
    `SPAN` tokens; the last one may be shorter.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def words(length: int) -> str:
        return " ".join(f"w{rng.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(length))

    def completion() -> dict[str, Any]:
        if kind == "orm":
            return {"completion": words(c - 1), "label": rng.random() < 0.5}
        parts = [words(min(SPAN, c - start)) for start in range(0, c, SPAN)]
        if kind == "prm":
            return {"completions": parts, "labels": [rng.random() < 0.5 for _ in parts]}
        starts = [sum(len(part) + 1 for part in parts[:n]) for n in range(len(parts))]
        segments = [
            {"start": start, "end": start + len(part), "score": rng.random()}
            for start, part in zip(starts, parts, strict=True)
        ]
        return {"completion": " ".join(parts), "segments": segments}

    questions = [f"{words(p)}\n" if p else "" for _ in range(prompts)]
    return Dataset.from_list([{"prompt": question, **completion()} for question in questions for _ in range(k)])


def words_tokenizer(size: int = VOCABULARY) -> "PreTrainedTokenizerBase":
    """A tokenizer with `size` token ids for texts of the words w3, w4, ...; each word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{n}": n for n in range(FIRST_WORD, size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(words)


def tokenizer_of(rows: "Dataset") -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer of up to 4,096 tokens, trained on the rows' texts, with a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    columns = [name for name in ("prompt", "chosen", "rejected", "completions") if name in rows.column_names]
    if not columns:
        raise ValueError(f"The rows have the columns {rows.column_names}; needed: one with text for the tokenizer.")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(_texts([rows[name] for name in columns]), trainer)
    return _wrapped(pieces)


def save_model(folder: str, args: argparse.Namespace, max_positions: int, tokenizer: Any) -> None:
    """Save a Llama-style language model with random weights, and its tokenizer, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), VOCABULARY),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    LlamaForCausalLM(config).to(torch.bfloat16 if dtype_of(args) == "bfloat16" else torch.float32).save_pretrained(
        folder
    )


def _wrapped(tokenizer: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in rows of texts or messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif value is not None:
        for item in value:
            yield from _texts(item)


def as_pair(row: dict[str, Any]) -> dict[str, list[int]]:
    """A group of two as the pair of token ids that trainers of pairs take."""
    ids = [ids for _, ids in sorted(zip(row["ratings"], row["candidate_ids"], strict=True), reverse=True)]
    return {"chosen_ids": ids[0], "rejected_ids": ids[1]}
