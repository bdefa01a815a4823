"""`ORMTrainer`: trains an outcome verifier that scores every token. `trainer.py` has the training loop."""

from trl_ext.trainers.token.evaluation import OutcomeEvaluator
from trl_ext.trainers.token.orm_config import ORMConfig
from trl_ext.trainers.token.trainer import TokenRewardTrainer


class ORMTrainer(TokenRewardTrainer):
    """
    Trainer for outcome reward models: was the completion right?

    Each token of the completion gets the label of the completion, and so does the token that closes it (EOS or the end
    of the turn). This follows *Training Verifiers to Solve Math Word Problems* by K. Cobbe et al.
    (https://huggingface.co/papers/2110.14168), without their additional language model loss. The output at a token
    estimates how the solution will end. The output at the last token is the score of the completion. The checkpoint of
    a decoder is a plain scalar sequence-classification model: merged or full, it works in
    `GRPOTrainer(reward_funcs="path")`.

    Rows: `prompt`, `completion` and `label` (a bool, or the probability that the completion is right), as text or
    chat.
    Metrics: AUC, balanced accuracy, per-class precision and recall, calibration. If several rows share a prompt, also
    AUC within a question and best-of-n.

    The arguments are those of [`TokenRewardTrainer`]. `args` is an [`ORMConfig`].

    Example:

    ```python
    trainer = ORMTrainer(
        model="Qwen/Qwen3-0.6B",
        args=ORMConfig(output_dir="outputs/orm"),
        train_dataset=Dataset.from_list([{"prompt": "2 + 2 =", "completion": " 4", "label": True}, ...]),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl-ext", "orm"]
    config_class = ORMConfig
    kind = "outcome"
    rows = "outcome"
    append_eos = True

    def _make_evaluator(self) -> OutcomeEvaluator:
        return OutcomeEvaluator(self._objective)
