"""Combines the labels of several weak models: by their mean, their vote, or a sum with learned weights.

It knows judgements of rows, and how a task judges an output. It knows no models, splits or files.
"""

import math
from collections.abc import Sequence

import numpy as np

from trl_ext.pipelines.weak_to_strong.tasks import Judgement, RewardTask, Row, Task, sigmoid
from trl_ext.scoring.fusion import fit_fusion_weights


# A probability of 0 or 1 has no finite log-odds. It is moved this far from 0 or 1.
CLOSEST = 1e-6


def log_odds(probability: float) -> float:
    """log(p / (1 - p)), kept finite for 0 and 1."""
    probability = min(max(probability, CLOSEST), 1.0 - CLOSEST)
    return math.log(probability / (1.0 - probability))


def learnt_weights(task: RewardTask, rows: Sequence[Row], judgements: Sequence[Sequence[Judgement]]) -> list[float]:
    """
    Fit the weight of each weak model with [`~trl_ext.scoring.fusion.fit_fusion_weights`] (logistic), on rows with
    ground truth that no weak model was trained on.

    Args:
        task ([`~trl_ext.pipelines.weak_to_strong.tasks.RewardTask`]): a task whose labels are probabilities.
        rows (sequence of `dict`, N): rows with ground truth.
        judgements (sequence of M sequences of N [`Judgement`]): judgements of the M weak models.

    Returns:
        `list[float]`: M weights of log-odds.
    """
    margins = []  # log-odds in favour of the truth, for every known label
    for row, given in zip(rows, zip(*judgements, strict=True), strict=True):
        outputs = [_values(judgement.output) for judgement in given]
        for place, gold in enumerate(task.gold_labels(row)):
            if gold not in (None, 0.5):
                margins.append([(1.0 if gold > 0.5 else -1.0) * log_odds(values[place]) for values in outputs])
    return fit_fusion_weights(np.array(margins))


def combine(
    task: Task,
    rows: Sequence[Row],
    judgements: Sequence[Sequence[Judgement]],
    how: str | None = None,
    weights: Sequence[float] | None = None,
) -> list[Judgement]:
    """
    Combine the judgements of several weak models into one per row. Those of a single model are returned unchanged.

    Args:
        task, rows, judgements: as in [`learnt_weights`].
        how (`str`, *optional*):
            `"mean"` of probabilities; `"vote"`, the share of the models with a probability above 0.5; `"learned"`, the
            sigmoid of the weighted sum of log-odds.
        weights (sequence of `float`, *optional*): the weights of `"learned"`.

    Returns:
        `list[Judgement]`, N.
    """
    if len(judgements) == 1 and how != "learned":
        return list(judgements[0])
    combined = []
    for row, given in zip(rows, zip(*judgements, strict=True), strict=True):
        columns = zip(*(_values(judgement.output) for judgement in given), strict=True)
        values = [_one_of(column, how, weights) for column in columns]
        output = values if isinstance(given[0].output, list) else values[0]
        combined.append(task.judge_output(row, output))
    return combined


def _one_of(probabilities: Sequence[float], how: str | None, weights: Sequence[float] | None) -> float:
    if how == "learned":
        return sigmoid(sum(w * log_odds(p) for w, p in zip(weights, probabilities, strict=True)))
    if how == "vote":
        probabilities = [float(p > 0.5) for p in probabilities]
    return sum(probabilities) / len(probabilities)


def _values(output: float | list[float]) -> list[float]:
    return output if isinstance(output, list) else [output]
