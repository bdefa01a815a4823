"""Arguments of [`PRMTrainer`]: those of TRL's former `PRMConfig`, and new ones for more classes and losses."""

from dataclasses import dataclass, field

from trl_ext.trainers.token.config import TokenRewardConfig


@dataclass
class PRMConfig(TokenRewardConfig):
    r"""
    Configuration of [`PRMTrainer`].

    All fields of the `PRMConfig` that TRL had up to 1.13 keep their names and defaults: `learning_rate` (1e-5),
    `max_length`, `max_completion_length`, `disable_dropout`, `step_separator`, `train_on_last_step_only`,
    `dataset_num_proc`.

    Args:
        num_labels (`int`, *optional*, defaults to `2`):
            Outputs of the head: 2 for right or wrong steps, 3 for labels -1, 0, 1, and 1 for the losses `"bce"`,
            `"mse"` and `"hinge"`.
        loss_type (`str`, *optional*, defaults to `"ce"`):
            `"ce"`: cross-entropy over the classes, as in TRL. A label may be a probability.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text after each step. Its last token gets the label.
        max_completion_length (`int`, *optional*):
            Cut completions after this number of tokens. Labels after the cut are lost.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Train only on the label of the last step. Evaluation uses all steps, as in TRL.
        mask_after_first_error (`bool`, *optional*, defaults to `False`):
            Ignore the labels of steps after the first wrong one. Annotators often stop there, and data sets fill the
            rest with a constant.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    loss_type: str = field(
        default="ce",
        metadata={"help": "Token loss: 'ce', or with num_labels=1 'bce', 'mse' or 'hinge'; or an installed plugin."},
    )
    num_labels: int = field(
        default=2,
        metadata={"help": "Outputs of the head: 2 (wrong, right), 3 (labels -1, 0, 1), or 1 (bce, mse, hinge)."},
    )
    step_separator: str = field(default="\n", metadata={"help": "Text after each step."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Cut completions after this number of tokens; labels after the cut are lost."}
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train only on the label of the last step; evaluation uses all steps."}
    )
    mask_after_first_error: bool = field(
        default=False, metadata={"help": "Ignore the labels of steps after the first wrong one."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_labels not in (1, 2, 3):
            raise ValueError(f"num_labels={self.num_labels}. Needed: 1, 2 (wrong, right) or 3 (labels -1, 0, 1).")
        if not isinstance(self.step_separator, str):
            raise ValueError(f"step_separator={self.step_separator!r} is no text. Needed: a string; quote it in YAML.")
