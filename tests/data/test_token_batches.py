"""Batches by tokens and by prompt: budgets, order, and every row once, for one process and several."""

import random

import pytest
from datasets import Dataset

from trl_ext.data.collators import GroupCollator, SpanCollator
from trl_ext.data.token_batches import (
    RowSize,
    fill_processes,
    group_sizes,
    order_rows,
    pack_by_rows,
    pack_by_tokens,
    span_sizes,
    tokens_alone,
)


def groups(n: int, seed: int = 0) -> Dataset:
    """Groups of two to five candidates, with and without a common prompt."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = [number % 90 + 5] * rng.choice([0, 3, 20])
        candidates = [
            prompt + [rng.randrange(5, 95) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(2, 5))
        ]
        rows.append({"candidate_ids": candidates, "candidate_ratings": [0.0] * len(candidates), "row_index": number})
    return Dataset.from_list(rows)


def spans(n: int, prompts: int = 5, seed: int = 0) -> Dataset:
    """Rows of a few prompts, some without a prompt or without a completion."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = [rng.randrange(prompts) + 5] * 12 if number % 7 else []
        own = [rng.randrange(5, 95) for _ in range(rng.randint(1, 9))] if number % 11 or not prompt else []
        rows.append(
            {
                "span_input_ids": prompt + own,
                "completion_start": len(prompt),
                "label_positions": [0],
                "label_values": [1.0],
                "label_categories": [0],
                "label_steps": [0],
                "row_index": number,
            }
        )
    return Dataset.from_list(rows)


def paid(batch: dict) -> int:
    """Tokens that a collated batch sends through the model."""
    return batch["prefix_layout"].num_tokens if "prefix_layout" in batch else batch["input_ids"].numel()


def test_the_examples_are_true():
    rows = [RowSize(9, 1, 9, prompt, 4) for prompt in (7, 8, 7, 8)]
    assert order_rows(rows, "sequential", 0, by_prompt=True) == [0, 2, 1, 3]
    rows = [RowSize(flat, 2, longest) for flat, longest in ((30, 20), (30, 20), (90, 50), (20, 15))]
    assert pack_by_tokens(rows, range(4), max_tokens=60, flat_rows=True) == [[0, 1], [2], [3]]
    assert pack_by_tokens(rows, range(4), max_tokens=60, flat_rows=False) == [[0], [1], [2], [3]]
    assert fill_processes([[0, 1], [2, 3, 4], [5]], processes=2, drop_last=False) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("kind", ["groups", "spans"])
def test_no_batch_costs_more_than_the_budget_and_every_row_comes_once(kind, strategy, flat, multiple):
    data = groups(60) if kind == "groups" else spans(60)
    sizes = group_sizes(data, flat) if kind == "groups" else span_sizes(data)
    collator = (
        GroupCollator(0, multiple, shared_prefix=flat) if kind == "groups" else SpanCollator(0, 1, multiple, flat)
    )
    order = order_rows(sizes, strategy, seed=3)
    for budget in (40, 150, 10_000):
        batches = pack_by_tokens(sizes, order, budget, flat, multiple)
        assert sum(batches, []) == order and sorted(order) == list(range(60))
        costs = [paid(collator([data[row] for row in rows])) for rows in batches]
        for rows, cost in zip(batches, costs, strict=True):
            assert cost <= budget or len(rows) == 1
            if len(rows) == 1:
                assert cost == tokens_alone(sizes[rows[0]], flat, multiple)
        if budget == 150:  # full: the next row would not have fit
            for rows, following in zip(batches, batches[1:], strict=False):
                assert pack_by_tokens(sizes, [*rows, following[0]], budget, flat, multiple)[0] == rows


def test_costs_by_hand():
    sizes = group_sizes(Dataset.from_list([{"candidate_ids": [[1, 2, 3], [1, 2, 4, 5]]}]), shared_prefix=True)
    assert sizes == [RowSize(flat=5, sequences=2, longest=4)]
    assert tokens_alone(sizes[0], flat_rows=True) == 5
    assert tokens_alone(sizes[0], flat_rows=False) == 8
    assert tokens_alone(sizes[0], flat_rows=False, multiple=8) == 16
    same, other = [5, 6], [5, 7]
    rows = [{"span_input_ids": prompt + [8, 9], "completion_start": 2} for prompt in (same, same, other)]
    sizes = span_sizes(Dataset.from_list(rows))
    assert sizes[0] == sizes[1] != sizes[2]
    assert (sizes[0].flat, sizes[0].prompt_tokens) == (4, 2)
    # 4 tokens, 2 more for the completion of the same prompt; the other prompt adds 4
    assert pack_by_tokens(sizes, [0, 1, 2], 6, flat_rows=True) == [[0, 1], [2]]
    assert pack_by_tokens(sizes, [0, 1, 2], 10, flat_rows=True) == [[0, 1, 2]]


def test_orders():
    sizes = span_sizes(spans(60))
    assert order_rows(sizes, "sequential", 0) == list(range(60))
    assert order_rows(sizes, "random", 0) == order_rows(sizes, "random", 0) != order_rows(sizes, "random", 1)
    lengths = [sizes[row].longest for row in order_rows(sizes, "group_by_length", 0)]
    assert lengths == sorted(lengths, reverse=True)
    for strategy in ("sequential", "random"):
        order = order_rows(sizes, strategy, 0, by_prompt=True)
        assert sorted(order) == list(range(60))
        prompts = [sizes[row].prompt for row in order if sizes[row].prompt is not None]
        changes = sum(before != after for before, after in zip(prompts, prompts[1:], strict=False))
        assert changes == len(set(prompts)) - 1 == 4
        # rows without a prompt are not thrown together
        alone = [position for position, row in enumerate(order) if sizes[row].prompt is None]
        assert alone != list(range(alone[0], alone[0] + len(alone)))


def test_batches_of_rows():
    assert pack_by_rows([3, 1, 2, 0, 4], 2, drop_last=False) == [[3, 1], [2, 0], [4]]
    assert pack_by_rows([3, 1, 2, 0, 4], 2, drop_last=True) == [[3, 1], [2, 0]]
    assert pack_by_rows([3, 1], 2, drop_last=True) == [[3, 1]]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_process_has_as_many_batches(processes):
    batches = pack_by_rows(range(41), 5, drop_last=False)  # 9 of them
    filled = fill_processes(batches, processes, drop_last=False)
    assert len(filled) % processes == 0 and sum(filled, []) == list(range(41))
    dropped = fill_processes(batches, processes, drop_last=True)
    assert len(dropped) == 9 // processes * processes and dropped == batches[: len(dropped)]
    assert fill_processes([[0]], 2, drop_last=False) == [[0]]  # left to the loader, which repeats it
