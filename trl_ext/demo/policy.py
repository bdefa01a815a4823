"""The deliberately mediocre policy of the demo: supervised training on right solutions, stopped early, and sampling.

It knows problems and texts. It knows nothing of ratings or reward models.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from trl_ext.demo.model import tiny_model, tiny_tokenizer
from trl_ext.demo.task import Problem, verify


class StopWhenMediocre(TrainerCallback):
    """
    Stops training when enough samples on the trial problems are right. It keeps the weights of that trial or of the
    previous one, whichever is nearer to the target.

    The accuracy of such a small model rises from 0.1 to 0.9 within a few hundred steps, and by up to 0.3 within 25
    steps. The rise starts at a different step for each seed. After a fixed number of steps, the policy would be
    hopeless or perfect, and a reward model would have nothing to choose from.

    Args:
        problems (`Sequence[Problem]`):
            The trial problems. No figure of the report uses them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        target (`float`):
            Share of right samples at which training stops, in `[0, 1]`.
        every (`int`):
            Steps between trials.
        temperature (`float`):
            Temperature of the samples.

    Attributes:
        accuracy (`float` or `None`): accuracy of the kept weights; `None` before the first trial.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: PreTrainedTokenizerBase,
        target: float,
        every: int,
        temperature: float,
    ):
        self._problems = problems
        self._tokenizer = tokenizer
        self._target = target
        self._every = every
        self._temperature = temperature
        self._weights: dict[str, torch.Tensor] = {}
        self.accuracy: float | None = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs,
    ) -> None:
        if state.global_step % self._every:
            return
        model.eval()
        with torch.random.fork_rng(devices=[]):
            samples = sample_solutions(
                model, self._tokenizer, self._problems, 1, seed=args.seed, temperature=self._temperature
            )
        model.train()
        right = [verify(p, texts[0]).answer_right for p, texts in zip(self._problems, samples, strict=True)]
        accuracy = sum(right) / len(right)
        if accuracy >= self._target:
            control.should_training_stop = True
            if self.accuracy is not None and self._target - self.accuracy < accuracy - self._target:
                model.load_state_dict(self._weights)
                return
        self.accuracy = accuracy
        self._weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_policy(
    problems: Sequence[Problem],
    trial_problems: Sequence[Problem],
    output_dir: str | Path,
    *,
    seed: int,
    max_steps: int = 1500,
    batch_size: int = 16,
    learning_rate: float = 5e-4,
    target_accuracy: float = 0.25,
    try_every: int = 10,
    temperature: float = 0.8,
    report_to: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """
    Trains a tiny model on right solutions with `trl.SFTTrainer` and saves it with its tokenizer.

    Args:
        problems (`Sequence[Problem]`):
            The problems whose solutions the model learns.
        trial_problems (`Sequence[Problem]`):
            Problems that decide when to stop.
        output_dir (`str` or `Path`):
            The folder to save the model in.
        seed (`int`):
            Seed of the weights, the order of the rows and the samples of the trials.
        max_steps (`int`, *optional*, defaults to `1500`):
            Largest number of optimizer steps. Training usually stops between 300 and 500.
        batch_size (`int`, *optional*, defaults to `16`):
            Solutions per step.
        learning_rate (`float`, *optional*, defaults to `5e-4`):
            Learning rate after a warm-up of 50 steps.
        target_accuracy (`float`, *optional*, defaults to `0.25`):
            Share of right samples at which training stops, see [`StopWhenMediocre`]. At the default, the greedy answer
            is right about half of the time.
        try_every (`int`, *optional*, defaults to `10`):
            Steps between trials.
        temperature (`float`, *optional*, defaults to `0.8`):
            Temperature of the trials' samples.
        report_to (`str`, *optional*, defaults to `"none"`):
            As in `SFTConfig`.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Further callbacks, for example to show progress.

    Returns:
        `dict[str, float]`: number of `steps`, mean `loss`, and `trial_accuracy` of the kept weights (absent if there
        was no trial).
    """
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(50, max_steps // 4),
        logging_steps=max(1, min(25, max_steps // 4)),
        save_strategy="no",
        report_to=report_to,
        seed=seed,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    tokenizer = tiny_tokenizer()
    stop = StopWhenMediocre(trial_problems, tokenizer, target_accuracy, try_every, temperature)
    rows = [{"prompt": problem.prompt, "completion": problem.solution} for problem in problems]
    trainer = SFTTrainer(
        model=tiny_model(seed),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[stop, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    output = trainer.train()
    trainer.save_model(str(output_dir))
    trial = {} if stop.accuracy is None else {"trial_accuracy": stop.accuracy}
    return {"steps": output.global_step, "loss": output.training_loss, **trial}


def sample_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    num_samples: int,
    *,
    seed: int,
    temperature: float = 0.8,
    batch_size: int = 256,
    on_progress: Callable[[float], None] | None = None,
) -> list[list[str]]:
    """
    Samples solutions. A solution ends when the model ends it, or when it is two lines longer than the longest right
    solution of its batch. No solution is empty.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        problems (`Sequence[Problem]`):
            The problems to solve.
        num_samples (`int`):
            Solutions per problem; 1 with `temperature=0`, which decodes greedily.
        seed (`int`):
            Seed of the sampling. It becomes torch's global seed.
        temperature (`float`, *optional*, defaults to `0.8`):
            Temperature of the sampling; `0` decodes greedily.
        batch_size (`int`, *optional*, defaults to `256`):
            Problems per batch.
        on_progress (`Callable[[float], None]`, *optional*):
            Called after each batch with the share of problems that are done, in `(0, 1]`.

    Returns:
        `list[list[str]]`: `num_samples` texts for each problem, in the order of `problems`.

    Raises:
        ValueError: `num_samples` is not 1 with `temperature=0`.
    """
    if temperature == 0 and num_samples != 1:
        raise ValueError(
            f"num_samples={num_samples}, but greedy decoding (temperature=0) gives one solution per problem; set "
            "num_samples=1, or a temperature above 0"
        )
    sampling = (
        {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    )
    torch.manual_seed(seed)
    solutions: list[list[str]] = []
    for first in range(0, len(problems), batch_size):
        batch = list(problems[first : first + batch_size])
        prompts = [problem.prompt for problem in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")  # (B, T)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                **sampling,
                num_return_sequences=num_samples,
                min_new_tokens=1,
                max_new_tokens=2 * max(len(problem.digits) for problem in batch) + 4,
                suppress_tokens=[tokenizer.pad_token_id, tokenizer.bos_token_id],
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # (B * K, T + new)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        solutions += [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
        if on_progress is not None:
            on_progress(len(solutions) / len(problems))
    return solutions
