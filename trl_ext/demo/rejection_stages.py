"""The stage `rejection`: fine-tunes the policy on samples that the verifier, a model or chance selects.

All arms select from one set of samples, whose prompts no reward model was trained on. All keep the same number of
samples per prompt. The control selects at random, so it shows how much training on any of the policy's texts helps.
The gain over the control is the value of the selection.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_ext.demo.picking import mean_and_error, paired_gain
from trl_ext.demo.policy import sample_solutions
from trl_ext.demo.task import Problem, make_problems, verify
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
from trl_ext.pipelines.reward_functions import RewardFunc
from trl_ext.pipelines.stages.cached_stages import StageContext


CONTROL = "random"
BATCH_SIZE = 16
LEARNING_RATE = 3e-4
GENERATION_BATCH_SIZE = 1024  # completions


def verifier_rating(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The verifier as a reward function. It returns the rating of each solution."""
    problems = [Problem(tuple(map(int, prompt.removesuffix(":\n")))) for prompt in prompts]
    return [verify(*pair).rating for pair in zip(problems, completions, strict=True)]


def run_rejection(context: StageContext) -> dict[str, Any]:
    """
    Samples once, selects in several ways, fine-tunes the policy on each selection, and measures its accuracy.

    Each arm keeps the `kept` best samples of each prompt. The verifier, the outcome model or the Plackett-Luce model
    ranks them. The control draws as many at random from all samples, duplicates included, so it trains on what the
    policy generates.

    Returns:
        `dict`: `before`, the chance that one of the policy's samples is right, and `arms`. Each arm has `exact_match`
        after fine-tuning, the paired gains `over_before` and `over_random` (all on held-out prompts), the number of
        training `rows`, and the share of them that are `right`.
    """
    settings = context.settings
    policy = context.folders["policy"].resolve()
    problems = make_problems(settings["train_prompts"] + settings["rejection_prompts"], "train", settings["seed"])
    problems = problems[settings["train_prompts"] :]  # the stage `samples` used the first ones
    held_out = make_problems(settings["held_out_prompts"], "held_out", settings["seed"])
    rewards: dict[str, RewardFunc] = {
        "verifier": verifier_rating,
        "orm": str(context.folders["orm"].resolve()),
        "reward": str(context.folders["reward"].resolve()),
    }
    select = _selections(context, policy, problems, rewards)

    before = exact_match(policy, held_out, settings)
    context.progress(0.1)
    arms: dict[str, Any] = {}
    found: dict[str, list[float]] = {}
    for number, name in enumerate([CONTROL, *rewards]):
        rows = select(name)
        context.progress(0.1 + 0.9 * (number + 0.4) / (1 + len(rewards)))
        target = context.folder / name
        _fine_tune(policy, rows, target, settings)
        found[name] = exact_match(target, held_out, settings)
        right = [rating > 1 for rating in verifier_rating(rows["prompt"], rows["completion"])]
        arms[name] = {
            "exact_match": mean_and_error(found[name]),
            "over_before": paired_gain(found[name], before),
            "over_random": paired_gain(found[name], found[CONTROL]),
            "rows": len(rows),
            "right": sum(right) / len(right),
        }
        context.progress(0.1 + 0.9 * (number + 1) / (1 + len(rewards)))
    return {"before": mean_and_error(before), "arms": arms}


def _selections(
    context: StageContext, policy: Path, problems: Sequence[Problem], rewards: dict[str, RewardFunc]
) -> Callable[[str], Dataset]:
    """Returns a function that selects the rows of an arm. The samples and each reward's scores are computed once."""
    settings = context.settings
    prompts = [{"prompt": problem.prompt} for problem in problems]

    def select(name: str) -> Dataset:
        sampler = RejectionSampler(
            str(policy),
            rewards["verifier" if name == CONTROL else name],
            prompts,
            context.folder / "samples",
            settings["num_samples"],
            seed=settings["seed"],
            shard_size=GENERATION_BATCH_SIZE // settings["num_samples"],
            generation_batch_size=GENERATION_BATCH_SIZE,
            temperature=settings["temperature"],
            max_completion_length=2 * max(len(problem.digits) for problem in problems) + 4,
            generation_kwargs={"min_new_tokens": 1},
            isolate="never",
        )
        sampler.generate()
        sampler.score()
        if name == CONTROL:
            return sampler.select("random_per_prompt", {"n": settings["kept"], "seed": settings["seed"]}).dataset
        return sampler.select("top_per_prompt", {"n": settings["kept"]}).dataset

    return select


def _fine_tune(policy: Path, rows: Dataset, target: Path, settings: dict[str, Any]) -> None:
    """Trains the policy for one epoch with `trl.SFTTrainer` and saves it to `target`."""
    args = SFTConfig(
        output_dir=str(target),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        seed=settings["seed"],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(model=str(policy), args=args, train_dataset=rows.select_columns(["prompt", "completion"]))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(target))


def exact_match(policy: Path, problems: Sequence[Problem], settings: dict[str, Any]) -> list[float]:
    """The share of right samples for each problem."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    samples = sample_solutions(
        model,
        tokenizer,
        problems,
        settings["eval_samples"],
        seed=settings["seed"],
        temperature=settings["temperature"],
    )
    verdicts = [
        [verify(problem, text).answer_right for text in texts]
        for problem, texts in zip(problems, samples, strict=True)
    ]
    return [sum(row) / len(row) for row in verdicts]
