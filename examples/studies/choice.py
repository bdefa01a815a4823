"""How many labels does each strategy of `choose` save? Label-cost curves on real preferences, beside random choice.

    python examples/studies/choice.py --model FOLDER --output_dir outputs/study_choice
    python examples/studies/choice.py --smoke    # made-up features, seconds

Needs the data of docs/results/real_data.md. FOLDER is an encoder such as all-MiniLM-L6-v2. It stays frozen: its
features of every completion (the mean of the last layer, and the logarithm of the length) are computed once and kept
in the output folder. What is trained is the head of a reward model on them: the posterior mode, with the prior
precision of the largest marginal likelihood. The study uses the values and designs behind `choose` directly.

Five folds by prompt. In each, rows of the other folds are labelled in rounds: a first batch at random, then batches by
a strategy, with a new head before each. Every row is tested once for each seed. Runs that are in the output folder are
not repeated, so that an interrupted study goes on. `planted` is a control: the texts of HH with labels drawn from a
linear reward of their features, so that a head can learn what there is to learn.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tools import data_folder, folds, read

from trl_ext.losses import plackett_luce
from trl_ext.metrics.bootstrap import bootstrap_means, group_numbers
from trl_ext.metrics.design import greedy_determinant, k_centre
from trl_ext.scoring.last_layer import (
    Information,
    best_prior_precision,
    expected_curvature,
    information_vectors,
    loss_curvature,
)


SETS = ("oasst", "hh", "finegrained", "planted")
HH_ROWS = 1200  # of 2,299: features take time
TITLES = {
    "oasst": "Open-Assistant rankings",
    "finegrained": "fine-grained pairs",
    "hh": "HH harmless pairs",
    "planted": "the HH texts with planted labels",
}
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.5)  # of the rows of the other four folds
STRATEGIES = ("random", "entropy", "entropy, k-centre", "uncertainty", "disagreement", "fisher", "fisher, determinant")
MEMBERS = 4


# ------------------------------------------------------------------------------------------------------------ the data
def rows_of(name: str, folder: Path) -> Iterator[tuple[str, list[str], list[float], str]]:
    """Prompt, completions, ratings (higher is better) and group of each row of a data set."""
    if name == "oasst":
        for row in read(folder / "rankings_oasst_en100" / "rankings.jsonl"):
            yield text(row["prompt"]), [text(c) for c in row["completions"]], [-r for r in row["ranks"]], row["tree"]
    elif name == "finegrained":
        for row in read(folder / "segment_finegrained" / "preference_pairs.jsonl"):
            yield row["prompt"], [row["chosen"], row["rejected"]], [1, 0], row["prompt_id"]
    else:
        rows = [row for row in read(folder / "pairs_hh_harmless" / "split_test.jsonl") if row["clean"]]
        for row in rows[:HH_ROWS]:
            pair = [text(row["chosen"]), text(row["rejected"])]
            yield text(row["prompt"]), pair, [1, 0], text(row["prompt"][:1])


def text(messages: str | list[dict]) -> str:
    return messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)


@torch.no_grad()
def embed(pairs: list[tuple[str, str]], model_path: str) -> np.ndarray:
    """Features of completions after their prompts, (N, H + 1)."""
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(model_path), AutoModel.from_pretrained(model_path).eval()
    features = np.zeros((len(pairs), model.config.hidden_size + 1), np.float32)
    order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        batch = tokenizer(
            [pairs[place][0] for place in part],
            [pairs[place][1] for place in part],
            truncation="longest_first",
            max_length=256,
            padding=True,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state  # (N, T, H)
        own = (batch["token_type_ids"] * batch["attention_mask"]).bool()  # the completion's tokens
        for number, place in enumerate(part):
            features[place, :-1] = hidden[number][own[number]].mean(0).numpy()
            features[place, -1] = np.log1p(len(pairs[place][1]))
    return features


def load_set(name: str, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The features of a data set, from the output folder if they are there."""
    path = args.output_dir / f"{name}.npz"
    if args.smoke:
        return made_up()
    if name == "planted":
        return planted(load_set("hh", args))
    if not path.exists():
        rows = list(rows_of(name, data_folder([])))
        places: dict[tuple[str, str], int] = {}
        for prompt, completions, *_ in rows:
            for completion in completions:
                places.setdefault((prompt[-500:], completion[:1000]), len(places))
        found = embed(list(places), args.model)
        index = [places[prompt[-500:], completion[:1000]] for prompt, texts, *_ in rows for completion in texts]
        np.savez(
            path,
            features=found,
            index=np.array(index),
            sizes=np.array([len(completions) for _, completions, *_ in rows]),
            ratings=np.array([rating for *_, ratings, _ in rows for rating in ratings], float),
            group=np.array([str(group) for *_, group in rows]),
        )
    return dict(np.load(path))


def planted(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same texts with labels drawn from a linear reward of their features: a control with a head that is right."""
    features, *_ = as_rows(data)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(features.shape[-1], generator=generator, dtype=torch.float64)
    margin = (features[:, 0] - features[:, 1]) @ weight
    first = torch.rand(len(margin), generator=generator) < torch.sigmoid(3 * margin / margin.std())
    return {**data, "ratings": torch.stack([first, ~first], dim=1).double().flatten().numpy()}


def made_up() -> dict[str, np.ndarray]:
    """Pairs whose labels follow a linear reward, for a quick check."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(240, 6)).astype(np.float32)
    better = (features[::2] @ np.ones(6) > features[1::2] @ np.ones(6)).astype(float)
    ratings = np.stack([better, 1 - better], 1).ravel()
    groups = np.array([str(row // 2) for row in range(120)])
    return dict(features=features, index=np.arange(240), sizes=np.full(120, 2), ratings=ratings, group=groups)


def as_rows(data: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardised features (N, K, H), ratings (N, K) and mask (N, K) of all rows, fp64."""
    features = torch.tensor(data["features"], dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6) / features.shape[1] ** 0.5
    mask = torch.arange(int(data["sizes"].max())) < torch.tensor(data["sizes"])[:, None]
    padded = torch.zeros(*mask.shape, features.shape[1], dtype=torch.float64)
    padded[mask] = features[torch.tensor(data["index"])]
    ratings = torch.zeros(mask.shape, dtype=torch.float64)
    ratings[mask] = torch.tensor(data["ratings"])
    return padded, ratings, mask


# ------------------------------------------------------------------------------------------------------------ the head
class Head:
    """A linear reward on frozen features, by Newton's method, with its posterior."""

    def __init__(self, size: int):
        self.weight, self.prior = torch.zeros(size, dtype=torch.float64), 1.0

    def fit(self, features: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor, rounds: int = 2) -> "Head":
        """The posterior mode; `rounds` times the prior precision is chosen anew (0: it stays)."""
        for _ in range(rounds):
            self._newton(features, ratings, mask)
            try:
                found = best_prior_precision(torch.linalg.eigvalsh(self.information), self.weight)
            except ValueError:  # nothing was learnt
                found = self.prior
            self.prior = min(max(found, 1e-2), 1e4)
        self._newton(features, ratings, mask)
        self.factor = torch.linalg.cholesky(self._precision())
        return self

    def _newton(self, features: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> None:
        pairs = features.shape[1] == 2
        if pairs:  # in closed form
            difference = (features[:, 0] - features[:, 1]) * (ratings[:, 0] - ratings[:, 1]).sign()[:, None]
        loss = partial(plackett_luce, ratings=ratings, mask=mask)
        for _ in range(20):
            if pairs:
                right = torch.sigmoid(difference @ self.weight)
                slope = -((1 - right) @ difference)
                self.information = (difference * (right * (1 - right))[:, None]).T @ difference
            else:
                scores = (features @ self.weight).requires_grad_()
                slope = torch.einsum("nkh,nk->h", features, torch.autograd.grad(loss(scores).sum(), scores)[0])
                information = Information(len(self.weight))
                information.add(features, loss_curvature(scores, mask, loss), mask)
                self.information = information.matrix
            step = torch.linalg.solve(self._precision(), slope + self.prior * self.weight)
            self.weight = self.weight - step
            if step.norm() < 1e-3 * (1e-3 + self.weight.norm()):
                return

    def _precision(self) -> torch.Tensor:
        return self.information + self.prior * torch.eye(len(self.weight), dtype=torch.float64)

    def whiten(self, vectors: torch.Tensor) -> torch.Tensor:
        flat = vectors.reshape(-1, vectors.shape[-1])
        return torch.linalg.solve_triangular(self.factor, flat.T, upper=False).T.reshape(vectors.shape)


def accuracy(scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The share of each row's pairs (of different ratings) that are in order; a tie of scores counts half."""
    better = (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    gap = scores[:, :, None] - scores[:, None, :]
    right = (gap > 0).double() + 0.5 * (gap == 0).double()
    return ((right * better).sum((1, 2)) / better.sum((1, 2)).clamp_min(1)).tolist()


# ----------------------------------------------------------------------------------------------------------- the study
def pick(strategy: str, head: Head, pool: tuple, labelled: tuple, n: int, generator: torch.Generator) -> list[int]:
    """Row numbers of the pool, n of them."""
    features, _, mask = pool
    name, _, diversity = strategy.partition(", ")
    if name == "random":
        return torch.randperm(len(features), generator=generator)[:n].tolist()
    scores = features @ head.weight
    rows = torch.arange(len(features))
    best = scores.masked_fill(~mask, -torch.inf).argmax(1)
    worst = scores.masked_fill(~mask, torch.inf).argmin(1)
    difference = features[rows, best] - features[rows, worst]
    vectors = head.whiten(information_vectors(features, expected_curvature(scores, mask)))
    if diversity == "determinant":
        return greedy_determinant(vectors, n)[0]
    if name == "fisher":
        values = torch.linalg.eigvalsh(vectors @ vectors.mT).clamp_min(0).log1p().sum(-1)
    elif name == "uncertainty":
        values = head.whiten(difference).norm(dim=-1)
    elif name == "entropy":
        values = -(scores[rows, best] - scores[rows, worst])  # the order of the entropy of a pair
    else:
        margins = []
        for _ in range(MEMBERS):  # bootstrap members
            drawn = torch.randint(len(labelled[0]), (len(labelled[0]),), generator=generator)
            member = Head(features.shape[-1])
            member.weight, member.prior = head.weight.clone(), head.prior
            member.fit(*(part[drawn] for part in labelled), rounds=0)
            margins.append(difference @ member.weight)
        values = torch.stack(margins).std(0, correction=0)
    order = values.argsort(descending=True)
    if diversity == "k-centre":
        near = order[: 10 * n]
        return near[k_centre(difference[near], n)].tolist()
    return order[:n].tolist()


def run(rows: tuple, train: list[int], test: list[int], strategy: str, seed: int, shares: tuple) -> dict[str, list]:
    """The accuracy of each test row after each share of labels, counted in completions that an annotator reads."""
    generator = torch.Generator().manual_seed(seed)
    cost = rows[2].sum(1)  # (N,): completions of each row
    each = cost[train].double().mean().item()
    pool, labelled = torch.tensor(train)[torch.randperm(len(train), generator=generator)], torch.tensor([]).long()
    curve, head = {}, Head(rows[0].shape[-1])
    for number, share in enumerate(shares):
        budget = round(round(share * len(train)) * each) - int(cost[labelled].sum())
        chosen = list(range(len(pool)))
        if number:
            there, known = (tuple(part[which] for part in rows) for which in (pool, labelled))
            wanted = min(len(pool), budget // 2)  # a row has two completions or more
            chosen = pick(strategy, head, there, known, wanted, generator)
        spent = cost[pool[chosen]].cumsum(0).tolist()
        chosen = [row for row, total in zip(chosen, spent, strict=True) if total <= budget]
        labelled = torch.cat([labelled, pool[chosen]])
        pool = pool[[place for place in range(len(pool)) if place not in set(chosen)]]
        head.fit(*(part[labelled] for part in rows))  # goes on from the last one
        features, ratings, mask = (part[test] for part in rows)
        curve[f"{share:g}"] = [round(value, 4) for value in accuracy(features @ head.weight, ratings, mask)]
    return curve


def study(name: str, args: argparse.Namespace, done: dict[tuple, dict]) -> None:
    """Run what is not done yet of one data set."""
    data = load_set(name, args)
    rows = as_rows(data)
    for seed in range(args.seeds):
        for fold, (train, test) in enumerate(folds(data["group"].tolist(), 5, seed=0)):
            for strategy in ("all", *args.strategies):
                key = (name, seed, fold, strategy)
                if key in done or (strategy == "all" and seed):
                    continue
                start = time.perf_counter()
                shares = (1.0,) if strategy == "all" else SHARES
                curve = run(rows, train, test, strategy, seed, shares)
                done[key] = {"key": key, "test": test, "curve": curve, "seconds": time.perf_counter() - start}
                with open(args.output_dir / "runs.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")


def report(name: str, args: argparse.Namespace, done: dict[tuple, dict]) -> list[list[str]]:
    """A row for each strategy: accuracy by share, and the difference at a quarter of the labels, with intervals."""
    data = load_set(name, args)
    groups, count = group_numbers(data["group"].tolist())

    def values(strategy: str, share: str) -> torch.Tensor:
        """The accuracy of every row, mean over seeds."""
        total, times = torch.zeros(len(data["sizes"])), torch.zeros(len(data["sizes"]))
        for (which, _, _, how), run in done.items():
            if (which, how) == (name, strategy):
                total[run["test"]] += torch.tensor(run["curve"][share])
                times[run["test"]] += 1
        return total / times

    def interval(numbers: torch.Tensor) -> str:
        means = bootstrap_means(numbers, groups, count).sort().values
        return f"{numbers.mean():+.3f} [{means[50]:+.3f}, {means[1949]:+.3f}]"

    final = values("all", "1")
    table = [[f"**{TITLES[name]}**, all labels: {final.mean():.3f}", *[""] * (len(SHARES) + 2)]]
    for strategy in args.strategies:
        if not any((key[0], key[3]) == (name, strategy) for key in done):
            continue
        quarter = values(strategy, "0.25")
        cells = [f"{values(strategy, f'{share:g}').mean():.3f}" for share in SHARES]
        against = "" if strategy == "random" else interval(quarter - values("random", "0.25"))
        table.append([strategy, *cells, against, interval(quarter - final)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder of the frozen encoder")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study_choice"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the table as a result of the documentation")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.sets, args.seeds = ["finegrained"], 1
    args.output_dir.mkdir(parents=True, exist_ok=True)
    done: dict[tuple, dict] = {}
    if (args.output_dir / "runs.jsonl").exists():
        done = {tuple(row["key"]): row for row in read(args.output_dir / "runs.jsonl")}
    rows = []
    for name in args.sets:
        study(name, args, done)
        rows += report(name, args, done)
    columns = ["labels", *(f"{share:.0%}" for share in SHARES), "quarter less random", "quarter less all labels"]
    for row in [columns, *rows]:
        print("| " + " | ".join(row) + " |")
    if args.json:
        command = f"python examples/studies/choice.py --model all-MiniLM-L6-v2 --seeds {args.seeds}"
        result = {
            "title": "Choosing what to label: pair accuracy by share of the labels",
            "date": str(date.today()),
            "machine": "two-core machine, no GPU",
            "command": [command],
            "note": f"Heads on frozen features, 5 folds by prompt, seeds: {args.seeds}. The last two columns are "
            "differences at a quarter of the labels, with 95 % bootstrap intervals over prompts.",
            "columns": columns,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
