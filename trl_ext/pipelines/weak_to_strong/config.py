"""Arguments of `weak_to_strong`: models, task and splits. It checks values; it knows no models, data or trainers."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from trl_ext.pipelines.weak_to_strong.generation_task import GenerationTask
from trl_ext.pipelines.weak_to_strong.tasks import OutcomeTask, PreferenceTask, ProcessTask, Task


TASKS: dict[str, type[Task]] = {task.name: task for task in (PreferenceTask, OutcomeTask, ProcessTask, GenerationTask)}


@dataclass
class WeakToStrongArguments:
    """
    A weak-to-strong experiment. The arguments of the trainer, which are separate, say how each model is trained.

    Args:
        weak_model_name_or_path (`list[str]`):
            Weak supervisors, paths or Hub ids. Each makes a pair with each strong model.
        strong_model_name_or_path (`list[str]`):
            Strong students, paths or Hub ids. Each is also trained on ground truth, as the ceiling.
        task (`str`, *optional*, defaults to `"preference"`):
            `"preference"` (pairs), `"outcome"` (solutions that are right or wrong), `"process"` (steps that are right
            or wrong; `"steps"`, its former name, is accepted) or `"generation"`.
        student_loss (`str`, *optional*, defaults to `"xent"`):
            How the student learns weak labels: `"xent"`, cross-entropy to them; `"logconf"`, with the auxiliary
            confidence loss (see [`~trl_ext.losses.distillation.ConfidenceLoss`]). For generation: `"sft"` (or
            `"xent"`, which means the same) on the weak model's texts, or `"kd"`, with the divergence from the weak
            model.
        student_loss_kwargs (`dict` or `str`, *optional*):
            Arguments of `logconf`, as JSON on the command line.
        hard_labels (`bool`, *optional*, defaults to `False`):
            Round the weak labels to 0 and 1. By default they stay probabilities.
        weak_ensemble (`str`, *optional*):
            All weak models label together: by the `"mean"` of their probabilities, by `"vote"` (the share of models
            with a probability above 0.5), or with `"learned"` weights of their log-odds (extra `fusion`). By default
            each model labels alone.
        fusion_share (`float`, *optional*, defaults to `0.2`):
            For `"learned"`: the share of split A, by prompt, on which the weights are learnt. No weak model is
            trained on it.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds of training; the splits are the same for all.
        weak_share (`float`, *optional*, defaults to `0.5`):
            Share of the training rows, by prompt, that the weak model learns from (split A, as in Burns et al.). The
            rest is split B, which the students learn from.
        test_share (`float`, *optional*, defaults to `0.2`):
            Share of the rows, by prompt, held out as test split if no test data set is given.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of the splits.
        weak_training (`dict` or `str`, *optional*):
            Arguments of the trainer that differ for the weak model, as JSON on the command line, e.g.
            `{"learning_rate": 1e-3}`.
        generation_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the weak model's texts for split B; 0 is greedy. Tests are always greedy.
        max_completion_length (`int`, *optional*, defaults to `256`):
            For generation: longest text in tokens. The student does not learn from weak texts that are cut there.
        isolate (`str`, *optional*, defaults to `"auto"`):
            Whether each run has a separate process, which frees all its memory when it ends: `"auto"` (on a GPU),
            `"always"` or `"never"`.

    Raises:
        ValueError: no model is named, a value is out of its range, or values cannot be combined.
    """

    weak_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Weak supervisors: paths or Hub ids."}
    )
    strong_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Strong students: paths or Hub ids."}
    )
    task: Literal["preference", "outcome", "process", "generation", "steps"] = field(
        default="preference", metadata={"help": "'preference', 'outcome', 'process' or 'generation'."}
    )
    student_loss: Literal["xent", "logconf", "sft", "kd"] = field(
        default="xent",
        metadata={"help": "Learn weak labels by 'xent' or 'logconf'; weak texts by 'sft' or 'kd'."},
    )
    student_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of logconf as JSON, e.g. '{\"alpha\": 0.75}'."}
    )
    hard_labels: bool = field(default=False, metadata={"help": "Round the weak labels to 0 and 1."})
    weak_ensemble: Literal["mean", "vote", "learned"] | None = field(
        default=None, metadata={"help": "All weak models label together: by 'mean', 'vote' or 'learned' weights."}
    )
    fusion_share: float = field(
        default=0.2, metadata={"help": "Share of split A that 'learned' weights are fitted on, by prompt."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of training."})
    weak_share: float = field(
        default=0.5, metadata={"help": "Share of the training rows, by prompt, that the weak model learns from."}
    )
    test_share: float = field(
        default=0.2, metadata={"help": "Share of the rows held out for testing if no test data set is given."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the splits."})
    weak_training: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Trainer arguments that differ for the weak model, as JSON."}
    )
    generation_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of the weak model's texts; 0 is greedy."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens of a text."})
    isolate: Literal["auto", "always", "never"] = field(
        default="auto", metadata={"help": "Each run in its own process: 'auto' (on a GPU), 'always' or 'never'."}
    )

    def __post_init__(self):
        for name in ("weak_model_name_or_path", "strong_model_name_or_path"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
            if not getattr(self, name):
                raise ValueError(f"No model was named. Give {name} a path or a Hub id.")
        for name in ("weak_share", "test_share", "fusion_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not a share. Needed: a number between 0 and 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}. Needed: at least one seed, and none twice.")
        self.task = "process" if self.task == "steps" else self.task
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not known. Needed: one of {', '.join(map(repr, TASKS))}.")
        task = TASKS[self.task]
        if self.student_loss not in task.student_losses:
            raise ValueError(
                f"student_loss={self.student_loss!r} cannot be used with task={self.task!r}. Needed: one of "
                f"{', '.join(map(repr, task.student_losses))}."
            )
        for name in ("student_loss_kwargs", "weak_training"):
            setattr(self, name, _dictionary(name, getattr(self, name)))
        if self.student_loss_kwargs and self.student_loss != "logconf":
            raise ValueError(
                f"student_loss_kwargs are arguments of 'logconf', but student_loss is {self.student_loss!r}. Leave "
                "them out, or set student_loss='logconf'."
            )
        if self.weak_ensemble not in (None, "mean", "vote", "learned"):
            raise ValueError(f"weak_ensemble={self.weak_ensemble!r}. Needed: 'mean', 'vote', 'learned', or nothing.")
        if self.weak_ensemble and task.labels_are_texts:
            raise ValueError("weak_ensemble averages probabilities; texts cannot be averaged. Leave it out.")
        if self.generation_temperature < 0 or self.max_completion_length < 1:
            raise ValueError("generation_temperature must be at least 0 and max_completion_length at least 1.")


def _dictionary(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Read a dictionary, or JSON of one; `None` gives an empty one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON ({error}).") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a dictionary.")
    return dict(value or {})
