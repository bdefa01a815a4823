"""Arguments of `TrainingArguments` and `trl.RewardConfig` that have no effect on the training of a reward head.

It knows names and values of arguments. Those that would change the result, and cannot, raise an error where they are
read; those that merely change nothing are warned about here.
"""

import logging
from dataclasses import MISSING, fields

from transformers import TrainingArguments


logger = logging.getLogger(__name__)

WITHOUT_EFFECT = {
    "label_names": "labels come from the columns of the rows",
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "logging_nan_inf_filter": "training stops at a loss that is NaN or infinite",
}
"""Argument to the reason why no value of it changes anything."""


def warn_of_arguments_without_effect(args: TrainingArguments) -> None:
    """Say once, when a trainer is made, which arguments differ from their defaults and change nothing."""
    reasons = dict(WITHOUT_EFFECT)
    if args.max_tokens_per_batch is not None:
        reasons["per_device_train_batch_size"] = "max_tokens_per_batch decides the size of a batch"
    defaults = {field.name: field.default for field in fields(args) if field.default is not MISSING}
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != defaults[name]:
            logger.warning(f"{name}={value!r} has no effect: {reason}. Leave it out.")
