"""The stages `reward` and `reward_nf4`: train a reward model on rated samples, reload it, and let it pick answers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from trl_ext import RewardConfig, RewardScorer, RewardTrainer
from trl_ext.demo.policy_stages import read_rows
from trl_ext.demo.training import (
    EVALUATED_PROMPTS,
    adapter,
    arguments,
    picks,
    progress_callback,
    ranked,
    train_and_reload,
)
from trl_ext.pipelines.stages.cached_stages import StageContext


def run_reward(context: StageContext) -> dict[str, Any]:
    """
    Trains on `train.jsonl`, saves an adapter, reloads it from its folder alone and scores `held_out.jsonl`.

    In the weighted vote, each sample counts with its probability under the Plackett-Luce model of being the best for
    its prompt.

    Returns:
        `dict`: the results of [`~trl_ext.demo.training.picks`] and [`~trl_ext.demo.training.train_and_reload`], and
        `pair_accuracy` on held-out groups.
    """
    held_out_rows = read_rows(context.folders["samples"], "held_out")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = RewardTrainer(
        model=str(context.folders["policy"].resolve()),
        args=RewardConfig(loss_type="plackett_luce", **arguments(context, eval_batch_size=32)),
        train_dataset=ranked(read_rows(context.folders["samples"], "train")),
        eval_dataset=ranked(held_out_rows[:EVALUATED_PROMPTS]),
        quantization_config=quantization if context.settings["quantized"] else None,
        peft_config=adapter(context),
        callbacks=[progress_callback(context)],
    )
    report, scores = train_and_reload(context, trainer, held_out_rows, _score, metrics=("accuracy",))
    by_prompt = [[score for (score,) in row] for row in scores]
    report["pair_accuracy"] = report.pop("accuracy")
    return {**picks(held_out_rows, by_prompt, [softmax(row) for row in by_prompt]), **report}


def _score(scorer: RewardScorer, prompts: list[str], completions: list[str]) -> list[list[float]]:
    return [[score] for score in scorer(prompts, completions)]


def softmax(scores: Sequence[float]) -> list[float]:
    """The probability that each candidate is the best, under the Plackett-Luce model."""
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]
