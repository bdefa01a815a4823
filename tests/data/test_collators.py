"""GroupCollator and SpanCollator: exact tensors, key order, ragged groups."""

import pytest
import torch

from trl_ext.data.collators import GroupCollator, SpanCollator
from trl_ext.data.prefix_layout import build_layout


ROWS = [
    {"candidate_ids": [[5, 6, 7], [5, 8]], "candidate_ratings": [1.0, 0.0], "row_index": 3},
    {"candidate_ids": [[9, 1], [9, 2], [9]], "candidate_ratings": [2.0, 5.0, 2.0], "row_index": 4},
]


def test_ragged_groups_by_hand():
    batch = GroupCollator(pad_token_id=99)(ROWS)
    assert list(batch) == ["ratings", "group_mask", "completion_lengths", "row_index", "input_ids", "attention_mask"]
    expected = {
        "ratings": torch.tensor([[1.0, 0.0, 0.0], [2.0, 5.0, 2.0]]),
        "group_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "completion_lengths": torch.tensor([[2, 1, 0], [2, 2, 1]]),
        "row_index": torch.tensor([3, 4]),
        "input_ids": torch.tensor([[5, 6, 7], [5, 8, 99], [9, 1, 99], [9, 2, 99], [9, 99, 99]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]]),
    }
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name


def test_margin_and_target_travel_when_present():
    rows = [{**row, "group_margin": 0.5 * i, "group_target": 0.25} for i, row in enumerate(ROWS)]
    batch = GroupCollator(0)(rows)
    assert list(batch) == [
        "ratings",
        "group_mask",
        "completion_lengths",
        "row_index",
        "margin",
        "target",
        "input_ids",
        "attention_mask",
    ]
    assert torch.equal(batch["margin"], torch.tensor([0.0, 0.5]))
    assert torch.equal(batch["target"], torch.tensor([0.25, 0.25]))
    assert batch["margin"].dtype == batch["target"].dtype == torch.float32


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (3, 3), (8, 8)])
def test_pad_to_multiple_of(multiple, width):
    batch = GroupCollator(0, pad_to_multiple_of=multiple)(ROWS)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, width)
    assert batch["attention_mask"].sum().item() == 3 + 2 + 2 + 2 + 1


def test_pad_id_that_is_a_real_token_is_not_masked_where_it_is_real():
    batch = GroupCollator(pad_token_id=6)(ROWS)
    assert batch["attention_mask"][0].tolist() == [1, 1, 1]
    assert batch["input_ids"][0].tolist() == [5, 6, 7]


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        GroupCollator(0)([])
    with pytest.raises(ValueError, match="row 7 has 2 candidates and 1 ratings"):
        GroupCollator(0)([{"candidate_ids": [[1], [2]], "candidate_ratings": [1.0], "row_index": 7}])


SPAN_ROWS = [
    {
        "span_input_ids": [5, 6, 7, 8],
        "label_positions": [1, 3, 3],
        "label_values": [1.0, 0.0, -0.5],
        "label_categories": [0, 0, 1],
        "label_steps": [0, 2, 1],
        "completion_start": 1,
        "row_index": 3,
    },
    {
        "span_input_ids": [9, 9],
        "label_positions": [],
        "label_values": [],
        "label_categories": [],
        "label_steps": [],
        "completion_start": 2,
        "row_index": 5,
    },
]


def test_spans_by_hand():
    batch = SpanCollator(pad_token_id=99, num_categories=2)(SPAN_ROWS)
    expected = {
        "token_labels": torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, -0.5]], [[0.0, 0.0]] * 4]),
        "label_mask": torch.tensor([[[False] * 2, [True, False], [False] * 2, [True] * 2], [[False] * 2] * 4]),
        "label_steps": torch.tensor([[[-1, -1], [0, -1], [-1, -1], [2, 1]], [[-1, -1]] * 4]),
        "completion_start": torch.tensor([1, 2]),
        "row_index": torch.tensor([3, 5]),
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 9, 99, 99]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    assert list(batch) == list(expected)  # token_labels first, so that the first tensor counts sequences
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name
    assert SpanCollator(0, 2, pad_to_multiple_of=8)(SPAN_ROWS)["token_labels"].shape == (2, 8, 2)


def test_span_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        SpanCollator(0)([])
    with pytest.raises(ValueError, match="row 3 has a label of category 1, but num_categories is 1"):
        SpanCollator(0)(SPAN_ROWS)


def span_row(number, prompt, own):
    ids = [*prompt, *own]
    return {
        "span_input_ids": ids,
        "label_positions": [len(ids) - 1],
        "label_values": [1.0],
        "label_categories": [0],
        "label_steps": [0],
        "completion_start": len(prompt),
        "row_index": number,
    }


def test_a_flat_row_of_spans_has_each_prompt_once_and_keeps_the_order_of_the_rows():
    one, two = [5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11]
    rows = [span_row(0, one, [1, 2]), span_row(1, two, [3]), span_row(2, one, [1, 4, 4]), span_row(3, [], [2, 2])]
    padded, flat = SpanCollator(0)(rows), SpanCollator(0, shared_prefix=True)(rows)
    assert all(torch.equal(flat[name], padded[name]) for name in padded)
    layout, index = flat["prefix_layout"], flat["token_index"]
    # the prefix that rows of a prompt share may be longer than it (here by the token 1)
    assert layout.num_tokens == (7 + 1 + 2) + 7 + 2 and layout.padded_tokens == 4 * 9
    real = padded["attention_mask"].bool()
    assert torch.equal(layout.input_ids[0][index][real], padded["input_ids"][real])
    positions = torch.arange(index.shape[1]).expand_as(index)
    assert torch.equal(layout.position_ids[0][index][real], positions[real])
    assert set(index[real].tolist()) == set(range(layout.num_tokens))
    assert index[0, :7].tolist() == index[2, :7].tolist()  # not those of row 1
    assert not set(index[1].tolist()) & set(index[0].tolist()) - {0}


def test_spans_stay_padded_where_a_flat_row_saves_nothing():
    rows = [span_row(0, [5, 6], [1, 2]), span_row(1, [7, 6], [3, 4])]
    assert "prefix_layout" not in SpanCollator(0, shared_prefix=True)(rows)


def test_a_prompt_without_a_completion_is_a_row_of_its_own():
    prompt = list(range(5, 25))
    rows = [span_row(0, prompt, [1, 2]), span_row(1, prompt, []), span_row(2, prompt, [3])]
    batch = SpanCollator(0, shared_prefix=True)(rows)
    assert batch["prefix_layout"].num_tokens == 20 + 2 + 1 + 20
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["prefix_layout"].input_ids[0][batch["token_index"]][real], batch["input_ids"][real])


def test_a_repeated_layout_is_that_of_the_repeated_groups():
    groups = [([7, 8, 9], [[1], [2, 3]]), ([], [[4, 5]]), ([5] * 90, [[6] * 70, [7] * 3])]
    repeated, expected = build_layout(groups).repeated(3), build_layout(groups * 3)
    assert torch.equal(repeated.input_ids, expected.input_ids) and torch.equal(repeated.last, expected.last)
    assert torch.equal(repeated.position_ids, expected.position_ids)
    assert repeated.completions == expected.completions and repeated.sequences() == expected.sequences()
    assert repeated.sequence_tokens == expected.sequence_tokens and repeated.padded_tokens == expected.padded_tokens
    queries = torch.cat([block.query_index.flatten() for block in repeated.blocks])
    assert torch.equal(queries[repeated.inverse], torch.arange(repeated.num_tokens))
    seen = []  # what each token sees, block by block
    for layout in (repeated, expected):
        keys = {}
        for block in layout.blocks:
            causal = torch.ones(block.query_index.shape[1], block.key_index.shape[1], dtype=torch.bool).tril()
            mask = causal.expand(len(block.query_index), -1, -1) if block.mask() is None else block.mask()[:, 0]
            for query, key, sees in zip(block.query_index, block.key_index, mask, strict=True):
                keys |= {int(q): sorted(set(key[row].tolist())) for q, row in zip(query, sees, strict=True)}
        seen.append(keys)
    assert seen[0] == seen[1]
