"""The stage `ensemble`: trains members that share the first layers in one run, reloads them, and picks answers.

It compares reducers on one set of scores: the mean, the worst member, and the mean minus a share of the variance. It
knows trainers and folders; `picking` knows how an answer is picked.
"""

import time
from typing import Any

import torch

from trl_ext import RewardEnsemble, RewardEnsembleConfig, RewardEnsembleTrainer
from trl_ext.demo.picking import mean_and_error, paired_gain
from trl_ext.demo.policy_stages import read_rows
from trl_ext.demo.reward_stages import softmax
from trl_ext.demo.training import (
    EVALUATED_PROMPTS,
    adapter,
    arguments,
    picks,
    progress_callback,
    ranked,
    train_and_save,
)
from trl_ext.metrics.voting import best_of_k
from trl_ext.pipelines.stages.cached_stages import StageContext


# Reducers whose best of n the stage reports in addition to that of the mean.
REDUCERS = {"min": {"reduce": "min"}, "uwo": {"reduce": "mean_minus_var", "coefficient": 0.5}}


def run_ensemble(context: StageContext) -> dict[str, Any]:
    """
    Trains on `train.jsonl`, saves a folder for each member, reloads all in one pass and scores `held_out.jsonl`.

    It has two settings that the other models lack: `members`, and `branch_at`, the share of the layers without
    adapters.

    Returns:
        `dict`: the result of [`~trl_ext.demo.training.picks`] for the mean of the members, and `pair_accuracy`;
        `best_of_n_by`: the best of n by each member alone (`member-0`, ...) and by `REDUCERS`;
        `mean_over_members`: the paired gain of the mean over the average of the members; `loss`, `reload_difference`,
        `score_std` and seconds, as for the other models.
    """
    settings = context.settings
    held_out_rows = read_rows(context.folders["samples"], "held_out")
    trainer = RewardEnsembleTrainer(
        model=str(context.folders["policy"].resolve()),
        args=RewardEnsembleConfig(
            loss_type="plackett_luce",
            num_members=settings["members"],
            branch_at=settings["branch_at"],
            data_strategy="bootstrap",
            **arguments(context, eval_batch_size=32),
        ),
        train_dataset=ranked(read_rows(context.folders["samples"], "train")),
        eval_dataset=ranked(held_out_rows[:EVALUATED_PROMPTS]),
        peft_config=adapter(context),
        callbacks=[progress_callback(context)],
    )
    trained, evaluation = train_and_save(context, trainer)
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
        **trained,
        "pair_accuracy": evaluation["eval_accuracy"],
        "reload_difference": (by_prompt[: len(before)] - before).abs().max().item(),
        "score_std": table.std().item(),
        "score_seconds": score_seconds,
    }
