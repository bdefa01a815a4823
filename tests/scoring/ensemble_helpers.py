"""Members of ensembles on disk: random adapters with random heads on one tiny base, with sidecar and probes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from tests.models.helpers import tiny_base
from tests.tiny import ranked_rows
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models import Sidecar, add_adapter, build_reward_model
from trl_ext.models.loading import describe_base, save_sidecar
from trl_ext.models.sidecar import make_probes, probe_scores, vocab_size


def save_members(
    folder: Path,
    number: int = 3,
    quantization: BitsAndBytesConfig | None = None,
    family: str = "llama",
    more_tokens: int = 0,
    **fields: Any,
) -> list[Path]:
    """
    `number` adapters on the base in `folder / "base"`, after adding `more_tokens` to its vocabulary, each with
    embeddings of its own; `fields` are those of the sidecar.
    """
    base = folder / "base"
    if not base.exists():
        tiny_base(base, family)
    tokenizer = AutoTokenizer.from_pretrained(base)
    paths = []
    for member in range(number):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(10 + member)
            model, head = build_reward_model(
                str(base), quantization_config=quantization, num_labels=fields.get("num_labels", 1)
            )
            if more_tokens:
                model.resize_token_embeddings(vocab_size(model) + more_tokens, mean_resizing=False)
            model = add_adapter(
                model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), head
            )
            for name, parameter in model.named_parameters():
                if "score" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        path = folder / f"trained-{member}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        probes = make_probes(vocab_size(model))
        sidecar = Sidecar(
            base=describe_base(model),
            is_adapter=True,
            head_modules=head,
            token_policy=TokenizationSettings.for_training(tokenizer).to_dict(),
            probes={"input_ids": probes, "scores": probe_scores(model, probes)},
            **fields,
        )
        save_sidecar(model, sidecar, path)
        paths.append(path)
    return paths


def rows(number: int = 6) -> tuple[list[str], list[str]]:
    """Prompts and completions of many lengths, two completions a prompt."""
    found = ranked_rows(number, k=2, seed=3)
    return [r["prompt"] for r in found for _ in range(2)], [c for r in found for c in r["completions"]]


def largest_difference(one: Sequence, other: Sequence) -> float:
    """Of two tables (or lists) of scores."""
    return (torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).abs().max().item()


def by_length(prompts: list, completions: list, **columns: Any) -> list[float]:
    """A reward function: hundreds of characters."""
    return [len(completion) / 100 for completion in completions]


def only_short(prompts: list, completions: list, **columns: Any) -> list[float | None]:
    """A reward function that does not apply to long completions."""
    return [None if len(completion) > 20 else 1.0 for completion in completions]
