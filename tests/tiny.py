"""Tiny tokenizers, configs, checkpoints and rows, all made in code: nothing here is downloaded.

Tokenizers come from `tests.tiny_tokenizers` and are offered here too. Knows nothing of trl_ext.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.tiny_tokenizers import TOKENIZER_KINDS, tiny_tokenizer


__all__ = [
    "DECODER_FAMILIES",
    "ENCODER_FAMILIES",
    "TOKENIZER_KINDS",
    "pair_rows",
    "ranked_rows",
    "save_tiny_model",
    "tiny_config",
    "tiny_tokenizer",
    "tokenizer_kind",
]

DECODER_FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
)
ENCODER_FAMILIES = ("bert", "roberta", "deberta-v2", "modernbert")


def tokenizer_kind(family: str) -> str:
    """The tokenizer kind that goes with a model family."""
    known = {
        "qwen2": "qwen",
        "qwen3": "qwen",
        "qwen3_moe": "qwen",
        "mistral": "mistral",
        "mixtral": "mistral",
        "phi3": "mistral",
        "gemma2": "gemma",
        "gemma3_text": "gemma",
        "gpt2": "gpt2",
        "opt": "gpt2",
        "olmo2": "gpt2",
    }
    return "bert" if family in ENCODER_FAMILIES else known.get(family, "llama")


def tiny_config(family: str, vocab_size: int, **kwargs: Any) -> PretrainedConfig:
    """A two-layer config of hidden size 32; `kwargs` override anything."""
    if family not in (*DECODER_FAMILIES, *ENCODER_FAMILIES):
        raise ValueError(f"unknown family {family!r}; known: {[*DECODER_FAMILIES, *ENCODER_FAMILIES]}")
    base: dict[str, Any] = dict(vocab_size=vocab_size, initializer_range=0.1, pad_token_id=None)
    base |= dict(bos_token_id=None, eos_token_id=None)
    if family == "gpt2":
        base |= dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
    elif family == "opt":
        base |= dict(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
            init_std=0.1,
        )
    else:
        base |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        base |= dict(max_position_embeddings=514 if family == "roberta" else 512)
    if family in DECODER_FAMILIES and family not in ("gpt2", "opt"):
        base |= dict(num_key_value_heads=2, head_dim=8)
    if family == "qwen2":
        del base["head_dim"]
    if family in ("gemma2", "gemma3_text"):
        base |= dict(sliding_window=64, query_pre_attn_scalar=8)
    if family == "mixtral":
        base |= dict(num_local_experts=4, num_experts_per_tok=2)
    if family == "qwen3_moe":
        base |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    if family in ENCODER_FAMILIES:
        base |= dict(pad_token_id=1 if family == "roberta" else 0)
    if family == "deberta-v2":
        base |= dict(
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            position_buckets=32,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pooler_hidden_size=32,
            type_vocab_size=0,
        )
    if family == "modernbert":
        base |= dict(local_attention=64, cls_token_id=2, sep_token_id=3)
    return AutoConfig.for_model(family, **(base | kwargs))


def save_tiny_model(
    path: str | Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    causal: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_kwargs: Any,
) -> Path:
    """Save a random checkpoint and its tokenizer to the folder `path`, and return it as a `Path`.

    A language model (causal for decoders, masked for encoders), so that `AutoModelForSequenceClassification` finds no
    head in it; with ``causal=False`` the bare base model.
    """
    path = Path(path)
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer(tokenizer_kind(family))
    ids = {
        name: value
        for name, value in (
            ("pad_token_id", tokenizer.pad_token_id),
            ("bos_token_id", tokenizer.bos_token_id),
            ("eos_token_id", tokenizer.eos_token_id),
        )
        if value is not None and not (family == "roberta" and name == "pad_token_id")
    }
    config = tiny_config(family, len(tokenizer), **(ids | config_kwargs))
    language = AutoModelForMaskedLM if family in ENCODER_FAMILIES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (language if causal else AutoModel).from_config(config).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


_TOPICS = ("apples", "the weather", "a short line", "the city", "counting to 12", "the question", "snow", "a test")
_GOOD = ("good", "clear", "correct", "kind")
_BAD = ("bad", "vague", "wrong", "rude")
_SLOTS = 4


def _answer(rng: random.Random, good: int) -> str:
    """A sentence of four words, `good` of them good and the rest bad, in random order."""
    words = [rng.choice(_GOOD) for _ in range(good)] + [rng.choice(_BAD) for _ in range(_SLOTS - good)]
    rng.shuffle(words)
    return " " + " ".join(words) + "."


def _ask(rng: random.Random) -> str:
    return f"Question: tell me about {rng.choice(_TOPICS)} {rng.randrange(100)}. Answer:"


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair_rows(n: int, chat: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """`n` preference rows (`prompt`, `chosen`, `rejected`) in which the chosen answer has more good words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        bad, good = sorted(rng.sample(range(_SLOTS + 1), 2))
        prompt, chosen, rejected = _ask(rng), _answer(rng, good), _answer(rng, bad)
        if chat:
            rows.append({"prompt": _user(prompt), "chosen": _assistant(chosen), "rejected": _assistant(rejected)})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def ranked_rows(
    n: int,
    k: int = 4,
    ragged: bool = False,
    ties: bool = False,
    ranks: bool = False,
    chat: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`n` ranked rows (`prompt`, `completions`, `ratings` or `ranks`): the rating is the number of good words, 0 to 4.

    Args:
        k (`int`): candidates a row, 2 to 5 (any number with `ties`).
        ragged (`bool`): draw the number of candidates from 2 to `k` for each row.
        ties (`bool`): draw ratings with replacement (a row may come out fully tied).
        ranks (`bool`): give `ranks` (0 = best, ties share) in place of `ratings`.
        chat (`bool`): messages in place of strings.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        size = rng.randint(2, k) if ragged else k
        levels = range(_SLOTS + 1)
        good = rng.choices(levels, k=size) if ties else rng.sample(levels, size)
        prompt, answers = _ask(rng), [_answer(rng, g) for g in good]
        row: dict[str, Any] = {"prompt": _user(prompt) if chat else prompt}
        row["completions"] = [_assistant(a) if chat else a for a in answers]
        if ranks:
            row["ranks"] = [sorted(good, reverse=True).index(g) for g in good]
        else:
            row["ratings"] = [float(g) for g in good]
        rows.append(row)
    return rows
