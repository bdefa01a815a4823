"""What the tests of models share: tiny bases, two-step training runs, and scores from processes that did not train.

Knows trl_ext's trainer and the two scripts `fresh.py` (loads with trl_ext) and `plain.py` (loads without it).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.tiny import pair_rows, save_tiny_model
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.models.sidecar import probe_scores


PROJECT = Path(__file__).resolve().parents[2]

# bitsandbytes on a CPU needs in_features % 64 == 0, and in eval mode (without us) out_features % 32 == 0
WIDE = {
    "gpt2": dict(n_embd=64),
    "opt": dict(hidden_size=64, ffn_dim=128, word_embed_proj_dim=64),
    "deberta-v2": dict(hidden_size=64, intermediate_size=128, pooler_hidden_size=64),
    "qwen3_moe": dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=64),
}


def wide(family: str) -> dict[str, Any]:
    """Config arguments that make a tiny model of `family` quantizable on a CPU."""
    heads = dict(head_dim=16) if family in ("llama", "qwen3", "mistral", "gemma2") else {}
    return WIDE.get(family, dict(hidden_size=64, intermediate_size=128) | heads)


def nf4(**kwargs: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)


def int8(**kwargs: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, **kwargs)


def tiny_base(folder: Path, family: str = "llama", **kwargs: Any) -> str:
    """A language model wide enough for bitsandbytes, saved in `folder`."""
    return str(save_tiny_model(folder, family, **(wide(family) | kwargs)))


def make_trainer(
    model: str | PreTrainedModel,
    output_dir: str | Path,
    *,
    rows: list[dict] | None = None,
    eval_rows: list[dict] | None = None,
    peft_config: Any = None,
    quantization_config: BitsAndBytesConfig | None = None,
    processing_class: Any = None,
    callbacks: list | None = None,
    **arguments: Any,
) -> RewardTrainer:
    """A trainer for two quiet fp32 CPU steps on four pairs each; `arguments` override the configuration."""
    quiet = dict(report_to="none", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1)
    quiet |= dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3)
    return RewardTrainer(
        model=model,
        args=RewardConfig(str(output_dir), **(quiet | arguments)),
        train_dataset=Dataset.from_list(rows or pair_rows(8)),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=processing_class,
        peft_config=peft_config,
        quantization_config=quantization_config,
        callbacks=callbacks,
    )


def train(model: str | PreTrainedModel, output_dir: str | Path, **kwargs: Any) -> RewardTrainer:
    """Train two steps, save to `output_dir`, return the trainer."""
    trainer = make_trainer(model, output_dir, **kwargs)
    trainer.train()
    trainer.save_model()
    return trainer


def sequences(vocab_size: int = 300, number: int = 12, seed: int = 5) -> list[list[int]]:
    """Token ids of `number` sequences of 3 to 20 tokens, from 10 up (below are special tokens)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (number,), generator=generator).tolist()
    return [torch.randint(10, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def scores_of(model: torch.nn.Module, ids: list[list[int]] | None = None) -> torch.Tensor:
    """Scores of `sequences()` (or of `ids`), fp64, one sequence at a time in eval mode."""
    return torch.tensor(probe_scores(model, ids or sequences()), dtype=torch.float64)


def _run(module: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        env=environment,
        cwd=PROJECT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-4000:]}")
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(jobs)
    return results


def fresh_scores(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One new process, other seed: `{"path", "ids"}` -> `{"scores"}` or `{"error"}`, loaded by `load_reward_model`."""
    return _run("tests.models.fresh", jobs)


def plain_scores(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `fresh_scores` in a process that cannot import trl_ext: plain transformers and PEFT, right-padded batches."""
    return _run("tests.models.plain", jobs)


def max_change(one: torch.Tensor | list[float], other: torch.Tensor | list[float]) -> float:
    return (torch.as_tensor(one, dtype=torch.float64) - torch.as_tensor(other, dtype=torch.float64)).abs().max().item()


def same_ranking(one: torch.Tensor | list[float], other: torch.Tensor | list[float]) -> bool:
    return torch.as_tensor(one).argsort().tolist() == torch.as_tensor(other).argsort().tolist()


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as an aligned text table."""
    columns = list(rows[0])
    cells = [[f"{row[c]:.1e}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [columns, *cells]
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])
