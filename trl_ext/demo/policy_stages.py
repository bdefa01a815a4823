"""The stages `policy` and `samples`: train the policy, sample from it, rate the samples.

The stage `samples` writes `train.jsonl` and `held_out.jsonl`. Each has one row per prompt with `prompt`,
`completions`, the verifier's `ratings`, whether each line is right (`steps_right`), and whether each whole answer is
right (`answer_right`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.demo.policy import sample_solutions, train_policy
from trl_ext.demo.task import Problem, make_problems, verify
from trl_ext.pipelines.stages.cached_stages import StageContext
from trl_ext.pipelines.stages.progress import ProgressCallback


def run_policy(context: StageContext) -> dict[str, Any]:
    """Trains the policy and saves the model and its tokenizer in the stage's folder."""
    settings = context.settings
    # Training usually stops before half of its steps, so the progress advances twice as fast.
    progress = ProgressCallback(lambda share: context.progress(min(1.0, 2 * share)))
    return train_policy(
        make_problems(settings["policy_prompts"], "policy", settings["seed"]),
        make_problems(settings["trial_prompts"], "trial", settings["seed"]),
        context.folder,
        seed=settings["seed"],
        max_steps=settings["policy_max_steps"],
        temperature=settings["temperature"],
        report_to=context.report_to,
        callbacks=[progress],
    )


def run_samples(context: StageContext) -> dict[str, Any]:
    """Samples solutions for the prompts of both splits and rates them. Reports the accuracy of the greedy answers."""
    settings = context.settings
    policy = AutoModelForCausalLM.from_pretrained(context.folders["policy"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(context.folders["policy"])
    sizes = {"train": settings["train_prompts"], "held_out": settings["held_out_prompts"]}
    done = 0
    for offset, (split, count) in enumerate(sizes.items()):
        problems = make_problems(count, split, settings["seed"])
        samples = sample_solutions(
            policy,
            tokenizer,
            problems,
            settings["num_samples"],
            seed=2 * settings["seed"] + offset,
            temperature=settings["temperature"],
            on_progress=lambda share, done=done, count=count: context.progress(
                (done + share * count) / sum(sizes.values())
            ),
        )
        done += count
        _write_rows(context.folder / f"{split}.jsonl", problems, samples)
    # `problems` and `samples` now hold the last split, which is `held_out`
    greedy = sample_solutions(policy, tokenizer, problems, 1, seed=0, temperature=0)
    right = [verify(problem, texts[0]).answer_right for problem, texts in zip(problems, greedy, strict=True)]
    different = sum(len(set(texts)) for texts in samples)
    return {
        "greedy": sum(right) / len(right),
        "different_samples": different / len(samples),
        "prompts": sizes,
        "samples_each": settings["num_samples"],
    }


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows that the stage `samples` wrote for a split, `"train"` or `"held_out"`."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_rows(path: Path, problems: Sequence[Problem], samples: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for problem, completions in zip(problems, samples, strict=True):
            verdicts = [verify(problem, completion) for completion in completions]
            row = {
                "prompt": problem.prompt,
                "completions": completions,
                "ratings": [verdict.rating for verdict in verdicts],
                "steps_right": [list(verdict.steps_right) for verdict in verdicts],
                "answer_right": [verdict.answer_right for verdict in verdicts],
            }
            file.write(json.dumps(row) + "\n")
