"""Arguments inherited from `TrainingArguments` and `trl.RewardConfig` that do not affect a reward model's training.

It knows names and values of arguments. This module warns about arguments that change nothing. An argument that cannot
be honoured raises an error in the code that reads it.
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
"""Name of an argument, and the reason why it has no effect."""


def warn_of_arguments_without_effect(args: TrainingArguments) -> None:
    """Warn about arguments that differ from their defaults and have no effect. Called once for each trainer."""
    reasons = dict(WITHOUT_EFFECT)
    if args.max_tokens_per_batch is not None:
        reasons["per_device_train_batch_size"] = "max_tokens_per_batch decides the size of a batch"
    defaults = {field.name: field.default for field in fields(args) if field.default is not MISSING}
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != defaults[name]:
            logger.warning(f"{name}={value!r} has no effect: {reason}. Leave it out.")
