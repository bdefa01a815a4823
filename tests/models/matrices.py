"""The two tables of the reward head: scores after a reload, and heads on quantized bases.

`python -m tests.models.matrices` prints both; the tests hold every row to its limit.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models.helpers import (
    fresh_scores,
    int8,
    max_change,
    nf4,
    same_ranking,
    scores_of,
    sequences,
    table,
    tiny_base,
    train,
)
from trl_ext.models import build_reward_model
from trl_ext.models.heads import candidate_scores, head_parameters, last_head_module, run_with_head_output


TASK_TYPES = (None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
TARGETS = (None, "all-linear", ["q_proj", "v_proj", "down_proj"])
RELOAD_LIMIT = {"fp32": 1e-5, "nf4": 1e-2}


def reload_matrix(folder: Path) -> list[dict[str, Any]]:
    """`task_type` x target_modules x {fp32, NF4}: train, save, compare with a fresh process of another seed."""
    base = tiny_base(folder / "base")
    rows, before = [], []
    for kind, quantization in (("fp32", None), ("nf4", nf4())):
        for task in TASK_TYPES:
            for targets in TARGETS:
                path = folder / f"{kind}-{len(rows)}"
                config = LoraConfig(task_type=task, target_modules=targets)
                trainer = train(base, path, peft_config=config, quantization_config=quantization, learning_rate=1e-2)
                before.append(scores_of(trainer.model))
                shown = "list" if isinstance(targets, list) else str(targets)
                rows.append({"base": kind, "task_type": str(task), "target_modules": shown, "path": str(path)})
    after = fresh_scores([{"path": row.pop("path"), "ids": sequences()} for row in rows])
    for row, old, new in zip(rows, before, after, strict=True):
        row["score_std"] = old.std().item()
        row["max_change"] = max_change(old, new["scores"]) if "scores" in new else float("nan")
        row["same_ranking"] = same_ranking(old, new["scores"]) if "scores" in new else new["error"]
    return rows


FAMILIES = ("llama", "qwen3", "mistral", "gemma2")
BASES: dict[str, tuple[BitsAndBytesConfig | None, BitsAndBytesConfig | None]] = {
    # name -> (quantization of the saved checkpoint, quantization asked for when building)
    "NF4": (None, nf4()),
    "int8": (None, int8()),
    "pre-quantized NF4": (nf4(), None),
    "pre-quantized NF4, baked skip list": (nf4(llm_int8_skip_modules=["lm_head"]), None),
    "NF4, user's skip list": (None, nf4(llm_int8_skip_modules=["lm_head"])),
}
Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def scalar_loss(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return candidate_scores(model, ids, mask).sum()


def token_loss(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    _, logits = run_with_head_output(model, ids, mask)  # (N, T, C)
    return logits.logsumexp(dim=-1)[mask.bool()].sum() + logits[..., 0].sum()


def head_matrix(folder: Path, labels: Iterable[int] = (1, 2, 3)) -> list[dict[str, Any]]:
    """Kind of quantized base x family x scalar head and token head with 1, 2, 3 labels: class, dtype, gradient."""
    rows = []
    for family in FAMILIES:
        base = tiny_base(folder / family, family)
        for name, (saved, asked) in BASES.items():
            path = base
            if saved is not None:
                path = str(folder / f"{family}-{len(rows)}")
                AutoModelForCausalLM.from_pretrained(base, quantization_config=saved).save_pretrained(path)
            heads = [("scalar", 1, scalar_loss), *(("token", n, token_loss) for n in labels)]
            for view, num_labels, loss in heads:
                model, head = build_reward_model(path, num_labels=num_labels, quantization_config=asked)
                rows.append(
                    {"family": family, "base": name, "view": view, "labels": num_labels} | _probe(model, head, loss)
                )
    return rows


def _probe(model: torch.nn.Module, head: list[str], loss: Loss) -> dict[str, Any]:
    module = last_head_module(model)
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    model.train()
    model.config.pad_token_id = None
    loss(model, ids, mask).backward()
    gradients = [p.grad for p in head_parameters(model, head).values()]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item() if all(g is not None for g in gradients) else 0.0
    quantized = sum(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    return {
        "head": type(module).__name__,
        "is_linear": isinstance(module, torch.nn.Linear),
        "dtype": str(module.weight.dtype).removeprefix("torch."),
        "quantized_weights": quantized,
        "gradient": norm,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(table("change of scores after a reload in a fresh process", reload_matrix(Path(scratch))))
    with tempfile.TemporaryDirectory() as scratch:
        print(table("\nR6: heads on quantized bases", head_matrix(Path(scratch))))
