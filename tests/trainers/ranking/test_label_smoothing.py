"""`label_smoothing_factor` has its standard meaning, or is refused."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, trainer_for
from tests.trainers.table import outcome_rows, step_rows, tiny_trainer
from trl_ext.data.validation import DataError
from trl_ext.trainers.ranking.objective import RankingObjective
from trl_ext.trainers.token.objective import TokenObjective


def batch(**more):
    ratings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return {"ratings": ratings, "group_mask": torch.ones(2, 2, dtype=torch.bool), **more}


def test_bradley_terry_is_the_conservative_loss():
    scores = torch.tensor([[2.0, 0.5], [0.25, 1.0]])
    delta = torch.tensor([1.5, 0.75])  # of the better one
    found = RankingObjective("bradley_terry", label_smoothing=0.1)(scores, batch())
    assert torch.allclose(found, -0.9 * F.logsigmoid(delta) - 0.1 * F.logsigmoid(-delta))
    soft = RankingObjective("bradley_terry", label_smoothing=0.1)(scores, batch(target=torch.tensor([0.8, 0.5])))
    wanted = RankingObjective("bradley_terry")(scores, batch(target=torch.tensor([0.8 * 0.9 + 0.2 * 0.1, 0.5])))
    assert torch.allclose(soft, wanted)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_token_losses_get_smoothed_labels(outputs):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 1, outputs)
    labels = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])[..., None]
    if outputs == 3:
        labels = labels * torch.tensor([1.0, -1.0, 1.0])[:, None]
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    objective = TokenObjective("bce" if outputs == 1 else "ce", None, None, "token", 1, outputs, label_smoothing=0.2)
    found = objective.sums(logits, {"token_labels": labels, "label_mask": mask})
    if outputs == 1:
        smooth = labels * 0.8 + 0.1
        wanted = F.binary_cross_entropy_with_logits(logits[..., 0], smooth, reduction="none").sum((1, 2))
    else:
        classes = (labels + (1 if outputs == 3 else 0)).long().flatten()
        each = F.cross_entropy(logits.reshape(-1, outputs), classes, reduction="none", label_smoothing=0.2)
        wanted = each.view(2, 3).sum(1)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_it_changes_the_training(base, tmp_path):
    plain, smooth = (trainer_for(base, config(tmp_path, label_smoothing_factor=f)) for f in (0.0, 0.2))
    plain.train()
    smooth.train()
    assert history(plain, "loss")[-1] != pytest.approx(history(smooth, "loss")[-1], abs=1e-5)
    rows = outcome_rows(12)
    plain, smooth = (tiny_trainer("orm", base, tmp_path, rows, label_smoothing_factor=f) for f in (0.0, 0.2))
    plain.train()
    smooth.train()
    assert history(plain, "loss")[-1] != pytest.approx(history(smooth, "loss")[-1], abs=1e-5)
    tiny_trainer("prm", base, tmp_path, step_rows(12, classes=3), num_labels=3, label_smoothing_factor=0.2).train()


def test_what_cannot_be_smoothed_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1.*'plackett_luce' takes no probability"):
        trainer_for(base, config(tmp_path, loss_type="plackett_luce", label_smoothing_factor=0.1), ranked_rows(4))
    with pytest.raises(ValueError, match="at least 0 and below 0.5"):
        trainer_for(base, config(tmp_path, label_smoothing_factor=0.5))
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1.*'mse' does not learn probabilities"):
        tiny_trainer("segment", base, tmp_path, label_smoothing_factor=0.1)
    rows = Dataset.from_list([{**row, "margin": 1.0} for row in pair_rows(4)])
    with pytest.raises(DataError, match="a margin beside label_smoothing_factor=0.1"):
        trainer_for(base, config(tmp_path, label_smoothing_factor=0.1), rows)
