"""The stages `reward` and `reward_nf4`: train a reward model on rated samples, reload it, and let it pick answers."""

import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PrinterCallback

from trl_ext import RewardConfig, RewardScorer, RewardTrainer

from .picking import compare_picks
from .policy_stages import read_rows
from .progress import ProgressCallback
from .stages import StageContext
from .task import final_answer


# Groups of held-out prompts that the trainer itself evaluates, for the run's table and histogram of scores.
EVALUATED_GROUPS = 100

# The share of the stage that is training; the rest is evaluation and scoring.
TRAINING_SHARE = 0.85


def run_reward(context: StageContext) -> dict[str, Any]:
    """
    Trains on `train.jsonl`, saves an adapter, reloads it from its folder alone and scores `held_out.jsonl`.

    Returns:
        `dict`: the picks of [`~trl_ext.demo.picking.compare_picks`]; `pair_accuracy` on held-out groups; what
        reloading changed in the scores (`reload_difference`, the largest, beside `score_std`); seconds of training and
        of scoring.
    """
    settings = context.settings
    columns = ("prompt", "completions", "ratings")
    train_rows = read_rows(context.folders["samples"], "train")
    held_out_rows = read_rows(context.folders["samples"], "held_out")

    def dataset(rows: list[dict[str, Any]]) -> Dataset:
        return Dataset.from_list([{name: row[name] for name in columns} for row in rows])

    args = RewardConfig(
        output_dir=str(context.folder),
        loss_type="plackett_luce",
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=32,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=min(50, settings["steps"] // 4),
        logging_steps=max(1, min(25, settings["steps"] // 4)),
        save_strategy="no",
        report_to=context.report_to,
        seed=settings["seed"],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    rank = settings["lora_rank"]
    trainer = RewardTrainer(
        model=str(context.folders["policy"].resolve()),
        args=args,
        train_dataset=dataset(train_rows),
        eval_dataset=dataset(held_out_rows[:EVALUATED_GROUPS]),
        quantization_config=quantization if settings["quantized"] else None,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        callbacks=[ProgressCallback(lambda share: context.progress(TRAINING_SHARE * share))],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    loss = trainer.train().training_loss
    train_seconds = time.monotonic() - start
    evaluation = trainer.evaluate()
    trainer.save_model(str(context.folder))

    prompts = [row["prompt"] for row in held_out_rows for _ in row["completions"]]
    completions = [text for row in held_out_rows for text in row["completions"]]
    in_memory = RewardScorer(trainer.model, processing_class=trainer.processing_class)
    few = slice(0, 256)
    before = torch.tensor(in_memory(prompts[few], completions[few]))
    del trainer, in_memory

    start = time.monotonic()
    scores = torch.tensor(RewardScorer(context.folder)(prompts, completions))
    score_seconds = time.monotonic() - start
    context.progress(1.0)

    by_prompt = scores.view(len(held_out_rows), -1).tolist()
    picks = compare_picks(
        [row["answer_right"] for row in held_out_rows],
        [[final_answer(text) for text in row["completions"]] for row in held_out_rows],
        by_prompt,
    )
    return {
        **picks,
        "n": len(by_prompt[0]),
        "pair_accuracy": evaluation["eval_accuracy"],
        "loss": loss,
        "reload_difference": (scores[few] - before).abs().max().item(),
        "score_std": scores.std().item(),
        "train_seconds": train_seconds,
        "score_seconds": score_seconds,
    }
