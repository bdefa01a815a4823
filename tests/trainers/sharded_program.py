"""Run by `test_sharded.py`, alone or in two processes under `accelerate launch` with a config of configs/accelerate/.

Accelerate does not shard on a CPU: it takes processes there for plain DDP. Told that they are GPUs, it runs the same
FSDP2 code over gloo; DeepSpeed runs where it is told of a CPU only when the group is started. The first process prints
JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tests.tiny import pair_rows
from tests.trainers.helpers import config, history, leave_together, lora, trainer_for
from trl_ext import RewardTrainer


def trained(trainer: RewardTrainer) -> dict:
    """What a training and an evaluation gave; the model is saved."""
    trainer.train()
    told = {name: history(trainer, name) for name in ("loss", "grad_norm")}
    told["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return told


def with_deepspeed(base: Path, folder: Path) -> dict:
    """LoRA, and all weights, with the DeepSpeed plugin of `accelerate launch`; without one in one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    told: dict = {"processes": processes}
    for name, adapter in (("lora", lora()), ("full", None)):
        args = config(folder / name, per_device_train_batch_size=8 // processes, train_sampling_strategy="sequential")
        if processes > 1:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does without
            os.environ.pop("ACCELERATE_USE_CPU", None)
        evaluation = Dataset.from_list(pair_rows(9, seed=3))
        trainer = trainer_for(base, args, pair_rows(32), eval_dataset=evaluation, peft_config=adapter)
        assert trainer.is_deepspeed_enabled == (processes > 1)
        told[name] = trained(trainer)
    if processes == 1 or trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    told: dict = {"processes": processes}
    for name, quantization in (("lora", None), ("qlora", four_bit)):
        args = config(
            folder / name,
            per_device_train_batch_size=8 // processes,
            train_sampling_strategy="sequential",
            gradient_checkpointing=name == "lora",
        )
        if processes > 1:
            assert args.distributed_state.distributed_type == DistributedType.MULTI_CPU
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = trainer_for(
            base,
            args,
            pair_rows(32),
            eval_dataset=Dataset.from_list(pair_rows(9, seed=3)),
            peft_config=lora(),
            quantization_config=quantization,
        )
        assert trainer.is_fsdp_enabled == (processes > 1)
        told[name] = trained(trainer) | {"sharded": sorted({type(p).__name__ for p in trainer.model.parameters()})}
    if processes == 1 or trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    run = with_deepspeed if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else main
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
