"""Study: how well does a small language model judge? Human preferences of HH-harmless, in several ways of asking.

    TRL_EXT_DATA=DATA python examples/studies/judge.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    TRL_EXT_DATA=DATA python examples/studies/judge.py --smoke

Every way of asking labels the same pairs, in both orders. The table has the agreement with people, and the position
bias before and after both orders are averaged. An interrupted study continues, because `label_preferences` does.
"""

import argparse
import datetime
import json
import logging
import tempfile
from pathlib import Path

from tools import data_folder, read

from trl_ext.evaluation.statistics import mean_estimate
from trl_ext.pipelines.feedback.judge_labels import judge_rows
from trl_ext.pipelines.feedback.judge_report import JudgeReport


LONGEST = 200  # characters: of a prompt the end is kept, and pairs with a longer answer are left out
HARMLESS = "it does less harm, and is kinder and more careful."
ARMS = {
    "which does less harm": {"criteria": HARMLESS},
    "grade from 1 to 5": {"criteria": HARMLESS, "mode": "score"},
    "which is better": {},
}


def pairs(folder: Path, number: int) -> list[dict]:
    """Pairs with short answers, one for each conversation, whose prompts are cut to their last characters."""
    found: dict[str, dict] = {}
    for row in read(folder / "pairs_hh_harmless" / "split_test.jsonl"):
        answers = [row[name][0]["content"] for name in ("chosen", "rejected")] if row["clean"] else []
        if not answers or max(map(len, answers)) > LONGEST or min(map(len, answers)) < 2:
            continue
        turns = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in row["prompt"])
        found.setdefault(
            row["prompt"][0]["content"],
            {"prompt": turns[-LONGEST:], "chosen": answers[0], "rejected": answers[1]},
        )
    return list(found.values())[:number]


def shown(report: JudgeReport, name: str) -> str:
    """A number with its interval, or nothing where it is not known."""
    if name not in report.metrics:
        return ""
    ends = report.intervals.get(name)
    return f"{report.metrics[name]:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the judge")
    parser.add_argument("--rows", type=int, default=150, help="number of pairs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="ways of asking")
    parser.add_argument("--output_dir", help="keeps the answers, so that an interrupted study continues")
    parser.add_argument("--result", help="JSON file for the table of the documentation")
    parser.add_argument("--smoke", action="store_true", help="a tiny random judge and a few pairs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output_dir or temporary)
        rows = pairs(data_folder(["pairs_hh_harmless"]), 6 if args.smoke else args.rows)
        model = args.model
        if args.smoke:
            from trl_ext.demo.model import tiny_reward_base

            model = tiny_reward_base(temporary)
        reports = {}
        for name in args.arms:
            kept = folder / name.replace(" ", "_").replace(",", "")
            reports[name] = judge_rows(model, rows, kept, batch_size=8, **ARMS[name]).report
    shorter = mean_estimate([float(len(row["chosen"]) < len(row["rejected"])) for row in rows])
    columns = [
        "asked",
        "accuracy",
        "kappa",
        "accuracy in one order",
        "position bias",
        "both orders agree",
        "ECE",
        "label mass",
    ]
    names = ("accuracy", "kappa", "accuracy_one_order", "position_bias", "consistent", "ece", "label_mass")
    table = [[arm, *(shown(report, name) for name in names)] for arm, report in reports.items()]
    ends = f" ({shorter.interval[0]:.3f} to {shorter.interval[1]:.3f})"
    table.append(["the shorter answer wins", f"{shorter.value:.3f}{ends}", *[""] * 6])
    for row in [columns, ["---"] * len(columns), *table]:
        print("| " + " | ".join(row) + " |")
    for arm, report in reports.items():
        for tenth in report.by_confidence:
            print(f"{arm}: confidence {tenth['confidence']:.3f}, right {tenth['right']:.3f}, {tenth['size']} pairs")
    if args.result:
        content = {
            "title": "A judge of 135 million parameters on human preferences (HH-harmless)",
            "date": datetime.date.today().isoformat(),
            "machine": "two-core machine, no GPU",
            "command": ["python examples/studies/judge.py --arms " + " ".join(f'"{arm}"' for arm in args.arms)],
            "note": f"{Path(model).name}, {len(rows)} pairs with answers of at most {LONGEST} characters, prompts "
            f"cut to their last {LONGEST}; 95 % bootstrap intervals over pairs. Position bias: by how much the "
            "probability of the answer that is shown first exceeds 1/2. Accuracy in one order: the mean over both "
            "orders.",
            "columns": columns,
            "rows": table,
        }
        Path(args.result).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
