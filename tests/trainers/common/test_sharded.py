"""The files in configs/accelerate/ are read by Accelerate; a base that is sharded by FSDP2 over two processes (gloo,
CPU) trains, evaluates and saves as one process does; what cannot be sharded is refused in a sentence."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tests.program import run_program
from tests.tiny import pair_rows
from tests.trainers.helpers import config, history, lora, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer, RewardTrainer, load_reward_model
from trl_ext.models.heads import candidate_scores
from trl_ext.trainers.common.setup import check_sharding, uses_fsdp


ROOT = Path(__file__).resolve().parents[3]
ZERO = ("zero2", "zero3")
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def trained(trainer: RewardTrainer) -> dict:
    """What a training and an evaluation gave; the model is saved."""
    trainer.train()
    told = {name: history(trainer, name) for name in ("loss", "grad_norm")}
    told["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return told


def with_deepspeed(folder, base) -> dict:
    """Run alone, or in two processes with the DeepSpeed plugin of `accelerate launch`: LoRA, and all weights.

    DeepSpeed runs where it is told of a CPU only when the group is started.
    """
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
    return told


def with_fsdp(folder, base) -> dict:
    """Run alone or in two processes: LoRA on a plain and on a 4-bit base.

    Accelerate does not shard on a CPU: it takes processes there for plain DDP. Told that they are GPUs, it runs the
    same FSDP2 code over gloo.
    """
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
    return told


def launch(function, base, folder, config):
    """What a function told in two processes that `accelerate launch` started with a config."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--num_processes", "2", "--mixed_precision", "no"]
    cpu = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    return run_program(function, folder, base, launcher=launcher, timeout=240, **cpu)


def test_two_processes_with_a_sharded_base_train_as_one(base, tmp_path):
    one = with_fsdp(tmp_path / "one", base)
    two = launch(with_fsdp, base, tmp_path / "two", ROOT / "configs" / "accelerate" / "fsdp2_lora.yaml")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("lora", "qlora"):
        assert two[name]["sharded"] == ["DTensor"] and "DTensor" not in one[name]["sharded"]
        assert len(one[name]["loss"]) == 4
        assert two[name]["loss"] == pytest.approx(one[name]["loss"], abs=1e-5)
        assert two[name]["grad_norm"] == pytest.approx(one[name]["grad_norm"], abs=1e-4)
        assert two[name]["eval_loss"] == pytest.approx(one[name]["eval_loss"], abs=1e-5)
        ids = torch.tensor([[5, 9, 7, 30]])
        scores = [
            candidate_scores(load_reward_model(tmp_path / run / name).eval(), ids, torch.ones_like(ids)).item()
            for run in ("one", "two")
        ]
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", ZERO)
def test_two_processes_under_deepspeed_train_as_one(base, tmp_path, stage):
    one = with_deepspeed(tmp_path / "one", base)
    two = launch(with_deepspeed, base, tmp_path / "two", ROOT / "configs" / "accelerate" / f"{stage}.yaml")
    assert (one["processes"], two["processes"]) == (1, 2)
    ids = torch.tensor([[5, 9, 7, 30]])
    for name in ("lora", "full"):
        assert len(one[name]["loss"]) == 4
        for metric in ("loss", "grad_norm", "eval_loss"):
            assert two[name][metric] == pytest.approx(one[name][metric], abs=1e-5)
        scores = [
            candidate_scores(load_reward_model(tmp_path / run / name).eval(), ids, torch.ones_like(ids)).item()
            for run in ("one", "two")
        ]
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_there_are_launch_configs_and_accelerate_reads_them():
    assert {path.stem for path in CONFIGS} >= {"ddp", "fsdp2_lora", "fsdp_qlora", *ZERO}
    for path in CONFIGS:
        read = load_config_from_file(str(path))
        assert read.num_processes == 2 and read.mixed_precision == "bf16"
        kind = "MULTI_GPU" if path.stem == "ddp" else "DEEPSPEED" if path.stem in ZERO else "FSDP"
        assert str(read.distributed_type).rsplit(".")[-1] == kind
        header = path.read_text().split("\n\n")[0]
        assert f"accelerate launch --config_file {path.relative_to(ROOT).as_posix()}" in header
        assert "On GPUs: not yet run" in header


def nf4(storage):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage)


@pytest.mark.parametrize(
    "fsdp,zero_stage,quantization,words",
    [
        (True, 0, nf4(torch.uint8), "bnb_4bit_quant_storage"),
        (True, 0, BitsAndBytesConfig(load_in_8bit=True), "8-bit"),
        (False, 3, nf4(torch.bfloat16), "ZeRO-3"),
    ],
)
def test_what_cannot_be_sharded_is_refused(fsdp, zero_stage, quantization, words):
    with pytest.raises(ValueError, match=words):
        check_sharding(fsdp, zero_stage, quantization)


def test_what_can_be_sharded_passes():
    check_sharding(True, 0, None)
    check_sharding(True, 0, nf4(torch.bfloat16))
    check_sharding(False, 2, nf4(torch.uint8))
    check_sharding(False, 3, None)
    check_sharding(False, 0, BitsAndBytesConfig(load_in_8bit=True))


def test_a_launch_with_fsdp_is_seen_and_an_ensemble_refuses_it(base, tmp_path, monkeypatch):
    args = config(tmp_path, RewardEnsembleConfig)
    assert not uses_fsdp(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert uses_fsdp(args)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard the stacked weights"):
        trainer_for(base, args, trainer_class=RewardEnsembleTrainer, peft_config=lora())
    with pytest.raises(ValueError, match="every GPU would hold all of them"):
        trainer_for(base, config(tmp_path), peft_config=lora(), quantization_config=nf4(torch.uint8))
