"""The files in configs/accelerate/ are read by Accelerate; a base that is sharded by FSDP2 over two processes (gloo,
CPU) trains, evaluates and saves as one process does; what cannot be sharded is refused in a sentence."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import BitsAndBytesConfig

from tests.trainers import sharded_program
from tests.trainers.helpers import config, lora, run_in_two_processes, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer, load_reward_model
from trl_ext.models.heads import candidate_scores
from trl_ext.trainers.common.setup import check_sharding, uses_fsdp


ROOT = Path(__file__).resolve().parents[3]
ZERO = ("zero2", "zero3")
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def launch(base, folder, config):
    """What two processes told that `accelerate launch` started with a config."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    command += ["--mixed_precision", "no", "-m", "tests.trainers.sharded_program", str(base), str(folder)]
    return run_in_two_processes(command, timeout=240, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")


def test_two_processes_with_a_sharded_base_train_as_one(base, tmp_path):
    one = sharded_program.main(base, tmp_path / "one")
    two = launch(base, tmp_path / "two", ROOT / "configs" / "accelerate" / "fsdp2_lora.yaml")
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
    one = sharded_program.with_deepspeed(base, tmp_path / "one")
    two = launch(base, tmp_path / "two", ROOT / "configs" / "accelerate" / f"{stage}.yaml")
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
