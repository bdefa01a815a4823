"""PPO with dense rewards in two processes (gloo, CPU) takes the steps of one process with twice the batch."""

import os

import pytest
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig

from tests.program import TORCHRUN, run_program
from tests.tiny import save_tiny_model
from trl_ext.trainers.policy.ppo_config import PPOConfig
from trl_ext.trainers.policy.ppo_trainer import PPOTrainer


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, prompt + text)) % 7) for prompt, text in zip(prompts, completions, strict=True)]


def halves(prompts, completions, **columns):
    return [[(0, len(text) // 2, len(text) / 10)] if len(text) > 1 else None for text in completions]


def train(folder, base):
    """Two greedy steps of PPO; the sums of everything that is trained, and the metrics that are gathered."""
    args = PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        num_generations=2,
        max_completion_length=6,
        generation_kwargs={"do_sample": False},  # otherwise every process draws its own samples
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        value_learning_rate=1e-2,
        beta=0.1,
        verifier="letters",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
    )
    rows = Dataset.from_list(
        [{"prompt": text} for text in ("one", "two", "three", "four", "five", "six", "seven", "a")]
    )
    trainer = PPOTrainer(
        base,
        letters,
        halves,
        args,
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    parameters = [*trainer.model.named_parameters(), *trainer.value_model.named_parameters()]
    sums = {
        name: [p.sum().item(), p.abs().sum().item()]
        for name, p in parameters
        if ".default." in name or "critic" in name
    }
    everywhere = gather_object([sums])
    names = ("critic/", "dense/", "watch/", "kl", "reward")
    logged = [{k: v for k, v in e.items() if k.startswith(names)} for e in trainer.state.log_history if "loss" in e]
    return {"sums": sums, "same": all(other == sums for other in everywhere), "logged": logged}


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    base = save_tiny_model(tmp_path / "base", "qwen2", seed=5)
    one = run_program(train, tmp_path / "one", base)
    two = run_program(train, tmp_path / "two", base, launcher=TORCHRUN)
    assert two["same"]
    assert len(one["sums"]) > 8
    for name, wanted in one["sums"].items():
        assert two["sums"][name] == pytest.approx(wanted, abs=2e-3), name
    for ours, theirs in zip(two["logged"], one["logged"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3, nan_ok=True)
