"""Trains the reward models of `real_data.py` and scores unseen rows with them.

An arm is a way to train: its quantization, the trainer's arguments, which rows it sees, how many models it makes. All
arms of a data set see the same texts for as many tokens. Adapters sit on the last quarter of the layers, and the
layers below run once for each text (`trunk_cache`).
"""

import math
import resource
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from quiet import QUIET
from real_sets import Kind, Row, StudySet
from tools import train_quietly
from transformers import AutoConfig, BitsAndBytesConfig

from trl_ext import (
    ORMConfig,
    ORMTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardScorer,
    RewardTrainer,
    SegmentRewardConfig,
    SegmentRewardTrainer,
    merge_reward_models,
)


TRAINERS = {
    "ranked": (RewardTrainer, RewardConfig),
    "outcome": (ORMTrainer, ORMConfig),
    "steps": (PRMTrainer, PRMConfig),
    "segments": (SegmentRewardTrainer, SegmentRewardConfig),
}


@dataclass(frozen=True)
class Arm:
    """
    A way to train a reward model.

    Args:
        title (`str`): for the report.
        config (`dict`): arguments of the trainer's config.
        nf4 (`bool`): the base in 4 bits.
        data (`str`): what the rows become: `"rows"`; `"pairs"`, K / 2 random pairs of a row's K candidates,
            as many texts as the ranking has; `"ties"`, the same with ties; `"flipped"`, decided pairs of which a
            quarter is turned round; `"answers"`, one text with a label for each candidate, 1 above the mean rating
            of its row, for an outcome model, whose score of a text is the mean over its tokens.
        members (`int`): models that begin with the same head and differ in the order of their rows. Their weights are
            merged (WARM).
        mean_of (`str`, *optional*): another arm; this one is the mean score of its members, before they are merged.
        epochs (`float`): how many times the budget.
    """

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    nf4: bool = False
    data: str = "rows"
    members: int = 1
    mean_of: str | None = None
    epochs: float = 1.0


@dataclass(frozen=True)
class Budget:
    """
    The settings that all arms share.

    Args:
        epochs (`float`): of every training.
        least_steps (`int`): a small data set is read more often, about until it has made so many steps.
        items_a_step (`int`): judged items in a batch: candidates, steps or segments.
        targets (`tuple[str, ...]`): linear layers with an adapter, in the last quarter of the layers.
    """

    epochs: float = 2.0
    least_steps: int = 150
    learning_rate: float = 5e-4
    rank: int = 16
    max_length: int = 2048
    items_a_step: int = 8
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kind_of(study: StudySet, arm: Arm) -> Kind:
    """The kind of labels that an arm learns from."""
    return "outcome" if arm.data == "answers" else study.kind


def examples(rows: list[Row], study: StudySet, arm: Arm, seed: int) -> list[dict[str, Any]]:
    """The rows as the trainer reads them."""
    draw = np.random.default_rng(seed)
    if kind_of(study, arm) == "outcome":
        return [
            {"prompt": row.prompt, "completion": text, "label": bool(label > np.nanmean(row.labels))}
            for row in rows
            for text, label in zip(row.texts, row.labels, strict=True)
            if not math.isnan(label)
        ]
    if study.kind == "steps":
        return [
            {"prompt": row.prompt, "completions": row.texts, "labels": [label > 0.5 for label in row.labels]}
            for row in rows
        ]
    if study.kind == "segments":
        return [
            {
                "prompt": row.prompt,
                "completion": row.texts[0],
                "segments": [
                    {"start": start, "end": end, "label": bool(label), "category": "right"}
                    for (start, end), label in zip(row.spans, row.labels, strict=True)
                ],
            }
            for row in rows
        ]
    found, only_pairs = [], all(len(row.texts) == 2 for row in rows)
    for row in rows:
        labels = list(row.labels)
        if arm.data in ("pairs", "ties", "flipped"):
            found += pairs_of(row, labels, draw, arm.data)
        elif only_pairs:
            better, worse = (0, 1) if labels[0] > labels[1] else (1, 0)
            found.append({"prompt": row.prompt, "chosen": row.texts[better], "rejected": row.texts[worse]})
        else:
            found.append({"prompt": row.prompt, "completions": row.texts, "ratings": labels})
    return found


def pairs_of(row: Row, labels: list[float], draw: np.random.Generator, data: str) -> list[dict[str, Any]]:
    """
    Random pairs of a row's candidates, K / 2 of them, so that as many texts are read as in the ranking. `data` is the
    arm's: `"ties"` keeps the ties, `"flipped"` turns a quarter of the pairs round.
    """
    ties = data == "ties"
    pairs = [(a, b) for a, b in combinations(range(len(labels)), 2) if ties or labels[a] != labels[b]]
    wanted = len(labels) / 2
    number = min(len(pairs), int(wanted) + int(draw.random() < wanted % 1))
    found = []
    for place in draw.permutation(len(pairs))[:number]:
        a, b = pairs[place]
        if ties:
            found.append(
                {"prompt": row.prompt, "completions": [row.texts[a], row.texts[b]], "ratings": [labels[a], labels[b]]}
            )
        else:
            right = labels[a] > labels[b]
            if data == "flipped" and draw.random() < 0.25:
                right = not right
            a, b = (a, b) if right else (b, a)
            found.append({"prompt": row.prompt, "chosen": row.texts[a], "rejected": row.texts[b]})
    return found


def train(
    rows: list[Row],
    study: StudySet,
    arm: Arm,
    budget: Budget,
    seed: int,
    model: str,
    folder: Path,
    states: Path | None,
    device: str,
) -> Any:
    """A trained trainer; its model's adapter and tokenizer are in `folder`."""
    kind = kind_of(study, arm)
    trainer_class, config_class = TRAINERS[kind]
    data = Dataset.from_list(examples(rows, study, arm, seed))
    judged = sum(len(row.labels) for row in rows)
    items = judged / len(data)  # of an example
    if kind == "ranked":
        items = 2 if "chosen" in data.column_names else np.mean([len(own) for own in data["completions"]])
    # as many epochs for all arms of a data set, so that rankings and pairs read as many texts
    epochs = arm.epochs * max(budget.epochs, budget.least_steps * budget.items_a_step / judged)
    loss = {} if kind != "ranked" or "chosen" in data.column_names else {"loss_type": "plackett_luce"}
    more = {"loss_type": "bce"} if kind == "segments" else loss
    batch = max(1, round(budget.items_a_step / items))
    config = config_class(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=budget.learning_rate,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        max_length=budget.max_length,
        min_survival=0.0,
        trunk_cache=None if states is None else str(states),
        seed=seed,
        model_init_kwargs={"dtype": "bfloat16"},
        logging_strategy="epoch",
        **{**QUIET, "use_cpu": device == "cpu", "per_device_train_batch_size": batch, **more, **arm.config},
    )
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    adapter = LoraConfig(
        r=budget.rank,
        lora_alpha=2 * budget.rank,
        target_modules=list(budget.targets),
        layers_to_transform=list(range(layers - max(1, layers // 4), layers)),
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=data,
        peft_config=adapter,
        quantization_config=quantization if arm.nf4 else None,
    )
    train_quietly(trainer)
    return trainer


def scores_of(scorer: RewardScorer, rows: list[Row], study: StudySet) -> list[list[float]]:
    """A score of every item of the rows."""
    prompts = [row.prompt for row in rows]
    if study.kind == "steps":
        found = scorer.score_steps(prompts, [row.texts for row in rows])
        if any(score is None for own in found for score in own):
            raise ValueError("A solution is longer than max_length, so some of its steps have no score. Raise it.")
        return found
    if study.kind == "segments":
        found = scorer.score_segments(prompts, [row.texts[0] for row in rows], [list(row.spans) for row in rows])
        return [[value["right"] for value in own] for own in found]
    flat = iter(scorer([row.prompt for row in rows for _ in row.texts], [text for row in rows for text in row.texts]))
    return [[next(flat) for _ in row.texts] for row in rows]


def train_and_score(
    training: list[Row],
    test: list[Row],
    study: StudySet,
    arm: Arm,
    budget: Budget,
    seed: int,
    model: str,
    states: Path | None,
    device: str,
) -> dict[str, Any]:
    """
    Train an arm and score the test rows.

    Returns:
        `dict`: `scores` of the test rows' items, with members those of the merged model; `member_mean`, the mean
            of the members' scores; `steps`, `tokens`, `seconds` and `cpu_seconds` of all members.
    """
    start, cpu = time.perf_counter(), cpu_seconds()
    found, steps, tokens = [], 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(member)) for member in range(arm.members)]
        for member, folder in enumerate(folders):
            order = 1000 * seed + 100 * member  # each epoch adds 1
            own = replace(arm, config={**arm.config, "data_seed": order})
            trainer = train(training, study, own, budget, seed, model, folder, states, device)
            steps += trainer.state.global_step
            tokens += int([row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row][-1])
            whole = "mean" if arm.data == "answers" else None
            scorer = RewardScorer(
                trainer.model, trainer.processing_class, max_length=budget.max_length, aggregation=whole
            )
            with trainer.trunk_states():
                found.append(scores_of(scorer, test, study))
            if arm.members > 1:
                trainer.save_model(str(folder))
            del trainer, scorer
        result = {"scores": found[0]}
        if arm.members > 1:
            merge_reward_models(folders, Path(temporary, "merged"))
            merged = RewardScorer(Path(temporary, "merged"), max_length=budget.max_length, device=device)
            mean = [np.mean(own, axis=0).tolist() for own in zip(*found, strict=True)]
            result = {"scores": scores_of(merged, test, study), "member_mean": mean}
    return {
        **result,
        "steps": steps,
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - cpu,
    }


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
