"""The stage `ensemble`: members branched above the first layers, trained in one run, reloaded, and what they pick.

Reducers are compared on one set of scores: the mean, the worst member, and the mean less a share of the variance. It
knows trainers and folders; how an answer is picked is in `picking`.
"""

import time
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from trl_ext import RewardEnsemble, RewardEnsembleConfig, RewardEnsembleTrainer
from trl_ext.demo.picking import mean_and_error, paired_gain
from trl_ext.demo.policy_stages import read_rows
from trl_ext.demo.reward_stages import softmax
from trl_ext.demo.training import EVALUATED_PROMPTS, Rows, adapter, arguments, picks, progress_callback
from trl_ext.metrics.voting import best_of_k
from trl_ext.pipelines.stages.cached_stages import StageContext


# Beside the mean, which is the best of n of the stage.
REDUCERS = {"min": {"reduce": "min"}, "uwo": {"reduce": "mean_minus_var", "coefficient": 0.5}}


def run_ensemble(context: StageContext) -> dict[str, Any]:
    """
    Trains on `train.jsonl`, saves a folder for each member, reloads all in one pass and scores `held_out.jsonl`.

    Settings beside those of the other models: `members`, and `branch_at`, the share of the layers without adapters.

    Returns:
        `dict`: for the mean of the members what [`~trl_ext.demo.training.picks`] gives, and `pair_accuracy`;
        `best_of_n_by`: the best of n by each member alone (`member-0`, ...) and by `REDUCERS`;
        `mean_over_members`: the paired gain of the mean over what the members reach on average; `loss`,
        `reload_difference` beside `score_std`, and seconds, as of the other models.
    """
    settings, columns = context.settings, ("prompt", "completions", "ratings")
    held_out_rows = read_rows(context.folders["samples"], "held_out")

    def dataset(rows: Rows) -> Dataset:
        return Dataset.from_list([{name: row[name] for name in columns} for row in rows])

    trainer = RewardEnsembleTrainer(
        model=str(context.folders["policy"].resolve()),
        args=RewardEnsembleConfig(
            loss_type="plackett_luce",
            num_members=settings["members"],
            branch_at=settings["branch_at"],
            data_strategy="bootstrap",
            **arguments(context, eval_batch_size=32),
        ),
        train_dataset=dataset(read_rows(context.folders["samples"], "train")),
        eval_dataset=dataset(held_out_rows[:EVALUATED_PROMPTS]),
        peft_config=adapter(context),
        callbacks=[progress_callback(context)],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    loss = trainer.train().training_loss
    train_seconds = time.monotonic() - start
    evaluation = trainer.evaluate()
    trainer.save_model(str(context.folder))
    before = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)  # (prompts, K, M)

    start = time.monotonic()
    ensemble = RewardEnsemble(context.folder, normalize=False)  # one loss for all gives them one scale
    prompts = [row["prompt"] for row in held_out_rows for _ in row["completions"]]
    scores = ensemble.score_members(prompts, [text for row in held_out_rows for text in row["completions"]])
    score_seconds = time.monotonic() - start
    context.progress(1.0)

    table = torch.tensor(scores)  # (prompts * K, M)
    by_prompt = table.view(len(held_out_rows), -1, settings["members"])
    mean = by_prompt.mean(-1).tolist()
    right = [row["answer_right"] for row in held_out_rows]

    def best(own: list[list[float]]) -> list[float]:
        return [best_of_k(truth, row, len(row)) for truth, row in zip(right, own, strict=True)]

    alone = {name: best(by_prompt[..., member].tolist()) for member, name in enumerate(ensemble.members)}
    together = {}
    for name, arguments_of_reducer in REDUCERS.items():
        ensemble.set_reducer(**arguments_of_reducer)
        reduced = torch.tensor(ensemble.combine(scores)).view(len(held_out_rows), -1)
        together[name] = best(reduced.tolist())
    average = [sum(own) / len(own) for own in zip(*alone.values(), strict=True)]
    return {
        **picks(held_out_rows, mean, [softmax(row) for row in mean]),
        "best_of_n_by": {name: mean_and_error(own) for name, own in {**alone, **together}.items()},
        "mean_over_members": paired_gain(best(mean), average),
        "loss": loss,
        "pair_accuracy": evaluation["eval_accuracy"],
        "reload_difference": (by_prompt[: len(before)] - before).abs().max().item(),
        "score_std": table.std().item(),
        "train_seconds": train_seconds,
        "score_seconds": score_seconds,
    }
