"""Reward models of a real pretrained language model on real preferences, beside baselines, with intervals.

    python examples/studies/real_data.py --model FOLDER --hours 6        # run it again to go on
    python examples/studies/real_data.py --model FOLDER --study losses --sets oasst topical --folds 5
    python examples/studies/real_data.py --model FOLDER --report         # the table of what is finished
    python examples/studies/real_data.py --model FOLDER --device cuda
    python examples/studies/real_data.py --smoke                         # a random model, a few rows

FOLDER is a small instruct model such as SmolLM2-135M-Instruct; docs/results/real_data.md describes the data. Folds are
by conversation or question. Adapters sit on the last quarter of the layers, and the layers below run once for each
text. Each fold of each arm is a stage whose result is kept in the output folder, so an interrupted study goes on, and
two processes with different `--sets` can share the folder. Other epochs or learning rates would take the place of
results: give them another folder. No stage begins that would end after `--hours`, as far as the stages before it tell.
Every figure is of rows that the model did not see, with a 95 % interval over conversations or questions (2,000
bootstrap resamples); differences are paired.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from real_baselines import RECIPE, baselines, untrained
from real_measures import Judged, compared, interval
from real_sets import SETS, Row, load
from real_training import Arm, Budget, train_and_score
from tools import data_folder, folds

from trl_ext.demo.model import tiny_reward_base
from trl_ext.models.fingerprint import model_identity
from trl_ext.pipelines.stages.cached_stages import Outcome, Stage, StageContext, find_done, run_stages


@dataclass(frozen=True)
class Study:
    """Arms on data sets. The first arm is the one that the others are compared with."""

    title: str
    sets: tuple[str, ...]
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0,)

    def source(self, key: str) -> tuple[str, Arm]:
        """The arm whose training an arm is made from: itself, or the one whose members it is the mean of."""
        key = self.arms[key].mean_of or key
        return key, self.arms[key]


PLAIN = Arm("LoRA, bf16")
AS_MUCH_COMPUTE = {
    "longer": Arm("three times the epochs", epochs=3.0),
    "ensemble": Arm("three members, mean", mean_of="warm"),
    "warm": Arm("the same three, merged (WARM)", members=3),
}
RANKED = ("topical", "oasst", "fine-grained")
STUDIES = {
    "main": Study(
        "Reward models of a 135M language model beside their baselines",
        tuple(SETS),
        {"lora": PLAIN},
    ),
    "quantized": Study(
        "The base in 4 bits",
        tuple(SETS),
        {"lora": PLAIN, "qlora": Arm("QLoRA, NF4", nf4=True)},
    ),
    "losses": Study(
        "Losses for rankings, as many texts read",
        RANKED,
        {
            "lora": Arm("`plackett_luce`"),
            "bradley-terry": Arm("`bradley_terry`, K / 2 pairs of each ranking", data="pairs"),
            # of six candidates a step holds one ranking, or four pairs: a control with as many texts a step
            "three-pairs": Arm("the same, 3 pairs a step", {"per_device_train_batch_size": 3}, data="pairs"),
            "pairwise": Arm("`pairwise`", {"loss_type": "pairwise"}),
            "margins": Arm(
                "`pairwise`, margins from ratings or ranks",
                {"loss_type": "pairwise", "loss_kwargs": {"margin_from_ratings": True}},
            ),
            "listnet": Arm("`listnet` (soft labels)", {"loss_type": "listnet"}),
            "lambda": Arm("`lambda_loss`", {"loss_type": "lambda_loss"}),
        },
    ),
    "options": Study(
        "Cheap improvements",
        ("topical", "oasst", "harmless"),
        {
            "lora": PLAIN,
            "bsr": Arm("batch sum to zero (BSR), 0.01", {"batch_sum_to_zero_coefficient": 0.01}),
            "grm": Arm("SFT loss through the frozen head (GRM), 0.01", {"sft_coefficient": 0.01}),
            "dense": Arm("a label at every token (ORM), the mean of the tokens", data="answers"),
            **AS_MUCH_COMPUTE,
        },
    ),
    "compute": Study("Three members against one model that trains as long", ("topical", "oasst"), AS_MUCH_COMPUTE),
    "noise": Study(
        "A quarter of the training pairs turned round",
        ("topical", "harmless"),
        {
            "flipped": Arm("`bradley_terry`", data="flipped"),
            "robust": Arm(
                "`robust_bradley_terry`, flip probability given",
                {"loss_type": "robust_bradley_terry", "loss_kwargs": {"flip_probability": 0.25}},
                data="flipped",
            ),
        },
    ),
    "ties": Study(
        "Pairs with ties, as many texts read",
        ("topical", "fine-grained"),
        {
            "bradley-terry": Arm("`bradley_terry` on decided pairs", data="pairs"),
            "ties": Arm("`rao_kupper` on all pairs", {"loss_type": "rao_kupper"}, data="ties"),
        },
    ),
}


# ---------------------------------------------------------------------------------------------------------- the stages
def split(rows: list[Row], name: str, fold: int) -> tuple[list[int], list[int]]:
    """Training and test rows of a fold. Rows of training are shuffled."""
    training, test = list(folds([row.group for row in rows], fold + 1, of=SETS[name].folds))[fold]
    return np.random.default_rng(fold).permutation(training).tolist(), test


def run_features(context: StageContext, rows: list[Row], name: str, args: argparse.Namespace) -> dict[str, Any]:
    np.savez(context.folder / "features.npz", **untrained(rows, SETS[name], args.model, args.device))
    return {"items": sum(len(row.labels) for row in rows)}


def run_baselines(context: StageContext, rows: list[Row], name: str, fold: int) -> dict[str, Any]:
    features = context.folders[f"{name}-features"] / "features.npz"
    return {"scores": baselines(rows, SETS[name], features, *split(rows, name, fold))}


def run_arm(
    context: StageContext, rows: list[Row], name: str, fold: int, arm: Arm, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    training, test = split(rows, name, fold)
    # the states of a text are the same in every fold and arm
    states = args.output_dir / ("states-nf4" if arm.nf4 else "states")
    inputs = [rows[n] for n in training], [rows[n] for n in test], SETS[name], arm, Budget(**args.budget), seed
    return train_and_score(*inputs, args.model, states, args.device)


def stages_of(study: Study, rows: dict[str, list[Row]], args: argparse.Namespace) -> Iterator[tuple[Stage, ...]]:
    """Each stage behind those that it needs: all sets of a fold before the next fold."""
    common = {"model": model_identity(args.model), "device": args.device}
    content = {name: hashlib.sha256(repr(own).encode()).hexdigest()[:16] for name, own in rows.items()}
    features = {
        name: Stage(
            f"{name}-features",
            f"{name}: the untrained model",
            partial(run_features, rows=own, name=name, args=args),
            {**common, "rows": content[name]},
        )
        for name, own in rows.items()
    }
    for fold in range(args.folds):
        for name, own in rows.items():
            if fold >= SETS[name].folds:
                continue
            yield (
                features[name],
                Stage(
                    f"{name}-{fold}-baselines",
                    f"{name}, fold {fold}: baselines",
                    partial(run_baselines, rows=own, name=name, fold=fold),
                    {"rows": content[name], "folds": SETS[name].folds, **RECIPE},
                    needs=(features[name].name,),
                ),
            )
            trained = dict(study.source(key) for key in study.arms)
            for key, arm in trained.items():
                for seed in study.seeds:
                    settings = {k: v for k, v in asdict(arm).items() if k not in ("title", "mean_of")}
                    settings |= {**common, "rows": content[name], "folds": SETS[name].folds, "seed": seed}
                    settings["budget"] = args.budget
                    work = partial(run_arm, rows=own, name=name, fold=fold, arm=arm, seed=seed, args=args)
                    yield (Stage(f"{name}-{fold}-{key}-{seed}", f"{name}, fold {fold}: {arm.title}", work, settings),)


@contextmanager
def claimed(sets: list[str], output_dir: Path) -> Iterator[None]:
    """Keep other processes off the stages of some data sets, until this one ends."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name in sets:
            file = stack.enter_context(open(output_dir / f"{name}.lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                sys.exit(
                    f"Another process works on {name} in {output_dir}. Give other --sets, or another --output_dir."
                )
        yield


def run_all(study: Study, rows: dict[str, list[Row]], args: argparse.Namespace) -> dict[str, Outcome]:
    """Run the stages until the time is over; the outcomes of those that are finished."""
    begun, done, left = time.monotonic(), {}, 0
    for stages in stages_of(study, rows, args):
        last = stages[-1]
        known = find_done(stages, args.output_dir)
        if last.name not in known and args.report:
            left += 1
            continue
        if last.name not in known and args.hours is not None:
            alike = [o.seconds for n, o in done.items() if n.split("-")[0] == last.name.split("-")[0]]
            if time.monotonic() - begun + max(alike, default=0.0) > 3600 * args.hours:
                left += 1
                continue
        done |= run_stages(stages, args.output_dir)
        outcome = done[last.name]
        if not outcome.cached:
            print(f"{last.title} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
    if left:
        print(f"{left} stages are left. Run the command again to go on.", file=sys.stderr)
    return done


# ---------------------------------------------------------------------------------------------------------- the report
def figures_of(study: Study, name: str, rows: list[Row], done: dict[str, Outcome]) -> dict[str, Any] | None:
    """What came of a data set: of the folds in which every arm is finished. `None` if there is none."""
    needed = {
        fold: [f"{name}-{fold}-{study.source(key)[0]}-{seed}" for key in study.arms for seed in study.seeds]
        + [f"{name}-{fold}-baselines"]
        for fold in range(SETS[name].folds)
    }
    whole = [fold for fold, names in needed.items() if all(own in done for own in names)]
    if not whole:
        return None
    tests = {fold: split(rows, name, fold)[1] for fold in whole}
    order = [(fold, n) for fold in whole for n in tests[fold]]
    judged = judged_rows([(fold, rows[n]) for fold, n in order], SETS[name].measure)
    # of sets whose items are pooled, the rows with right and wrong items: pairs of one row
    mixed = [place for place, (_, n) in enumerate(order) if len(set(rows[n].labels)) > 1]
    within = judged_rows([(order[place][0], rows[order[place][1]]) for place in mixed], "order")
    base, base_within = {}, {}
    for method in done[f"{name}-{whole[0]}-baselines"].result["scores"]:
        scores = [own for fold in whole for own in done[f"{name}-{fold}-baselines"].result["scores"][method]]
        base[method], base_within[method] = judged.values(scores), within.values([scores[n] for n in mixed])
    trained, trained_within, costs = {}, {}, {}
    for key, arm in study.arms.items():
        source, which = study.source(key)[0], "member_mean" if arm.mean_of else "scores"
        runs = [[done[f"{name}-{fold}-{source}-{seed}"].result for fold in whole] for seed in study.seeds]
        scores = [[s for own in of_seed for s in own[which]] for of_seed in runs]
        trained[key] = np.mean([judged.values(own) for own in scores], axis=0)
        trained_within[key] = np.mean([within.values([own[n] for n in mixed]) for own in scores], axis=0)
        flat = [own for of_seed in runs for own in of_seed]
        costs[key] = {
            cost: statistics.fmean(own[cost] for own in flat) for cost in ("steps", "tokens", "seconds", "cpu_seconds")
        }
    first = next(iter(study.arms))
    return {
        "rows": len(order),
        "groups": len(set(judged.groups)),
        "folds": len(whole),
        "mixed rows": len(mixed),
        "baselines": {method: interval(values) for method, values in base.items()},
        "arms": {
            key: {
                **interval(values),
                "beside baselines": compared({**base, key: values}, key, list(base)),
                "within a row": {
                    **interval(trained_within[key]),
                    "beside baselines": compared({**base_within, key: trained_within[key]}, key, list(base)),
                },
                "beside the first arm": interval(values - trained[first]) if key != first else None,
                "costs of a fold": costs[key],
            }
            for key, values in trained.items()
        },
    }


def judged_rows(rows: list[tuple[int, Row]], measure: Literal["order", "auc"]) -> Judged:
    """Rows with their folds, as `Judged` wants them."""
    return Judged(
        [row.labels for _, row in rows],
        [row.group for _, row in rows],
        [f"{fold} {row.stratum}" for fold, row in rows],
        measure,
    )


def cell(found: dict[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


def within_cell(figures: dict[str, Any], key: str) -> str:
    """Pairs of one solution or completion in order: an arm, and the best baseline by the same measure."""
    found = figures["arms"][key]["within a row"]
    best = found["value"] - found["beside baselines"]["gain"]["value"]
    return f"{found['value']:.3f}, {best:.3f} ({figures['mixed rows']} rows)"


def table(study: Study, figures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the report: a line for each data set, or for each arm where arms are compared."""
    if study.title == STUDIES["main"].title:
        # only some sets have positions
        baselines_ = list(max((own["baselines"] for own in figures.values()), key=len))
        columns = ["data", "tested rows", *baselines_, *(arm.title for arm in study.arms.values())]
        columns += [f"{arm.title} less the best baseline" for arm in study.arms.values()]
        columns += [f"within a row: {arm.title}, best baseline" for arm in study.arms.values()]
        lines = []
        for name, own in figures.items():
            values = [own["baselines"].get(method) for method in baselines_]
            line = [SETS[name].title, f"{own['rows']:,} ({own['folds']} of {SETS[name].folds} folds)"]
            line += [f"{value['value']:.3f}" if value else "" for value in values]
            line += [cell(own["arms"][key]) for key in study.arms]
            beside = [own["arms"][key]["beside baselines"] for key in study.arms]
            line += [f"{cell(found['gain'], '+')}, {found['over']}" for found in beside]
            line += [within_cell(own, key) if SETS[name].measure == "auc" else "" for key in study.arms]
            lines.append(line)
        return columns, lines
    first, *others = study.arms
    lines = []
    if len(figures) > len(study.arms):
        columns = ["data", "tested rows", *(arm.title for arm in study.arms.values())]
        columns += [f"{study.arms[key].title} less {study.arms[first].title}" for key in others]
        for name, own in figures.items():
            line = [SETS[name].title, f"{own['rows']:,} ({own['folds']} of {SETS[name].folds} folds)"]
            line += [cell(own["arms"][key]) for key in study.arms]
            line += [cell(own["arms"][key]["beside the first arm"], "+") for key in others]
            lines.append(line)
        return columns, lines
    columns = ["arm", "tokens read, times those of the first"]
    columns += [*(SETS[name].title for name in figures), *(f"less the first: {SETS[n].title}" for n in figures)]
    for key, arm in study.arms.items():
        beside = [own["arms"][key]["beside the first arm"] for own in figures.values()]
        read = [own["arms"][k]["costs of a fold"]["tokens"] for own in figures.values() for k in (key, first)]
        lines.append(
            [arm.title, f"{sum(read[::2]) / sum(read[1::2]):.2f}"]
            + [cell(own["arms"][key]) for own in figures.values()]
            + [cell(gain, "+") if gain else "" for gain in beside]
        )
    return columns, lines


def report(
    study: Study, figures: dict[str, dict[str, Any]], seconds: float, args: argparse.Namespace
) -> dict[str, Any]:
    """The report as docs/results wants it. `seconds`: of all stages behind it."""
    columns, lines = table(study, figures)
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores, no GPU"
    budget, first = Budget(**args.budget), next(iter(study.arms))
    costs = "; ".join(
        f"{name} {cost['steps']:.0f}, {cost['tokens'] / 1000:,.0f}k"
        for name, cost in ((name, own["arms"][first]["costs of a fold"]) for name, own in figures.items())
    )
    note = (
        "Accuracy of the decided pairs of a prompt, averaged over prompts, or AUC of steps and segments, averaged "
        "over folds and tasks, of rows that the model did not train on. 95 % intervals over conversations or "
        "questions, paired where differences are given; each training was run once, so they do not tell how much "
        f"depends on its seed. {Path(args.model).name}; LoRA of rank {budget.rank} on the last quarter of the layers, "
        f"learning rate {budget.learning_rate:g}, {budget.items_a_step} judged items a step, {budget.epochs:g} "
        f"epochs, and more until about {budget.least_steps} steps. Steps and tokens of a fold of "
        f"{study.arms[first].title}: {costs}. All stages, with baselines and passes through the frozen layers: "
        f"{seconds / 60:,.0f} minutes."
    )
    command = f"python examples/studies/real_data.py --model FOLDER --study {args.study} --folds {args.folds}"
    for name in ("sets", "arms"):
        command += f" --{name} {' '.join(getattr(args, name))}" if getattr(args, name) else ""
    for name, default in (("epochs", Budget.epochs), ("learning_rate", Budget.learning_rate), ("device", "cpu")):
        command += f" --{name} {getattr(args, name)}" if getattr(args, name) != default else ""
    return {
        "title": study.title,
        "date": date.today().isoformat(),
        "machine": f"{place}, {platform.machine()}",
        "command": [command],
        "note": note,
        "columns": columns,
        "rows": lines,
        "figures": figures,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--study", choices=STUDIES, default="main")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="default: all sets of the study")
    parser.add_argument("--arms", nargs="+", help="default: all arms of the study")
    parser.add_argument(
        "--folds", type=int, default=5, choices=range(1, 6), help="the most folds of a data set to run"
    )
    parser.add_argument("--hours", type=float, help="begin nothing that would end later; default: no limit")
    parser.add_argument("--epochs", type=float, default=Budget.epochs)
    parser.add_argument("--learning_rate", type=float, default=Budget.learning_rate)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_data"))
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    study = STUDIES[args.study]
    sets = [name for name in args.sets or study.sets if name in study.sets]
    if not sets:
        parser.error(f"--sets {' '.join(args.sets)} has none of this study: {', '.join(study.sets)}.")
    unknown = [key for key in args.arms or () if key not in study.arms]
    if unknown:
        parser.error(f"--arms {' '.join(unknown)}: the arms of this study are {', '.join(study.arms)}.")
    wanted = {study.source(key)[0] for key in args.arms or study.arms} | set(args.arms or study.arms)
    study = replace(study, arms={key: arm for key, arm in study.arms.items() if key in wanted})
    folder = data_folder([file for name in sets for file in SETS[name].files])
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            args.folds, args.output_dir = 1, Path(temporary, "out")
            args.epochs = 0.5
            args.model = args.model or tiny_reward_base(
                f"{temporary}/model", hidden_size=32, num_layers=4, max_position_embeddings=8192
            )
        if not args.model:
            parser.error("--model is needed: the folder of a language model.")
        least = 0 if args.smoke else Budget.least_steps
        longest = 8192 if args.smoke else Budget.max_length  # the tokenizer of the random model makes many tokens
        args.budget = asdict(Budget(args.epochs, least, args.learning_rate, max_length=longest))
        rows = {name: load(name, folder, args.smoke) for name in sets}
        with nullcontext() if args.report else claimed(sets, args.output_dir):
            done = run_all(study, rows, args)
        figures = {name: figures_of(study, name, own, done) for name, own in rows.items()}
        figures = {name: own for name, own in figures.items() if own is not None}
    if not figures:
        sys.exit("No fold is finished.")
    found = report(study, figures, sum(outcome.seconds for outcome in done.values()), args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join("| " + " | ".join(line) + " |" for line in [found["columns"], *found["rows"]]))


if __name__ == "__main__":
    main(sys.argv[1:])
