"""The same evaluation while a reward model trains: after each of the trainer's own evaluations.

It knows the callback interface of transformers.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from trl_ext.evaluation.evaluate import LOADED, Rows, evaluate_reward_model
from trl_ext.models.heads import unwrap
from trl_ext.scoring import RewardScorer


OF_PATHS = {"base_model", "model"}  # the options of a scorer that say where a model is


class EvaluationCallback(TrainerCallback):
    """
    Runs [`evaluate_reward_model`] whenever the trainer evaluates (`eval_strategy`).

    Its numbers join those of the trainer as `eval_<prefix>_<metric>`, so that `metric_for_best_model` can name one, as
    in `metric_for_best_model="eval_probe_accuracy"`. Slashes in names become underscores.

    Args:
        dataset (rows, or a mapping from names to rows): as for [`evaluate_reward_model`].
        prefix (`str`, *optional*, defaults to `"probe"`): in front of the names of metrics.
        metrics (`list[str]`, *optional*): the numbers to report; all by default.
        **kwargs: for [`evaluate_reward_model`], and for the [`RewardScorer`] of the model in training, such as
            `max_length`. `probes` is off unless it is given.

    Raises:
        `TypeError`: the data set is an iterator, or there is no such argument.

    Example:

    ```python
    trainer = RewardTrainer(..., callbacks=[EvaluationCallback(held_out, metrics=["accuracy", "length_accuracy"])])
    ```

    With a trainer of another package, call `callback.follow(trainer)` so that the numbers are logged wherever that
    trainer reports to; without it they are in `trainer.state.log_history` alone.
    """

    def __init__(
        self,
        dataset: Rows | Mapping[str, Rows],
        prefix: str = "probe",
        metrics: list[str] | None = None,
        **kwargs: Any,
    ):
        data = dataset.values() if isinstance(dataset, Mapping) else [dataset]
        if any(isinstance(rows, Iterator) for rows in data):
            raise TypeError(
                "The data set of EvaluationCallback is an iterator, which the first evaluation would use up. Pass a "
                "list, a Dataset or an IterableDataset."
            )
        evaluation = inspect.signature(evaluate_reward_model).parameters
        options = {name: value for name, value in kwargs.items() if name not in evaluation}
        loads = isinstance(kwargs.get("compare"), LOADED)
        known = inspect.signature(RewardScorer).parameters.keys() - {"model_or_path", "processing_class"}
        unknown = sorted(options.keys() - (known if loads else known - OF_PATHS))
        if unknown:
            raise TypeError(
                f"EvaluationCallback got {unknown}; needed: arguments of evaluate_reward_model, or of RewardScorer "
                "for a model in memory."
            )
        self.dataset, self.prefix, self.metrics = dataset, prefix, metrics
        self.kwargs = {"probes": False, "resamples": 200} | kwargs
        if not loads:  # else they are also for the model that is compared
            self.kwargs = {name: value for name, value in self.kwargs.items() if name not in options}
        self.scorer_kwargs = {name: value for name, value in options.items() if name not in OF_PATHS}
        self.trainer: Trainer | None = None
        self._found: dict[str, float] = {}
        self._step = -1
        self._seen: set[frozenset[str]] = set()  # names of the trainer's metrics: one set for each of its data sets

    def follow(self, trainer: Trainer) -> None:
        """Log through this trainer. Our trainers call it with themselves; with others, call it yourself."""
        self.trainer = trainer

    def on_evaluate(self, args, state, control, model=None, processing_class=None, metrics=None, **kwargs):
        """
        Evaluate, log the numbers, and add them to `metrics`, which the trainer compares.

        Every process evaluates all rows, so that a model that is spread over processes can run, and gets the numbers
        of the main process, so that all of them choose the same checkpoint.
        """
        if metrics is None:
            return
        names = frozenset(metrics)
        if state.global_step == self._step and names not in self._seen:  # the trainer's next data set, the same model
            self._seen.add(names)
            metrics.update(self._found)
            return
        self._step, self._seen = state.global_step, {names}
        self._found = self._evaluate(model, processing_class, state.is_world_process_zero)
        metrics.update(self._found)
        if self.trainer is not None:
            self.trainer.log(dict(self._found))
        elif state.is_world_process_zero:
            state.log_history.append({**self._found, "epoch": state.epoch, "step": state.global_step})

    def _evaluate(self, model, processing_class, is_main: bool) -> dict[str, float]:
        kwargs = self.kwargs if is_main else self.kwargs | {"output_dir": None}
        model = unwrap(model) if hasattr(model, "module") else model
        scorer = RewardScorer(model, processing_class=processing_class, **self.scorer_kwargs)
        report = evaluate_reward_model(scorer, self.dataset, **kwargs)
        unknown = [name for name in self.metrics or [] if name not in report.metrics]
        if unknown:
            raise ValueError(
                f"EvaluationCallback is to report {unknown}; these rows have {', '.join(report.metrics)}."
            )
        wanted = report.metrics if self.metrics is None else {name: report.metrics[name] for name in self.metrics}
        found = {f"eval_{self.prefix}_{name.replace('/', '_')}": value for name, value in wanted.items()}
        return broadcast_object_list([found])[0]
