"""The same evaluation while a reward model trains: after each of the trainer's own evaluations.

It knows the callback interface of transformers.
"""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from trl_ext.evaluation.evaluate import Rows, evaluate_reward_model
from trl_ext.models.heads import unwrap
from trl_ext.scoring import RewardScorer


class EvaluationCallback(TrainerCallback):
    """
    Runs [`evaluate_reward_model`] whenever the trainer evaluates (`eval_strategy`).

    Its numbers join those of the trainer as `eval_<prefix>_<metric>`, so that `metric_for_best_model` can name one, as
    in `metric_for_best_model="eval_probe_accuracy"`. Slashes in names become underscores.

    Args:
        dataset (rows, or a mapping from names to rows): as for [`evaluate_reward_model`].
        prefix (`str`, *optional*, defaults to `"probe"`): in front of the names of metrics.
        metrics (`list[str]`, *optional*): the numbers to report; all by default.
        **kwargs: for [`evaluate_reward_model`]. `probes` is off unless it is given.

    Example:

    ```python
    trainer = RewardTrainer(..., callbacks=[EvaluationCallback(held_out, metrics=["accuracy", "length_accuracy"])])
    ```
    """

    def __init__(
        self,
        dataset: Rows | Mapping[str, Rows],
        prefix: str = "probe",
        metrics: list[str] | None = None,
        **kwargs: Any,
    ):
        self.dataset, self.prefix, self.metrics = dataset, prefix, metrics
        self.kwargs = {"probes": False, "resamples": 200} | kwargs

    def on_evaluate(self, args, state, control, model=None, processing_class=None, metrics=None, **kwargs):
        """Evaluate on the main process and add the numbers to `metrics`, which the trainer reports and compares."""
        if not state.is_world_process_zero or metrics is None:
            return
        scorer = RewardScorer(unwrap(model) if hasattr(model, "module") else model, processing_class=processing_class)
        report = evaluate_reward_model(scorer, self.dataset, **self.kwargs)
        wanted = report.metrics if self.metrics is None else {name: report.metrics[name] for name in self.metrics}
        metrics.update({f"eval_{self.prefix}_{name.replace('/', '_')}": value for name, value in wanted.items()})
