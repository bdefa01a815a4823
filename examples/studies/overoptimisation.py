"""Compare the gold reward of best-of-n with one reward model and with an ensemble of four (over-optimisation).

    python examples/studies/overoptimisation.py            # three seeds, minutes on two CPU cores
    python examples/studies/overoptimisation.py --smoke    # checks that it runs; the figures mean nothing

The setting is that of *Reward Model Ensembles Help Mitigate Overoptimization* by T. Coste et al.
(https://huggingface.co/papers/2310.02743) at a small scale. The policy solves the demo's task (sorting digits). The
members train on the same small set of pairs, in which a quarter of the labels is flipped, and differ in their seed
(head, adapter, order of rows). The gold reward is the exact verifier's: the share of right lines, plus 1 for a right
answer. The best of n by a proxy is averaged over all subsets of a prompt's samples, so no figure depends on a draw.
The KL is the bound log n - (n - 1) / n.
"""

import argparse
import math
import random
import statistics
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from quiet import QUIET
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from trl_ext import RewardEnsemble, RewardEnsembleConfig, RewardEnsembleTrainer
from trl_ext.demo.policy import sample_solutions, train_policy
from trl_ext.demo.task import make_problems, verify
from trl_ext.metrics.disagreement import error_auc, error_by_disagreement, pair_disagreement, relative_disagreement
from trl_ext.metrics.voting import best_of_k_curve, kl_bound


REDUCERS = {
    "mean": {"reduce": "mean"},
    "median": {"reduce": "median"},
    "min (WCO)": {"reduce": "min"},
    "mean - 0.5 std": {"reduce": "mean_minus_std", "coefficient": 0.5},
    "mean - 0.5 var (UWO)": {"reduce": "mean_minus_var", "coefficient": 0.5},
}


def noisy_pairs(problems: list, samples: list[list[str]], noise: float, seed: int) -> list[dict]:
    """One pair of solutions with different gold rewards for each problem; a share of the pairs is flipped."""
    rng, rows = random.Random(seed), []
    for problem, texts in zip(problems, samples, strict=True):
        ratings = {text: verify(problem, text).rating for text in texts}
        pairs = [(a, b) for a in ratings for b in ratings if ratings[a] > ratings[b]]
        if pairs:
            better, worse = rng.choice(pairs)
            if rng.random() < noise:
                better, worse = worse, better
            rows.append({"prompt": problem.prompt, "chosen": better, "rejected": worse})
    return rows


def train_members(base: str, rows: list[dict], folder: str, args: argparse.Namespace, seed: int) -> str:
    """Train all members in one run on the same pairs, each with its own seed."""
    config = RewardEnsembleConfig(
        output_dir=f"{folder}/ensemble",
        num_members=args.members,
        data_strategy=args.data_strategy,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        seed=1000 * seed,
        logging_strategy="no",
        **QUIET,
    )
    trainer = RewardEnsembleTrainer(
        model=base,
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return config.output_dir


def run(args: argparse.Namespace, seed: int, folder: str) -> dict:
    """Run one seed: the gold reward over n for each proxy, and how well disagreement predicts errors."""
    base = f"{folder}/policy"
    report = train_policy(
        make_problems(args.policy_prompts, "policy", seed),
        make_problems(100, "trial", seed),
        base,
        seed=seed,
        max_steps=args.policy_steps,
    )
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    train, held_out = make_problems(args.train_prompts, "train", seed), make_problems(args.prompts, "held_out", seed)
    shown = sample_solutions(policy, tokenizer, train, 8, seed=seed, temperature=1.0)
    samples = sample_solutions(
        policy, tokenizer, held_out, args.samples, seed=seed + 1, temperature=1.0, batch_size=64
    )
    rows = noisy_pairs(train, shown, args.noise, seed)
    ensemble = RewardEnsemble(train_members(base, rows, folder, args, seed))
    ensemble.fit_normalizer([row["prompt"] for row in rows], [row["chosen"] for row in rows])

    different = [(p, text) for p, texts in zip(held_out, samples, strict=True) for text in dict.fromkeys(texts)]
    found = ensemble.score_members([p.prompt for p, _ in different], [text for _, text in different])
    members = dict(zip(different, found, strict=True))
    gold = [[verify(p, text).rating for text in texts] for p, texts in zip(held_out, samples, strict=True)]

    def curve(score) -> dict[int, float]:
        by_prompt = [[score[p, text] for text in texts] for p, texts in zip(held_out, samples, strict=True)]
        return best_of_k_curve(gold, by_prompt)

    curves = {"oracle": curve({(p, text): verify(p, text).rating for p, text in different})}
    alone = [curve({key: own[member] for key, own in members.items()}) for member in range(args.members)]
    curves["single (mean of the members)"] = {n: statistics.fmean(one[n] for one in alone) for n in alone[0]}
    curves["single (best member at n = max)"] = max(alone, key=lambda one: one[max(one)])
    for name, settings in REDUCERS.items():
        ensemble.set_reducer(**settings)
        curves[name] = curve(dict(zip(members, ensemble.combine(list(members.values())), strict=True)))

    pairs = noisy_pairs(held_out, samples, 0.0, seed)
    scores = {(problem.prompt, text): torch.tensor(own) for (problem, text), own in members.items()}
    differences = torch.stack([scores[r["prompt"], r["chosen"]] - scores[r["prompt"], r["rejected"]] for r in pairs])
    margins, spread = differences.mean(dim=1), pair_disagreement(differences)
    return {
        "policy": report.get("trial_accuracy", math.nan),
        "pairs": len(rows),
        "accuracy": [(differences[:, m] > 0).double().mean().item() for m in range(args.members)],
        "ensemble_accuracy": (margins > 0).double().mean().item(),
        "curves": curves,
        "deciles": error_by_disagreement(margins, spread, min(10, len(margins))),
        "auc": rounded(error_auc(margins, spread)),
        "relative_auc": rounded(error_auc(margins, relative_disagreement(differences))),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def with_error(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=4, help="the paper finds four to five enough")
    parser.add_argument(
        "--data_strategy", default="shuffle", help="shuffle (the same pairs for all), bootstrap, kfold"
    )
    parser.add_argument("--noise", type=float, default=0.25, help="share of flipped labels; the paper's 0.25")
    parser.add_argument("--train_prompts", type=int, default=1000, help="training problems, with one pair each")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200, help="held-out problems")
    parser.add_argument("--samples", type=int, default=128, help="samples of a held-out problem: the largest n")
    parser.add_argument("--policy_prompts", type=int, default=4000)
    parser.add_argument("--policy_steps", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        small = dict(seeds=1, members=2, train_prompts=24, steps=2, prompts=8, samples=8, policy_prompts=400)
        vars(args).update(small, policy_steps=80)

    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(args, seed, folder))
        one = runs[-1]
        accuracies = ", ".join(f"{value:.3f}" for value in one["accuracy"])
        print(
            f"seed {seed}: policy accuracy {one['policy']:.2f}; {one['pairs']} pairs; held-out accuracy: members "
            f"{accuracies}, mean {one['ensemble_accuracy']:.3f}; AUC of disagreement for errors {one['auc']}, divided "
            f"by the mean difference {one['relative_auc']}",
            flush=True,
        )

    names, sizes = list(runs[0]["curves"]), list(runs[0]["curves"]["oracle"])
    print(f"\ngold reward of the best of n, mean over {args.seeds} seeds (± standard error over seeds)")
    print("| n (KL at most) | " + " | ".join(f"{n} ({kl_bound(n):.2f})" for n in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(with_error([one["curves"][name][n] for one in runs]) for n in sizes) + " |")
    print("\ngain over the mean of single members, paired by seed")
    for name in REDUCERS:
        gains = [
            [one["curves"][name][n] - one["curves"]["single (mean of the members)"][n] for one in runs] for n in sizes
        ]
        print(f"| {name} | " + " | ".join(map(with_error, gains)) + " |")
    print("\nerror rate of the mean by decile of disagreement (held-out pairs, all seeds)")
    deciles = list(zip(*(one["deciles"] for one in runs), strict=True))
    print(" ".join(f"{statistics.fmean(own['error'] for own in part):.3f}" for part in deciles))


if __name__ == "__main__":
    main()
