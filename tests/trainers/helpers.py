"""What the trainer tests share: a tiny run of our trainer or of TRL's, and what came out of it."""

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


# Arguments that take effect in code of transformers or TRL, which our trainers call and do not replace.
_APPLIED = """
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
    optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps bf16
    fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism use_cpu parallelism_config ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp_config debug
    skip_memory_metrics remove_unused_columns
"""
APPLIED_BY_TRAINER = _APPLIED.split()

SMALL: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    logging_steps=1,
    learning_rate=1e-3,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
"""What every small run on a CPU sets, whatever its trainer: it logs each step, and neither saves nor reports."""


def config(folder: Path, config_class: type = RewardConfig, **kwargs: Any) -> trl.RewardConfig:
    """A small fp32 CPU configuration that logs every step."""
    return config_class(
        **(SMALL | {"output_dir": str(folder), "per_device_eval_batch_size": 4, "max_steps": 4} | kwargs)
    )


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


def states(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """A copy of everything that is trained, for each member of an ensemble or for the one model."""
    if hasattr(trainer.model, "member_state"):
        return [trainer.model.member_state(member) for member in range(trainer.args.num_members)]
    return [weights(trainer) | head_of(trainer)]


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation that do not depend on the clock."""
    clock = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(clock)}


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
