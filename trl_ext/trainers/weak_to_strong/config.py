"""Arguments of [`WeakToStrongTrainer`]: all of `trl.SFTConfig`, and the weight of the weak teacher."""

from dataclasses import dataclass, field
from typing import Literal

import trl


@dataclass
class WeakToStrongConfig(trl.SFTConfig):
    r"""
    Configuration of [`WeakToStrongTrainer`]. All arguments of `trl.SFTConfig` keep their meaning and their defaults.

    Args:
        kd_weight (`float`, *optional*, defaults to `1.0`):
            Lambda of equation 10.13 of *Foundations of Large Language Models* by T. Xiao and J. Zhu: the weight of the
            divergence from the weak teacher beside the cross-entropy. The source gives no value; this one is ours.
        kd_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"` keeps `kd_weight`. `"linear"` and `"cosine"` reduce it to 0 over the run.
        teacher_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `AutoModelForCausalLM.from_pretrained` for a teacher given by its path (JSON on the
            command line).
    """

    _VALID_DICT_FIELDS = trl.SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    kd_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(weak || strong) beside the cross-entropy; 0 trains without it."}
    )
    kd_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant",
        metadata={"help": "Keep kd_weight 'constant', or let it fall to 0 over the run: 'linear' or 'cosine'."},
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the weak teacher, as JSON."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kd_weight < 0:
            raise ValueError(f"kd_weight={self.kd_weight} is negative. Needed: 0 or more.")
        if self.kd_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"kd_schedule={self.kd_schedule!r} is not known. Needed: 'constant', 'linear', 'cosine'.")
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r} does not work with a teacher. Needed: 'nll'.")
        for name in ("use_liger_kernel", "label_smoothing_factor"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} does not work with a teacher, because the loss needs the student's logits. Leave it out."
                )
