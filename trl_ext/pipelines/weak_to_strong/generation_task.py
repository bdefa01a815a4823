"""The task of weak-to-strong generation: the strong student learns from texts that a weak model generates.

It knows texts, a metric that judges them, and the trainer with a weak teacher. It knows no splits, seeds or reports.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from trl_ext.models.adapters import check_policy_adapter
from trl_ext.pipelines.generation.records import text_of, with_completion
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, load_policy
from trl_ext.pipelines.reward_functions import reward_identity
from trl_ext.pipelines.weak_to_strong.tasks import Judgement, Metric, Row, SavedModel, Task
from trl_ext.trainers import WeakToStrongConfig, WeakToStrongTrainer
from trl_ext.trainers.weak_to_strong.trainer import check_same_vocabulary


logger = logging.getLogger(__name__)


def exact_match(prompts: list, completions: list, completion: list, **columns: Any) -> list[float]:
    """A TRL reward function: 1 if the text equals the reference `completion` up to surrounding space, else 0."""
    pairs = zip(completions, completion, strict=True)
    return [float(text_of(text).strip() == text_of(gold).strip()) for text, gold in pairs]


class GenerationTask(Task):
    """
    Texts (`prompt`, `completion`). A model's label is the completion that it generates.

    Args:
        metric (`Callable`, *optional*, defaults to [`exact_match`]):
            A reward function in [0, 1] that judges a completion; all other columns are passed to it.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the weak labels; 0 is greedy. Other splits are always greedy.
        max_completion_length (`int`, *optional*, defaults to `256`): longest text in tokens.
    """

    name = "generation"
    trainer, config = WeakToStrongTrainer, WeakToStrongConfig
    columns = ("prompt", "completion")
    student_losses = ("xent", "sft", "kd")
    labels_are_texts = True

    def __init__(self, metric: Metric | None = None, temperature: float = 0.0, max_completion_length: int = 256):
        self.metric = exact_match if metric is None else metric
        self._temperature = temperature
        self._max_completion_length = max_completion_length

    @classmethod
    def make(cls, metric: Metric | None = None, temperature: float = 0.0, max_completion_length: int = 256) -> Task:
        return cls(metric, temperature, max_completion_length)

    def check_adapter(self, peft_config: PeftConfig | None) -> None:
        check_policy_adapter(peft_config, initialised=False)

    def check_split(self, rows: Sequence[Row], split: str) -> None:
        return  # any text can be learnt from and compared

    def unused_columns(self, columns: Sequence[str]) -> list[str]:
        return []  # the metric gets all columns

    def gold_class(self, row: Row) -> str:
        return "text"

    def check(
        self, args: TrainingArguments, student_loss: str, weak_models: Sequence[str], strong_models: Sequence[str]
    ) -> None:
        if student_loss != "kd":
            return
        if args.kd_weight == 0:
            raise ValueError("student_loss='kd' with kd_weight=0 has no teacher. Raise kd_weight, or choose 'xent'.")
        for strong in strong_models:
            tokenizer = AutoTokenizer.from_pretrained(strong, trust_remote_code=args.trust_remote_code)
            for weak in weak_models:
                other = AutoTokenizer.from_pretrained(weak, trust_remote_code=args.trust_remote_code)
                check_same_vocabulary(tokenizer, other, weak)

    def loss_arguments(self, loss: str, loss_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if loss == "kd":
            return {}
        return {"kd_weight": 0.0, "kd_schedule": "constant", "teacher_model_init_kwargs": None}

    def trainer_inputs(
        self,
        model: str,
        args: TrainingArguments,
        quantization_config: BitsAndBytesConfig | None,
        teacher: SavedModel | None,
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = {"model": model, "args": args}
        if args.kd_weight > 0:
            teacher_kwargs = teacher.init_kwargs | (args.teacher_model_init_kwargs or {})
            inputs["teacher_model"] = load_policy(teacher.folder, teacher_kwargs)
        if quantization_config is not None:  # SFTTrainer takes it inside model_init_kwargs
            init_kwargs = {"quantization_config": quantization_config, **(args.model_init_kwargs or {})}
            inputs["model"] = load_policy(model, init_kwargs)
            args.model_init_kwargs = None
        return inputs

    def judge_model(
        self, saved: SavedModel, splits: Mapping[str, Sequence[Row]], seed: int
    ) -> dict[str, list[Judgement]]:
        model, tokenizer = load_policy(saved.folder, saved.init_kwargs), AutoTokenizer.from_pretrained(saved.folder)
        judged = {}
        for name, rows in splits.items():
            temperature = self._temperature if name == "labelled" else 0.0
            sampling = Sampling(max_completion_length=self._max_completion_length, temperature=temperature)
            generator = TransformersGenerator(model, sampling, processing_class=tokenizer)
            found = generator.generate([row["prompt"] for row in rows], num_generations=1, seed=seed, columns=rows)
            texts = [with_completion(row["prompt"], one.text)[1] for row, (one,) in zip(rows, found, strict=True)]
            judged[name] = self.judge_texts(texts, rows, [one.finish_reason == "stop" for (one,) in found])
        return judged

    def judge_texts(
        self, texts: Sequence[str | list[dict]], rows: Sequence[Row], finished: Sequence[bool]
    ) -> list[Judgement]:
        """Judge texts with the metric. Raises `ValueError` unless it gives one number in [0, 1] for each row."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        prompts = [with_completion(row["prompt"], "")[0] for row in rows]  # a begun answer is part of the text
        values = self.metric(prompts=prompts, completions=list(texts), **columns)
        wrong = [value for value in values if value is None or not 0.0 <= value <= 1.0]
        if len(values) != len(rows) or wrong:
            raise ValueError(
                f"The metric gave {len(values)} values for {len(rows)} rows, and {len(wrong)} are not in [0, 1]. "
                "Needed: one number from 0 to 1 for each row."
            )
        return [Judgement(float(value), *text) for value, *text in zip(values, texts, finished, strict=True)]

    def relabel(self, row: Row, output: str, hard: bool) -> Row:
        return {**row, "prompt": with_completion(row["prompt"], "")[0], "completion": output}

    def learnable(
        self, rows: Sequence[Row], labels: Sequence[Judgement], hard: bool
    ) -> tuple[list[Row], dict[str, Any]]:
        """
        The texts that are complete and not empty. SFT would append an end of text to a text that was cut at the limit,
        and the student would learn to stop in the middle. GRPO's `mask_truncated_completions` drops such texts too.
        """
        reasons = [self._why_unusable(label) for label in labels]
        left_out = {reason: reasons.count(reason) for reason in ("cut", "empty")}
        found = f"{left_out['cut']} were cut at max_completion_length={self._max_completion_length} and "
        found += f"{left_out['empty']} are empty"
        kept = [pair for *pair, reason in zip(rows, labels, reasons, strict=True) if reason is None]
        if not kept:
            raise ValueError(
                f"The weak model generated no usable text: of {len(rows)} texts {found}. Train it longer "
                "(weak_training), or raise max_completion_length."
            )
        if len(kept) < len(rows):
            logger.warning(f"Of {len(rows)} weak texts {found}. The student does not learn from these.")
        return [self.relabel(row, label.output, hard) for row, label in kept], {"left_out": left_out}

    @staticmethod
    def _why_unusable(label: Judgement) -> str | None:
        if not label.finished:
            return "cut"
        return None if text_of(label.output) else "empty"

    def settings(self, judged: Sequence[str]) -> dict[str, Any]:
        metric = reward_identity(self.metric)
        if metric is None:
            raise ValueError(
                "The metric is an ensemble in memory, which a later run cannot recognise. Save it, and pass a scorer "
                "of the saved ensemble."
            )
        settings = super().settings(judged) | {"metric": metric, "length": self._max_completion_length}
        return settings | ({"temperature": self._temperature} if "labelled" in judged else {})
