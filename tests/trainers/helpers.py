"""What the trainer tests share: a tiny run of our trainer or of TRL's, and what came out of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import pair_rows
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.models.heads import head_parameters


def config(folder: Path, config_class: type = RewardConfig, **kwargs: Any) -> trl.RewardConfig:
    """A small fp32 CPU configuration that logs every step."""
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return config_class(**(defaults | kwargs))


def lora(**kwargs: Any) -> LoraConfig:
    """LoRA as a TRL user has to write it: with the task type and the head in `modules_to_save`."""
    defaults = dict(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj", "v_proj"], r=4)
    return LoraConfig(**(defaults | kwargs))


def trainer_for(
    model: Any, args: trl.RewardConfig, rows: Any = None, trainer_class: type = RewardTrainer, **kwargs: Any
) -> trl.RewardTrainer:
    """A trainer on `rows` (a list of rows or a data set) that prints nothing."""
    rows = pair_rows(32) if rows is None else rows
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    model = str(model) if isinstance(model, Path) else model
    trainer = trainer_class(model=model, args=args, train_dataset=data, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer: trl.RewardTrainer, name: str) -> list[float]:
    """The logged values of one metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def head_of(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    """A copy of the head."""
    return {name: p.detach().clone() for name, p in head_parameters(trainer.model, ["score"]).items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    assert one
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


class StopAt(TrainerCallback):
    """Kills the training after a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def leave_together(folder: Path) -> None:
    """
    End a process of a launched group once every other one is through with its work.

    Not a plain end: torch 2.13 can hang when a gloo group is destroyed right after a collective, because its thread
    waits for the interpreter lock that the destructor holds. Not a barrier of the group either: whoever passes it
    first and ends takes the connection away that the other still waits on. So they wait for each other's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    (folder / f"done-{rank}").touch()
    while not all((folder / f"done-{other}").exists() for other in range(processes)):
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)


def run_offline_wandb(folder: Path, *program: str, **environment: str) -> dict[str, Any]:
    """
    What a program told in a line "RESULT {...}", run with W&B offline in a process of its own.

    W&B reads its settings once a process, so that another test in the same one would decide where its files go; and
    the file of a run is complete when its process has ended.
    """
    root = Path(__file__).resolve().parents[2]
    given = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    given |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        env={**given, **environment},
        cwd=root,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def run_in_two_processes(command: list[str], timeout: float, **environment: str) -> dict[str, Any]:
    """What a program told in a line "RESULT {...}" that a launcher started in two processes (gloo, CPU)."""
    root = Path(__file__).resolve().parents[2]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment},
        cwd=root,
    )
    try:
        output, errors = started.communicate(timeout=timeout)
    finally:
        started.terminate()  # the launcher then ends its processes; nothing where all is over
        started.wait()
    assert started.returncode == 0, errors[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def torchrun(module: str, *arguments: Path) -> list[str]:
    """The command that starts a module in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, "-m", module, *map(str, arguments)]
