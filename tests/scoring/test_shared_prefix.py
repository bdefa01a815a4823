"""Scoring rows that share a prompt: packed within bounds, and the same scores as row by row."""

import logging
import random

import pytest
import torch

from trl_ext.scoring import RewardScorer
from trl_ext.scoring import raw_scorer as scorer_module
from trl_ext.scoring.packing import num_tokens, pack, padded_tokens, share_prompts


WORDS = ["quick", "test", "writes", "short", "line", "longer", "one", "counts", "apples", "answer", "good", "kind"]


def best_of_n_rows(prompts: int = 3, n: int = 5, seed: int = 0) -> tuple[list[str], list[str]]:
    """Rows of `prompts` long prompts with `n` short completions each, shuffled."""
    g = random.Random(seed)
    rows = []
    for p in range(prompts):
        prompt = f"{p} " + " ".join(g.choice(WORDS) for _ in range(30))
        rows += [(prompt, " " + " ".join(g.choice(WORDS) for _ in range(g.randint(1, 8)))) for _ in range(n)]
    g.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def flat_batches(scorer, monkeypatch) -> list[int]:
    """Record the tokens of each flat batch."""
    seen: list[int] = []
    run = scorer.raw.runner._flat_batch
    monkeypatch.setattr(
        scorer.raw.runner, "_flat_batch", lambda batch: seen.append(num_tokens(batch, flat=True)) or run(batch)
    )
    return seen


def test_rows_are_grouped_by_prompt_wherever_they_stand():
    groups = share_prompts(["a", "b", "a", None, None], [[1, 2], [3, 4], [1, 5, 6], [7], []])
    assert [(g.rows, list(g.prefix), [list(o) for o in g.own]) for g in groups] == [
        ([0, 2], [1], [[2], [5, 6]]),
        ([1], [3], [[4]]),
        ([3], [], [[7]]),
    ]
    chat = [{"role": "user", "content": "a"}]
    assert [g.rows for g in share_prompts([chat, list(chat)], [[1, 2], [1, 3]])] == [[0, 1]]


@pytest.mark.parametrize("max_tokens,max_rows", [(40, None), (None, 3), (25, 2), (1, None)])
def test_packing_keeps_every_row_once_and_its_bounds(max_tokens, max_rows):
    g = random.Random(0)
    prompts, ids = [], []
    for p in range(6):
        prompt = [g.randint(0, 9) for _ in range(g.randint(1, 12))]
        for _ in range(g.randint(1, 5)):
            prompts.append(str(p))
            ids.append([*prompt, *[g.randint(10, 19) for _ in range(g.randint(1, 9))]])
    batches = pack(share_prompts(prompts, ids), max_tokens, max_rows, flat=True)
    rows = [row for batch in batches for group in batch for row in group.rows]
    assert sorted(rows) == list(range(len(ids)))
    for batch in batches:
        for group in batch:
            assert [[*group.prefix, *own] for own in group.own] == [ids[row] for row in group.rows]
        if sum(len(group.rows) for group in batch) > 1:
            assert max_tokens is None or num_tokens(batch, flat=True) <= max_tokens
            assert max_rows is None or sum(len(group.rows) for group in batch) <= max_rows


def test_padded_tokens_by_hand():
    assert padded_tokens([1, 4, 2], 2) == 4 * 2 + 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores_do_not_depend_on_sharing(reward_path, monkeypatch, family):
    prompts, completions = best_of_n_rows()
    want = RewardScorer(reward_path(family), shared_prefix=False)(prompts, completions)
    assert torch.tensor(want).std() > 0.005
    for batch_size in ("auto", 1, 4, 64):
        scorer = RewardScorer(reward_path(family), batch_size=batch_size)
        seen = flat_batches(scorer, monkeypatch)
        assert scorer(prompts, completions) == pytest.approx(want, abs=2e-6)
        assert bool(seen) == (batch_size != 1)  # one row at a time shares nothing
        assert scorer.model.config.get_text_config()._attn_implementation in ("sdpa", "eager")


def test_memory_is_bounded_by_the_budget_whatever_n(reward_path, monkeypatch):
    monkeypatch.setattr(scorer_module, "TOKEN_BUDGET", 120)
    prompts, completions = best_of_n_rows(prompts=1, n=60)
    want = RewardScorer(reward_path(), shared_prefix=False)(prompts, completions)
    scorer = RewardScorer(reward_path())
    seen = flat_batches(scorer, monkeypatch)
    assert scorer(prompts, completions) == pytest.approx(want, abs=2e-6)
    assert len(seen) > 1 and max(seen) <= 120


def test_out_of_memory_in_a_flat_row_halves_the_budget(reward_path, monkeypatch, caplog):
    prompts, completions = best_of_n_rows()
    want = RewardScorer(reward_path(), shared_prefix=False)(prompts, completions)
    scorer = RewardScorer(reward_path(), shared_prefix=True)
    run = scorer.raw.runner._flat_batch

    def limited(batch):
        if num_tokens(batch, flat=True) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(batch)

    monkeypatch.setattr(scorer.raw.runner, "_flat_batch", limited)
    with caplog.at_level(logging.WARNING):
        assert scorer(prompts, completions) == pytest.approx(want, abs=2e-6)
    assert "did not fit in memory" in caplog.text


def test_rows_without_common_prompts_stay_padded(reward_path, monkeypatch):
    scorer = RewardScorer(reward_path())
    seen = flat_batches(scorer, monkeypatch)
    scorer([f"{n} apples" for n in range(6)], [" are left"] * 6)
    scorer(None, ["the same text", "the same test"])
    assert seen == []


def test_unsupported_models_are_refused_only_on_demand(reward_path):
    with pytest.raises(ValueError, match="shared_prefix=True is not possible: .* no decoder"):
        RewardScorer(reward_path("bert"), shared_prefix=True)
    prompts, completions = best_of_n_rows(n=2)
    assert RewardScorer(reward_path("bert"))(prompts, completions) == pytest.approx(
        RewardScorer(reward_path("bert"), shared_prefix=False)(prompts, completions), abs=1e-6
    )
    with pytest.raises(ValueError, match="shared_prefix='yes' is not known"):
        RewardScorer(reward_path(), shared_prefix="yes")
