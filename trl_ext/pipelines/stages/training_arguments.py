"""The training arguments that a stored result does not depend on, in one table with reasons.

An argument that is not in the table counts: a rerun with another value starts over or is refused. Pipelines that set
an argument themselves, or that handle its effect elsewhere, list it in an additional table with a reason.

This module knows names and values of arguments. It does not know trainers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl_ext.models.fingerprint import path_identity
from trl_ext.pipelines.stages.values import plain


_PLACE = "It says where files are, and their content is compared instead."
_LOG = "It changes what is logged, shown or reported, and nothing else."
_HUB = "It says whether and how files are uploaded."
_SAVE = "It says when checkpoints are written; the result is the policy or model after the last step."
_EVALUATION = "It belongs to evaluation, which these trainings do not run; the pipelines evaluate on their own."
_BEST = "The pipelines keep the weights after the last step, never those of the best evaluation."
_SCRIPT = "Scripts read it; trainers do not."
_LOADING = "It changes how fast batches are loaded, and not which rows they hold."
_MEMORY = "It changes when memory is freed, and not what is computed."

# Name of the argument -> why a result does not depend on it.
IRRELEVANT: dict[str, str] = {
    "output_dir": _PLACE,
    "run_name": _LOG,
    "project": _LOG,
    "report_to": _LOG,
    "trackio_space_id": _LOG,
    "trackio_bucket_id": _LOG,
    "trackio_static_space_id": _LOG,
    "disable_tqdm": _LOG,
    "log_level": _LOG,
    "log_level_replica": _LOG,
    "log_on_each_node": _LOG,
    "log_table_size": _LOG,
    "logging_first_step": _LOG,
    "logging_nan_inf_filter": _LOG,
    "logging_steps": _LOG,
    "logging_strategy": _LOG,
    "include_num_input_tokens_seen": _LOG,
    "skip_memory_metrics": _LOG,
    "push_to_hub": _HUB,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "save_strategy": _SAVE,
    "save_steps": _SAVE,
    "save_total_limit": _SAVE,
    "save_on_each_node": _SAVE,
    "enable_jit_checkpoint": _SAVE,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "eval_packing": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "per_device_eval_batch_size": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "resume_from_checkpoint": _SCRIPT,
    "dataloader_num_workers": _LOADING,
    "dataloader_pin_memory": _LOADING,
    "dataloader_persistent_workers": _LOADING,
    "dataloader_prefetch_factor": _LOADING,
    "dataloader_multiprocessing_context": _LOADING,
    "torch_empty_cache_steps": _MEMORY,
    "local_rank": "It says which process this is.",
    "ddp_timeout": "It says how long processes wait for each other.",
}

# Arguments whose value may be the path of a file or folder; its content counts.
_PATHS = ("chat_template_path",)


def arguments_key(
    args: Any, overrides: Mapping[str, Any] | None = None, irrelevant: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    The entries of a manifest for the arguments of a training: all arguments that change its result.

    Args:
        args (`TrainingArguments`):
            The arguments, of any trainer. A callable is represented by its source and the values that it holds (see
            [`~trl_ext.pipelines.stages.values.callable_key`]), a file by its content.
        overrides (`Mapping`, *optional*):
            Arguments that have other values in this training.
        irrelevant (`Mapping[str, str]`, *optional*):
            Further arguments that do not change this result, each with the reason.

    Returns:
        `dict`: JSON-ready, by name.

    Example:

    ```python
    >>> one, other = (RewardConfig("out", logging_steps=n, learning_rate=1e-4) for n in (1, 10))
    >>> arguments_key(one) == arguments_key(other)
    True
    >>> arguments_key(one, {"learning_rate": 1e-5}) == arguments_key(one)
    False
    ```
    """
    left_out = {*IRRELEVANT, *(irrelevant or {})}
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    values |= overrides or {}
    key = {name: plain(value) for name, value in sorted(values.items()) if name not in left_out}
    for name in _PATHS:
        if key.get(name) is not None:
            key[name] = path_identity(key[name])
    return key
