"""Reward models of every kind on one base that a real vLLM can run: folders as our trainers save them, with probes."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer

from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models import Sidecar, add_adapter, build_reward_model
from trl_ext.models.loading import describe_base, save_sidecar
from trl_ext.models.sidecar import make_probes, probe_scores, vocab_size


# vLLM's attention wants heads of 64.
SHAPE = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, head_dim=64)
TOKEN_KINDS = {
    "outcome": dict(num_labels=1, label_meaning="log-odds that the answer is right", loss_type="bce"),
    "process": dict(num_labels=2, outputs_per_category=2, loss_type="ce", step_separator="\n"),
    "segment": dict(num_labels=2, categories=["truth", "style"], label_meaning="higher is better", loss_type="mse"),
}


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A language model to train reward models on."""
    return save_tiny_model(folder, tokenizer=tiny_tokenizer("llama", pad="dedicated"), dtype=dtype, **SHAPE)


def save_reward(
    base: Path,
    folder: Path,
    *,
    seed: int,
    kind: str = "scalar",
    lora: LoraConfig | None = None,
    normalizer: dict[str, float] | None = None,
    dtype: str = "float32",
) -> Path:
    """Save a reward model with random weights as a trainer saves it; an adapter if `lora` is given."""
    described = TOKEN_KINDS.get(kind, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, head = build_reward_model(str(base), num_labels=described.get("num_labels", 1), dtype=dtype)
        if lora is not None:
            model = add_adapter(model, lora, head)
        for name, parameter in model.named_parameters():
            if "score" in name:
                nn.init.normal_(parameter, std=0.1)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = make_probes(vocab_size(model))
    sidecar = Sidecar(
        base=describe_base(model),
        is_adapter=isinstance(model, PeftModel),
        head_modules=head,
        token_policy=TokenizationSettings.for_training(tokenizer).to_dict(),
        kind=kind,
        normalizer=normalizer,
        probes={"input_ids": ids, "scores": probe_scores(model, ids)},
        **described,
    )
    save_sidecar(model, sidecar, folder)
    return folder
