"""Dynamic and longrope RoPE: rows that may run in one batch, and scores that do not depend on the other rows."""

import pytest
import torch

from tests.models.helpers import tiny_base, train
from tests.tiny import tiny_config
from trl_ext import RewardScorer
from trl_ext.models.rope import length_class, original_context
from trl_ext.trainers.common.head_training import warn_of_rope


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10_000.0}
LONG |= {"original_max_position_embeddings": 32, "factor": 4.0}
PHI = {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "hidden_size": 64, "head_dim": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
KINDS = {
    "longrope": ("phi3", {"rope_parameters": LONG, **PHI}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
}


def test_classes_of_lengths():
    family, kwargs = KINDS["longrope"]
    longrope = length_class(tiny_config(family, 99, **kwargs))
    assert [longrope(n) for n in (1, 32, 33, 500)] == [0, 0, 1, 1]
    family, kwargs = KINDS["dynamic"]
    dynamic = length_class(tiny_config(family, 99, **kwargs))
    assert [dynamic(n) for n in (1, 32, 33, 500)] == [0, 0, 33, 500]
    assert original_context(tiny_config(family, 99, **kwargs)) == 32
    for other in ("llama", "gpt2", "bert", "gemma3_text"):
        assert length_class(tiny_config(other, 99))(10_000) == 0
        assert original_context(tiny_config(other, 99)) is None


@pytest.mark.parametrize(("max_length", "warned"), [(33, True), (None, True), (32, False)])
def test_training_says_that_a_loss_may_depend_on_longer_rows(caplog, max_length, warned):
    family, kwargs = KINDS["dynamic"]
    warn_of_rope(tiny_config(family, 99, **kwargs), max_length)
    assert ("max_length=32 or per_device_train_batch_size=1" in caplog.text) == warned


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_longer_rows(tmp_path, kind):
    family, kwargs = KINDS[kind]
    train(tiny_base(tmp_path / "base", family, **kwargs), tmp_path / "model", learning_rate=1e-2)
    texts = [" good" * n for n in (3, 9, 31, 32, 40, 40, 50, 60)]
    prompts = ["a question that is shared"] * 4 + [None] * 4
    fresh = [RewardScorer(tmp_path / "model")([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert torch.tensor(fresh).std() > 1e-3
    for batch_size in (1, 3, 8, "auto"):
        scorer = RewardScorer(tmp_path / "model", batch_size=batch_size)
        for _ in range(2):  # nothing of the longest row is left
            assert scorer(prompts, texts) == pytest.approx(fresh, abs=1e-6)
        assert scorer(prompts[::-1], texts[::-1]) == pytest.approx(fresh[::-1], abs=1e-6)
