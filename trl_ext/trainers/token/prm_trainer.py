"""`PRMTrainer`: trains a process reward model that judges each step. `trainer.py` has the training loop."""

from typing import Any

from trl_ext.trainers.token.evaluation import StepEvaluator
from trl_ext.trainers.token.prm_config import PRMConfig
from trl_ext.trainers.token.trainer import TokenRewardTrainer


class PRMTrainer(TokenRewardTrainer):
    """
    Trainer for process reward models: is this step right?

    It replaces the `PRMTrainer` that TRL had up to 1.13: change the import, and your scripts and data sets stay as
    they are. It adds three classes, soft labels, LoRA and QLoRA with a head that is saved, chats, streams, and more
    metrics than accuracy. The last token of a step's separator gets the label of the step.

    Rows: `prompt`, `completions` (a list of steps) and `labels`, one for each step: a bool, 0 or 1, or a probability.
    With `num_labels=3` a label is -1, 0 or 1. A step without a label has null.
    Metrics: base rate, per-class precision, recall and F1, balanced accuracy, AUC up to the first error, accuracy of
    the first error and ProcessBench's F1. With three classes, neutral counts as right in these metrics, and
    `class_...` has the metrics of each class.

    The arguments are those of [`TokenRewardTrainer`]. `args` is a [`PRMConfig`].

    Example:

    ```python
    row = {"prompt": "What is 3 + 4, doubled?", "completions": ["3 + 4 = 7", "7 * 2 = 15"], "labels": [True, False]}
    trainer = PRMTrainer(
        model="Qwen/Qwen3-0.6B",
        args=PRMConfig(output_dir="outputs/prm"),
        train_dataset=Dataset.from_list([row, ...]),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "prm", "trl-ext"]
    config_class = PRMConfig
    kind = "process"
    rows = "stepwise"

    @classmethod
    def _outputs(cls, args: PRMConfig) -> int:
        return args.num_labels

    def _reading(self, args: PRMConfig, training: bool) -> dict[str, Any]:
        return {
            "step_separator": args.step_separator,
            "num_labels": args.num_labels,
            "max_completion_length": args.max_completion_length,
            "train_on_last_step_only": args.train_on_last_step_only and training,
            "mask_after_first_error": args.mask_after_first_error,
        }

    def _make_evaluator(self) -> StepEvaluator:
        return StepEvaluator(self._objective)

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "step_separator": self.args.step_separator}
