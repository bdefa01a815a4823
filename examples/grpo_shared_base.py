"""Run GRPO with a policy (QLoRA) and an ensemble of reward models that share one 4-bit base.

    python examples/grpo_shared_base.py MODEL ENSEMBLE    # for a GPU: a base, and an ensemble trained on it in 4 bits
    python examples/grpo_shared_base.py --smoke           # offline, a tiny model, on a CPU

The trainer is `trl.GRPOTrainer`, and the ensemble is an ordinary reward function. It loads its adapters onto the
policy's base, switches to them to score, and switches back. The full run reads prompts from data/prompts.jsonl. The
script prints the memory of the base, which is held once, and of the adapters.
"""

import sys
import tempfile

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import RewardEnsemble


def bytes_of(*models: nn.Module) -> int:
    """Memory of the tensors of some models in bytes; a shared tensor counts once."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(tensors.values())


def train(model: str, ensemble_folder: str, prompts: Dataset, args: GRPOConfig, dtype: torch.dtype) -> GRPOTrainer:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    policy = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization, dtype=dtype)
    base = bytes_of(policy)
    policy = get_peft_model(
        policy, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with_policy = bytes_of(policy)
    # the ensemble's adapters join the policy's on its base; the reward is the lowest of the members' scores
    ensemble = RewardEnsemble(ensemble_folder, reduce="min", base_model=policy, name="ensemble")
    with_both = bytes_of(policy, *ensemble.models)
    apart = bytes_of(*RewardEnsemble(ensemble_folder).models)
    print(
        f"MB: base {base / 1e6:.3f}, policy's adapter {(with_policy - base) / 1e6:.3f}, "
        f"{len(ensemble.members)} reward models {(with_both - with_policy) / 1e6:.3f}; "
        f"all on one base {with_both / 1e6:.3f}, on two bases {(with_policy + apart) / 1e6:.3f}"
    )
    if torch.cuda.is_available():
        print(f"allocated on the GPU: {torch.cuda.memory_allocated() / 1e6:.0f} MB")
    trainer = GRPOTrainer(model=policy, reward_funcs=[ensemble], args=args, train_dataset=prompts)
    trainer.train()
    return trainer


def full_run(model: str, ensemble_folder: str) -> GRPOTrainer:
    args = GRPOConfig(output_dir="outputs/grpo_shared_base", num_generations=8, bf16=True)
    prompts = load_dataset("json", data_files="data/prompts.jsonl", split="train")
    return train(model, ensemble_folder, prompts, args, torch.bfloat16)


def smoke_run(folder: str) -> GRPOTrainer:
    from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer
    from trl_ext.demo.model import tiny_reward_base

    base = tiny_reward_base(f"{folder}/base", hidden_size=64)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no")
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "x"} for a in range(5) for b in range(5)]
    members = RewardEnsembleTrainer(
        model=base,
        args=RewardEnsembleConfig(f"{folder}/ensemble", num_members=3, max_steps=10, learning_rate=3e-3, **quiet),
        train_dataset=Dataset.from_list(rows),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )
    members.train()
    members.save_model()
    args = GRPOConfig(
        f"{folder}/policy",
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-3,
        **quiet,
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    return train(base, f"{folder}/ensemble", prompts, args, torch.float32)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if "--smoke" in arguments else full_run(*arguments)
        for log in trainer.state.log_history:
            if "reward" in log:
                print(f"reward={log['reward']:.4f} disagreement={log['ensemble/disagreement']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
