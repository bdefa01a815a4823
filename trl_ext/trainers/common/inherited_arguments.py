"""Arguments inherited from `TrainingArguments` and TRL's configs that do not affect our trainers.

It knows names and values of arguments. This module warns about arguments that change nothing. An argument that cannot
be honoured raises an error in the code that reads it.
"""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields

from transformers import TrainingArguments


logger = logging.getLogger(__name__)

WITHOUT_EFFECT = {
    "label_names": "labels come from the columns of the rows",
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "logging_nan_inf_filter": "training stops at a loss that is NaN or infinite",
}
"""Name of an argument, and the reason why it has no effect."""

FULL_EVALUATION = dict.fromkeys(
    ("bf16_full_eval", "fp16_full_eval"),
    "an evaluation has the precision of training; Trainer would turn the trained weights into half precision for good",
)
"""The same, for trainers with weights that stay in fp32: `without_full_evaluation` switches them off."""

WITHOUT_METRICS_FUNCTION = dict.fromkeys(
    ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object"),
    "it belongs to `compute_metrics`, which this trainer does not take",
)
"""The same, for trainers without `compute_metrics`."""


def warn_of_arguments_without_effect(args: TrainingArguments, without_effect: Mapping[str, str]) -> None:
    """Warn about arguments that differ from their defaults and have no effect. Called once for each trainer."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(args)
    }
    for name, reason in without_effect.items():
        value = getattr(args, name)
        if value != defaults[name]:
            logger.warning(f"{name}={value!r} has no effect: {reason}. Leave it out.")


def without_full_evaluation(args: TrainingArguments) -> None:
    """Warn about the arguments in `FULL_EVALUATION`, and switch them off."""
    warn_of_arguments_without_effect(args, FULL_EVALUATION)
    for name in FULL_EVALUATION:
        setattr(args, name, False)


def without_effect_on_heads(args: TrainingArguments) -> dict[str, str]:
    """The arguments without effect of a trainer of reward heads, which depend on other arguments."""
    if args.max_tokens_per_batch is None:
        return WITHOUT_EFFECT
    return WITHOUT_EFFECT | {"per_device_train_batch_size": "max_tokens_per_batch decides the size of a batch"}
