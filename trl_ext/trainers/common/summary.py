"""What a training run is, in a few lines: for the log when it starts, and for the model card.

It knows trainers and their arguments. It changes nothing, and knows nothing of losses or rows beyond their names and
counts.
"""

import logging
import os
from collections.abc import Iterable

from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from trl_ext.data.report import DataReport
from trl_ext.models.bases import describe_base
from trl_ext.models.heads import unwrap


logger = logging.getLogger(__name__)

TRACKERS = {
    "wandb": "W&B",
    "tensorboard": "TensorBoard",
    "mlflow": "MLflow",
    "comet_ml": "Comet",
    "trackio": "Trackio",
}


def run_facts(trainer: Trainer, loss: str, reports: Iterable[DataReport] = (), **more: str) -> dict[str, str]:
    """
    What is trained, on what and how: a name and a text for each fact, in the order in which people ask.

    Args:
        trainer (`Trainer`): after its `__init__`.
        loss (`str`): the loss in words.
        reports (iterable of [`DataReport`], *optional*): what became of the rows. By default their number is given.
        **more: facts that only this trainer has, such as `head` and `shared_prefix`.
    """
    model = trainer.model
    trained, total = count_parameters(model)
    facts = {
        "model": f"{type(unwrap(model)).__name__} from {base_name(model) or 'memory'}{_adapter(model)}",
        "trained": f"{trained:,} of {total:,} parameters ({trained / max(total, 1):.2%})",
        "precision": _precision(trainer),
        **{name.replace("_", " "): text for name, text in more.items()},
        "data": "; ".join(report.short() for report in reports) or _rows(trainer),
        "loss": loss,
        "batch": _batch(trainer),
        "metrics": _destinations(trainer),
    }
    return {name: text for name, text in facts.items() if text}


def log_start(trainer: Trainer, facts: dict[str, str]) -> None:
    """Log the facts, on the main process, as information."""
    if not trainer.is_world_process_zero():
        return
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {text}" for name, text in facts.items()]
    logger.info("\n".join([f"{type(trainer).__name__} starts", *lines]))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()  # it unpacks 4-bit weights
    # of weights that DeepSpeed has cut up, only `ds_numel` knows the size
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def base_name(model: nn.Module) -> str:
    """The Hub id or folder that a model was loaded from; empty for one that was made in memory."""
    return describe_base(model).id


def with_arguments(name: str, **arguments: object) -> str:
    """A name with the arguments that are set: `pairwise (margin_from_ratings=True)`."""
    given = ", ".join(f"{key}={value}" for key, value in arguments.items() if value)
    return f"{name} ({given})" if given else name


def _adapter(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        return ""
    config = next(iter(model.peft_config.values()))
    # a stacked model holds an adapter for each member of an ensemble
    members = getattr(model, "members", 1)
    # not every kind of adapter has a rank
    rank = f", rank {config.r}" if getattr(config, "r", None) else ""
    many = f"{members} adapters: " if members > 1 else "adapter: "
    return f", {many}{str(getattr(config.peft_type, 'value', config.peft_type))}{rank}"


def _precision(trainer: Trainer) -> str:
    base = describe_base(trainer.model)
    quantization = base.quantization or {}
    bits = 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else None
    stored = f"{bits}-bit weights ({base.dtype} beside them)" if bits else f"{base.dtype} weights"
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad})
    autocast = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "none"
    return f"{stored}, trained in {' and '.join(trained)}, autocast: {autocast}"


def _rows(trainer: Trainer) -> str:
    rows = trainer.train_dataset
    if rows is None:
        return "none to train on"
    return f"train: {len(rows)} rows" if has_length(rows) else "train: a stream"


def _batch(trainer: Trainer) -> str:
    args = trainer.args
    processes, steps = trainer.accelerator.num_processes, args.gradient_accumulation_steps
    # only trainers of this package have the argument
    tokens = getattr(args, "max_tokens_per_batch", None)
    if tokens is not None:
        return f"up to {tokens} tokens x {steps} accumulated x {processes} processes for each step"
    size = args.train_batch_size
    return f"{size} rows x {steps} accumulated x {processes} processes = {size * steps * processes} rows for each step"


def _destinations(trainer: Trainer) -> str:
    places = [TRACKERS.get(name, name) for name in trainer.args.report_to]
    if "W&B" in places:
        places[places.index("W&B")] = f"W&B (project {os.environ.get('WANDB_PROJECT', 'huggingface')})"
    return ", ".join([*places, f"trainer_state.json in {trainer.args.output_dir}"])
