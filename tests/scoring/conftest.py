"""Tiny reward models on disk: a random backbone with a random head, its tokenizer and its sidecar."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.tiny import save_tiny_model, tiny_tokenizer, tokenizer_kind
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models import Sidecar, add_adapter, build_reward_model
from trl_ext.models.loading import describe_base


def save_reward_model(
    folder: Path, family: str = "llama", sidecar: bool = True, lora: bool = False, pad: str | None = "dedicated"
) -> Path:
    """Save a reward model to `folder / "reward"` (and its base to `folder / "base"`), and return that path."""
    base = save_tiny_model(folder / "base", family, tokenizer=tiny_tokenizer(tokenizer_kind(family), pad=pad))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, head = build_reward_model(str(base))
        if lora:
            model = add_adapter(
                model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), head
            )
        for name, parameter in model.named_parameters():
            # scores of about one unit at most, so that 1e-6 is above their rounding
            if "score" in name or "classifier" in name:
                torch.nn.init.normal_(parameter, std=0.1 if "score" in name else 0.2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    path = folder / "reward"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if sidecar:
        tokenization = TokenizationSettings.for_training(tokenizer).to_dict()
        Sidecar(base=describe_base(model), is_adapter=lora, head_modules=head, token_policy=tokenization).save(path)
    return path


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory) -> Callable[..., Path]:
    """`reward_path("llama", lora=True)` -> a folder that is shared by all tests: do not write to it."""
    made: dict[tuple, Path] = {}

    def get(family: str = "llama", **options) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = save_reward_model(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return get
