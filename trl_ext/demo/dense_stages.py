"""The stage `dense`: trains the policy by GRPO, with the outcome alone and with the process model's verdicts of lines.

Both arms see the same prompts, with as many samples of each, and both maximize the outcome: 1 for a right answer, else
0. In the second arm the process model's estimates are a potential. They tell which line changed the chance of a right
answer, and they cancel out over a whole solution, so that they are no goal of their own.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback

from trl_ext import DenseGRPOConfig, DenseGRPOTrainer, RewardScorer
from trl_ext.demo.picking import mean_and_error, paired_gain
from trl_ext.demo.rejection_stages import exact_match, verifier_rating
from trl_ext.demo.task import make_problems
from trl_ext.demo.token_stages import lines
from trl_ext.pipelines.stages.cached_stages import StageContext
from trl_ext.pipelines.stages.progress import ProgressCallback


# What differs between the arms. The lowest estimate so far is the potential: a solution is as good as its worst line.
ARMS: dict[str, dict[str, Any]] = {
    "outcome": {"advantage": "outcome"},
    "shaped": {"advantage": "shaped", "potential": "min", "gae_lambda": 1.0},
}
MAX_COMPLETION_LENGTH = 20  # eight lines of two tokens, and two lines too many


def right(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The outcome as a reward function: 1 for a right answer, else 0."""
    return [float(rating > 1) for rating in verifier_rating(prompts, completions)]


class LineRewards:
    """
    The process model as a dense reward function: P(right) of each line.

    The last line gets the estimate of the step behind it, that of ending there, because nothing else rewards the end.
    """

    __name__ = "process_model"

    def __init__(self, scorer: RewardScorer):
        self._scorer = scorer

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[Any]:
        estimates = self._scorer.score_steps(list(prompts), [lines(text) for text in completions])
        return [_spans(text, own) if text else None for text, own in zip(completions, estimates, strict=True)]


def _spans(text: str, estimates: Sequence[float]) -> list[tuple[int, int, float]]:
    parts = text.splitlines(keepends=True)
    start, spans = 0, []
    for line, estimate in zip(parts, [*estimates[: len(parts) - 1], estimates[-1]], strict=True):
        spans.append((start, start + len(line), estimate))
        start += len(line)
    return spans


def run_dense(context: StageContext) -> dict[str, Any]:
    """
    Trains one policy for each of `ARMS` and measures the share of right samples on held-out prompts.

    The policy of the arm `shaped` is saved with `policy.html`, a page of curves and of samples coloured by their
    advantages. Only this arm reports to Weights & Biases.

    Returns:
        `dict`: `before`, the chance that one of the policy's samples is right, the number of training `samples` of
        each arm, and `arms`. Each arm has `exact_match` after training and the paired gain `over_before`; the arm
        `shaped` has the paired gain `over_outcome`. All errors are over prompts: another seed of the training would
        differ by more.
    """
    settings = context.settings
    policy = context.folders["policy"].resolve()
    held_out = make_problems(settings["held_out_prompts"], "held_out", settings["seed"])
    before = exact_match(policy, held_out, settings)
    context.progress(0.05)
    found: dict[str, list[float]] = {}
    for number, name in enumerate(ARMS):
        done = 0.05 + 0.95 * number / len(ARMS)
        _train(context, name, lambda share, done=done: context.progress(done + 0.9 * share * 0.95 / len(ARMS)))
        found[name] = exact_match(context.folder / name, held_out, settings)
    context.progress(1.0)
    arms = {
        name: {"exact_match": mean_and_error(own), "over_before": paired_gain(own, before)}
        for name, own in found.items()
    }
    arms["shaped"]["over_outcome"] = paired_gain(found["shaped"], found["outcome"])
    samples = settings["steps"] * settings["batch_size"] * settings["num_samples"]
    return {"before": mean_and_error(before), "samples": samples, "arms": arms}


def _train(context: StageContext, name: str, on_progress: Any) -> None:
    """Trains the policy in one of the `ARMS` and saves it to the folder `name`."""
    settings = context.settings
    policy = context.folders["policy"].resolve()
    prompts = settings["steps"] * settings["batch_size"]
    problems = make_problems(settings["train_prompts"] + prompts, "train", settings["seed"])
    problems = problems[settings["train_prompts"] :]  # the process model learned from the first ones
    tokenizer = AutoTokenizer.from_pretrained(policy)
    dense = name != "outcome"
    args = DenseGRPOConfig(
        output_dir=str(context.folder / name),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"] * settings["num_samples"],
        num_generations=settings["num_samples"],
        max_completion_length=MAX_COMPLETION_LENGTH,
        temperature=settings["temperature"],
        generation_kwargs={
            "min_new_tokens": 1,
            "suppress_tokens": [tokenizer.pad_token_id, tokenizer.bos_token_id],
        },
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(20, settings["steps"] // 4),
        logging_steps=max(1, settings["steps"] // 10),
        log_completions=dense,
        num_completions_to_print=0,
        save_strategy="no",
        report_to=context.report_to if dense else "none",
        seed=settings["seed"],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **ARMS[name],
    )
    trainer = DenseGRPOTrainer(
        str(policy),
        right,
        LineRewards(RewardScorer(context.folders["prm"], device="cpu")) if dense else None,
        args,
        train_dataset=Dataset.from_list([{"prompt": problem.prompt} for problem in problems]),
        callbacks=[ProgressCallback(on_progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
