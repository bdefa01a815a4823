"""The stages `orm` and `prm`: train an outcome and a process model on the verifier's verdicts, and let them pick.

The outcome model learns whether a whole answer is right. The process model learns whether each line is right. Lines
after the first wrong one have no label, as if an annotator had stopped there. The end of a solution is one more step,
an empty line. It is wrong if lines are missing, because a solution that ends too early has no other wrong step.
"""

import math
from typing import Any

from datasets import Dataset

from trl_ext import ORMConfig, ORMTrainer, PRMConfig, PRMTrainer, RewardScorer
from trl_ext.demo.policy_stages import read_rows
from trl_ext.demo.training import EVALUATED_PROMPTS, Rows, arguments, picks, progress_callback, train_and_reload
from trl_ext.pipelines.stages.cached_stages import StageContext
from trl_ext.scoring.aggregation import aggregators


# The metrics of the trainers' evaluation that the report shows.
OUTCOME_METRICS = ("auc", "question_auc", "balanced_accuracy")
STEP_METRICS = ("auc_to_first_error", "step_index_auc", "balanced_accuracy", "processbench_f1")

EVAL_BATCH_SIZE = 256


def run_orm(context: StageContext) -> dict[str, Any]:
    """
    Trains an outcome model on samples that are right or wrong.

    Only the last token has a label. `ORMConfig` labels every token by default, but after such a short training that
    model picks hardly better than chance: the first tokens do not show yet whether the answer will be right.

    Best of n uses the log-odds at the last token. In the vote, each sample counts with its probability of being right.

    Returns:
        `dict`: the results of [`~trl_ext.demo.training.picks`] and [`~trl_ext.demo.training.train_and_reload`], and
        `OUTCOME_METRICS`.
    """
    train_rows, held_out_rows = _rows(context)

    def dataset(rows: Rows) -> Dataset:
        return Dataset.from_list(
            [
                {"prompt": row["prompt"], "completion": text, "label": right}
                for row in rows
                for text, right in zip(row["completions"], row["answer_right"], strict=True)
            ]
        )

    trainer = ORMTrainer(
        model=str(context.folders["policy"].resolve()),
        args=ORMConfig(label_placement="last", **arguments(context, EVAL_BATCH_SIZE)),
        train_dataset=dataset(train_rows),
        eval_dataset=dataset(held_out_rows[:EVALUATED_PROMPTS]),
        callbacks=[progress_callback(context)],
    )
    report, scores = train_and_reload(context, trainer, held_out_rows, _log_odds, OUTCOME_METRICS)
    by_prompt = [[score for (score,) in row] for row in scores]
    probabilities = [[1 / (1 + math.exp(-score)) for score in row] for row in by_prompt]
    return {**picks(held_out_rows, by_prompt, probabilities), **report}


def run_prm(context: StageContext) -> dict[str, Any]:
    """
    Trains a process model on lines that are right or wrong, and on whether it was right to end there.

    Best of n uses the least certain step (`min`, the scorer's default). `best_of_n_prod` uses the product over the
    steps, which is the probability that every step is right. The product is also the weight of a sample in the vote.

    Returns:
        `dict`: the results of [`~trl_ext.demo.training.picks`] and [`~trl_ext.demo.training.train_and_reload`],
        `best_of_n_prod`, and `STEP_METRICS`.
    """
    columns = ("completions", "steps_right", "answer_right")
    train_rows, held_out_rows = _rows(context)

    def dataset(rows: Rows) -> Dataset:
        return Dataset.from_list(
            [
                {"prompt": row["prompt"], "completions": lines(text), "labels": [*steps, answer]}
                for row in rows
                for text, steps, answer in zip(*(row[name] for name in columns), strict=True)
            ]
        )

    trainer = PRMTrainer(
        model=str(context.folders["policy"].resolve()),
        args=PRMConfig(mask_after_first_error=True, **arguments(context, EVAL_BATCH_SIZE)),
        train_dataset=dataset(train_rows),
        eval_dataset=dataset(held_out_rows[:EVALUATED_PROMPTS]),
        callbacks=[progress_callback(context)],
    )
    report, scores = train_and_reload(context, trainer, held_out_rows, _steps, STEP_METRICS)
    least, product = ([[aggregators.get(name)(steps) for steps in row] for row in scores] for name in ("min", "prod"))
    by_product = picks(held_out_rows, product, product)
    return {**picks(held_out_rows, least, product), "best_of_n_prod": by_product["best_of_n"], **report}


def _rows(context: StageContext) -> tuple[Rows, Rows]:
    """The training rows (no more than the steps need) and the held-out rows."""
    settings, samples = context.settings, context.folders["samples"]
    train_rows = read_rows(samples, "train")
    needed = math.ceil(settings["steps"] * settings["batch_size"] / len(train_rows[0]["completions"]))
    return train_rows[:needed], read_rows(samples, "held_out")


def _log_odds(scorer: RewardScorer, prompts: list[str], completions: list[str]) -> list[list[float]]:
    return [[score] for score in scorer(prompts, completions)]


def _steps(scorer: RewardScorer, prompts: list[str], completions: list[str]) -> list[list[float]]:
    return scorer.score_steps(prompts, [lines(text) for text in completions])


def lines(completion: str) -> list[str]:
    """The steps of a solution: its lines, and an empty one for ending there."""
    return [*completion.splitlines(), ""]
