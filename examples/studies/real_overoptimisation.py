"""Over-optimisation with a real language model: the gold reward of the best of n, picked by each kind of reward model.

    python examples/studies/real_overoptimisation.py --model FOLDER --json result.json    # run it again to go on
    python examples/studies/real_overoptimisation.py --smoke                              # a random model

The policy is the language model itself (docs/results/real_data.md names one). It completes sums, differences and
products of small numbers, and the exact result is the gold reward. Reward models learn from one pair for each of the
training problems, a quarter of them turned round, as in *Reward Model Ensembles Help Mitigate Overoptimization* by
T. Coste et al. (https://huggingface.co/papers/2310.02743): one model; the mean of four, and their mean less their
standard deviation; four merged into one (WARM); and one model less the standard deviation of its last layer (Laplace).
All have adapters on the last quarter of the layers and see the same pairs, with the same labels, for as many epochs.
Members of the ensemble differ in their heads and in the order of the pairs; those that are merged in the order alone.

Each pick is averaged over all subsets of a problem's samples, so no figure depends on a draw. `predicted n` comes from
one half of the problems and the best n from the other half, see `trl_ext.evaluation`. Stages are kept in the output
folder.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Container, Iterable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_measures import interval
from real_sets import Row, StudySet
from real_training import Arm, Budget, examples, train

from trl_ext import RewardScorer, evaluate_reward_model, merge_reward_models
from trl_ext.demo.model import tiny_reward_base
from trl_ext.evaluation.families.best_of_n import best_of_each
from trl_ext.metrics.bootstrap import bootstrap_means
from trl_ext.models.fingerprint import model_identity
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, load_policy
from trl_ext.pipelines.stages.cached_stages import Stage, StageContext, run_stages


PAIRS = StudySet("pairs of sums", "made by this script", "ranked", lambda folder: iter(()), ())
ARM = Arm("LoRA", {"loss_type": "bradley_terry"})
FLIPPED = 0.25  # share of the pairs that are turned round, the same ones for all reward models
MEMBERS = 4
PROXIES = {
    "one": "one model",
    "mean": "ensemble of four, mean",
    "lower": "ensemble of four, mean - std",
    "merged": "four merged (WARM)",
    "laplace": "one model, mean - std (Laplace)",
}


def problems(number: int, seed: int, known: Container[str] = ()) -> dict[str, int]:
    """Prompts and results: sums, differences, products in turn; none twice, in `known`, or turned round of these."""
    rng, found, used = random.Random(seed), {}, set(known)
    while len(found) < number:
        sign = "+-x"[len(found) % 3]
        a, b = (rng.randint(2, 30), rng.randint(2, 12)) if sign == "x" else (rng.randint(10, 60), rng.randint(2, 30))
        result = a * b if sign == "x" else a + b if sign == "+" else a - b
        prompt, turned = (f"Question: What is {x} {sign} {y}?\nAnswer: {x} {sign} {y} =" for x, y in ((a, b), (b, a)))
        if not used & {prompt, turned}:
            found[prompt] = result
            used.add(prompt)
    return found


def is_right(completion: str, result: int) -> bool:
    """Whether the completion begins with the result and goes on with no digit."""
    words = completion.split()
    return bool(words) and words[0].rstrip(".,;!") == str(result)


def run_samples(
    context: StageContext, model: str, asked: dict[str, int], samples: int, device: str, seed: int, smoke: bool
) -> dict[str, Any]:
    if smoke:  # a random model is never right
        made = {prompt: [f" {result + n % 3}" for n in range(samples)] for prompt, result in asked.items()}
        return {"samples": made}
    sampling = Sampling(max_completion_length=6, temperature=1.0, stop=["\n"])
    policy = load_policy(model, {"dtype": "bfloat16"}).to(device)
    generator = TransformersGenerator(policy, sampling, batch_size=64)
    found = generator.generate(list(asked), num_generations=samples, seed=seed)
    return {"samples": {prompt: [c.text for c in own] for prompt, own in zip(asked, found, strict=True)}}


def pairs(samples: dict[str, list[str]], results: dict[str, int]) -> list[Row]:
    """A right and a wrong sample of each problem that has both; of some of them the wrong one is called right."""
    rng, rows = random.Random(0), []
    for prompt, texts in samples.items():
        right = [text for text in texts if text and is_right(text, results[prompt])]
        wrong = [text for text in texts if text and not is_right(text, results[prompt])]
        if right and wrong:
            labels = [0.0, 1.0] if rng.random() < FLIPPED else [1.0, 0.0]
            rows.append(Row(prompt, prompt, [rng.choice(right), rng.choice(wrong)], labels))
    return rows


def run_member(
    context: StageContext, model: str, results: dict[str, int], seed: int, order: int, args: argparse.Namespace
) -> dict[str, Any]:
    rows = pairs(context.results["training"]["samples"], results)
    arm = Arm(ARM.title, {**ARM.config, "data_seed": 100 * order})  # each epoch adds 1
    budget, states = Budget(**args.budget), args.output_dir / "states"
    trainer = train(rows, PAIRS, arm, budget, seed, model, context.folder, states, args.device)
    trainer.save_model(str(context.folder))
    return {"pairs": len(rows)}


def run_scores(context: StageContext, results: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """The score of every held-out sample by each proxy."""
    samples = context.results["held-out"]["samples"]
    different = [(prompt, text) for prompt, texts in samples.items() for text in dict.fromkeys(texts)]
    asked = [prompt for prompt, _ in different], [text for _, text in different]
    members = np.array([RewardScorer(context.folders[f"member-{m}"])(*asked) for m in range(MEMBERS)])  # (M, N)
    with tempfile.TemporaryDirectory() as temporary:
        merge_reward_models([context.folders[f"merging-{m}"] for m in range(MEMBERS)], f"{temporary}/merged")
        merged = RewardScorer(f"{temporary}/merged")(*asked)
    rows = pairs(context.results["training"]["samples"], results)
    one = RewardScorer(context.folders["member-0"])
    one.fit_uncertainty(examples(rows, PAIRS, ARM, seed=0))
    means, deviations = (np.array(found) for found in one.score_with_uncertainty(*asked))
    members = (members - members.mean(1, keepdims=True)) / members.std(1, keepdims=True)
    scores = {
        "one": members[0],
        "mean": members.mean(0),
        "lower": members.mean(0) - members.std(0, ddof=1),
        "merged": np.array(merged),
        "laplace": means - deviations,
    }
    found = {}
    for proxy, values in scores.items():
        of_text = dict(zip(different, values.tolist(), strict=True))
        found[proxy] = {prompt: [of_text[prompt, text] for text in texts] for prompt, texts in samples.items()}
    return {"scores": found}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """The samples and scores of the held-out problems, and the number of pairs."""
    training = problems(args.train_prompts, 0)
    held_out = problems(args.prompts, 1, known=training)
    common = {"model": model_identity(args.model), "device": args.device}
    stages = [
        Stage(
            name,
            f"{name} samples",
            partial(
                run_samples,
                model=args.model,
                asked=asked,
                samples=number,
                device=args.device,
                seed=seed,
                smoke=args.smoke,
            ),
            {**common, "prompts": list(asked), "samples": number, "seed": seed},
        )
        for seed, (name, asked, number) in enumerate(
            (("training", training, args.train_samples), ("held-out", held_out, args.samples)), start=1
        )
    ]
    for member in range(MEMBERS):
        # weights that are merged must begin as the same head
        for name, seed in (("member", member), ("merging", 0)):
            work = partial(run_member, model=args.model, results=training, seed=seed, order=member, args=args)
            settings = {
                **common,
                "seed": seed,
                "order": member,
                "budget": args.budget,
                "arm": asdict(ARM),
                "flipped": FLIPPED,
            }
            stages.append(Stage(f"{name}-{member}", f"{name} {member}", work, settings, needs=("training",)))
    needed = tuple(stage.name for stage in stages)
    stages.append(Stage("scores", "scores", partial(run_scores, results=training, args=args), common, needs=needed))
    outcomes = run_stages(
        stages,
        args.output_dir,
        on_end=lambda stage, outcome: print(f"{stage.title}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True),
    )
    gold = {
        prompt: [float(is_right(text, held_out[prompt])) for text in texts]
        for prompt, texts in outcomes["held-out"].result["samples"].items()
    }
    return {
        "texts": outcomes["held-out"].result["samples"],
        "gold": gold,
        "scores": outcomes["scores"].result["scores"],
        "pairs": outcomes["member-0"].result["pairs"],
    }


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """For each proxy the gold reward over n, the best and the predicted n, and the gain over one model."""
    gold, prompts = found["gold"], list(found["gold"])
    curves = {
        proxy: np.array([best_of_each(np.array(gold[p]), np.array(own[p])) for p in prompts])
        for proxy, own in {**found["scores"], "oracle": gold}.items()
    }  # (N, n) each
    proxies = {}
    for proxy, own in found["scores"].items():
        lookup = {(p, text): score for p in prompts for text, score in zip(found["texts"][p], own[p], strict=True)}

        def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [lookup[key] for key in zip(prompts, completions, strict=True)]  # noqa: B023 (used at once)

        rows = [{"prompt": p, "completions": found["texts"][p], "gold": gold[p]} for p in prompts]
        report = evaluate_reward_model(score, rows, probes=False)
        gains = curves[proxy] - curves["one"]
        proxies[proxy] = {
            "gold": {n: interval_of(curves[proxy][:, n - 1]) for n in sizes(curves[proxy].shape[1])},
            "less one model": {n: interval_of(gains[:, n - 1]) for n in sizes(gains.shape[1])},
            **{
                name: {"value": report.metrics[name], "interval": report.intervals.get(name)}
                for name in ("best_n", "predicted_n")
            },
        }
    oracle = {n: interval_of(curves["oracle"][:, n - 1]) for n in sizes(curves["oracle"].shape[1])}
    return {"problems": len(prompts), "pairs": found["pairs"], "oracle": oracle, "proxies": proxies}


def sizes(most: int) -> list[int]:
    return [n for n in (1, 4, 16, 64) if n <= most]


def interval_of(values: np.ndarray) -> dict[str, float]:
    """The mean over problems, with a 95 % bootstrap interval."""
    drawn = bootstrap_means(torch.tensor(values), torch.arange(len(values)), len(values)).numpy()
    return interval(np.concatenate([[values.mean()], drawn]))


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    numbers = list(found["oracle"])
    columns = ["best of n by", *(f"n = {n}" for n in numbers), f"less one model, n = {numbers[-1]}"]
    columns += ["best n", "predicted n"]
    lines = [["the gold reward itself", *(f"{found['oracle'][n]['value']:.3f}" for n in numbers), "", "", ""]]
    for proxy, own in found["proxies"].items():
        gain = own["less one model"][numbers[-1]]
        line = [PROXIES[proxy], *(f"{own['gold'][n]['value']:.3f}" for n in numbers)]
        line.append("" if proxy == "one" else f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")
        lines.append([*line, *(number_cell(own[name]) for name in ("best_n", "predicted_n"))])
    return columns, lines


def number_cell(found: dict[str, Any]) -> str:
    """A number of samples with its interval, if there is one."""
    known = found["interval"]
    return f"{found['value']:.0f}" + (f" ({known[0]:.0f} to {known[1]:.0f})" if known else "")


def write(path: Path, found: dict[str, Any], args: argparse.Namespace, command: Iterable[str]) -> None:
    columns, lines = table(found)
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores, no GPU"
    note = (
        f"The share of right picks over {found['problems']} problems with {args.samples} samples each by "
        f"{Path(args.model).name} at temperature 1; averages over all subsets of n samples, 95 % intervals over "
        f"problems. Each reward model saw {found['pairs']} pairs, a quarter of them turned round."
    )
    report = {"title": "Best of n by a real model: right answers", "date": date.today().isoformat(), "machine": place}
    report |= {"command": list(command), "note": note, "columns": columns, "rows": lines, "figures": found}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--train_prompts", type=int, default=600)
    parser.add_argument("--train_samples", type=int, default=16, help="of a training problem")
    parser.add_argument("--prompts", type=int, default=150, help="held-out problems")
    parser.add_argument("--samples", type=int, default=64, help="of a held-out problem: the largest n")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning_rate", type=float, default=Budget.learning_rate)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_overoptimisation"))
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            args.train_prompts, args.train_samples, args.prompts, args.samples, args.epochs = 40, 8, 6, 8, 1.0
            args.output_dir = Path(temporary, "out")
            args.model = args.model or tiny_reward_base(f"{temporary}/model", hidden_size=32, num_layers=4)
        if not args.model:
            parser.error("--model is needed: the folder of a language model.")
        args.budget = asdict(Budget(args.epochs, 0 if args.smoke else Budget.least_steps, args.learning_rate))
        found = figures(run_all(args))
    if args.json:
        command = f"python examples/studies/real_overoptimisation.py --model FOLDER --samples {args.samples}"
        write(args.json, found, args, [command])
    columns, lines = table(found)
    print("\n".join("| " + " | ".join(line) + " |" for line in [columns, *lines]))


if __name__ == "__main__":
    main(sys.argv[1:])
