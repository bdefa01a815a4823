"""Arguments of [`SegmentRewardTrainer`]."""

from dataclasses import dataclass, field

from trl_ext.trainers.token.config import TokenRewardConfig


@dataclass
class SegmentRewardConfig(TokenRewardConfig):
    r"""
    Configuration of [`SegmentRewardTrainer`]: the arguments of [`TokenRewardConfig`], and the ones below.

    Args:
        categories (`list[str]`, *optional*):
            Names of the categories, in the order of the head's outputs. Defaults to the categories in the training
            data, sorted. For a stream you must name them.
        loss_type (`str`, *optional*, defaults to `"mse"`):
            `"mse"` for scores (Xiao & Zhu, eq. 10.70), `"hinge"` (eq. 10.71) and `"bce"` for good and bad, `"ce"` for
            two or three classes.
        num_labels (`int`, *optional*, defaults to `1`):
            Outputs of the head for each category: 1, or for `"ce"` 2 (labels 0 and 1) or 3 (labels -1, 0, 1).
    """

    categories: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the categories in the order of the outputs; default: those of the training data."},
    )
    loss_type: str = field(
        default="mse",
        metadata={"help": "Token loss: 'mse', 'hinge', 'bce', 'ce' or the name of an installed plugin."},
    )
    num_labels: int = field(
        default=1,
        metadata={"help": "Outputs of the head for each category: 1, or for 'ce' 2 or 3 (labels -1, 0, 1)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels}. Needed: 1, or for loss_type='ce' 2 or 3.")
        names = self.categories or []
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(f"categories={names} must be different names, none of them empty.")
