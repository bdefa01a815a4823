"""A policy whose chance of a right answer is known after every prefix: it writes lines of 0 and 1 and ends at random.

The next token depends on the last one alone. After the prompt and after a line break comes "1" or "0"; after a digit
comes a line break; after a line break the answer may also end. An answer is right if every line is "1".
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_ext.demo.model import tiny_tokenizer
from trl_ext.pipelines.generation.records import text_of


RIGHT, END = 0.8, 0.25  # probability of "1", and of an end after a line break
AFTER_A_LINE = END / (1 - (1 - END) * RIGHT)  # probability of a right answer after right lines: 0.625
AT_THE_START = RIGHT * AFTER_A_LINE


def save_lines_policy(folder: Path, template: str | None = None) -> Path:
    """Save the policy and its tokenizer, which knows bytes, with a chat template if one is given."""
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    one, zero, line = (tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[0] for text in ("1", "0", "\n"))
    chances = torch.full((len(tokenizer), len(tokenizer)), 1e-30)  # (next, last)
    chances[one], chances[zero] = RIGHT, 1 - RIGHT
    chances[[one, zero], line] *= 1 - END
    chances[tokenizer.eos_token_id, line] = END
    for digit in (one, zero):
        chances[:, digit] = 1e-30
        chances[line, digit] = 1.0
    size = 260
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()  # the layer adds nothing to the embedding of the last token
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, : len(tokenizer)] = chances.log() / math.sqrt(size)  # the norm multiplies by the root
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ones(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """The verifier: whether every line is "1"."""
    texts = [text_of(completion) for completion in completions]
    return [float(bool(text.strip()) and set(text.split()) == {"1"}) for text in texts]
