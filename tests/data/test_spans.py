"""prepare_spans: the three kinds of rows, and where their labels go."""

import random
import unicodedata

import pytest
import torch
from datasets import Dataset

from tests.data.span_helpers import (
    NEW,
    TOKENIZER,
    labelled_text,
    nonzero,
    outcome,
    prepare,
    segmented,
    stepwise,
    stream_of,
)
from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data.collators import SpanCollator
from trl_ext.data.spans import find_categories, mask_after_first_error, prefix_score_differences
from trl_ext.data.tokenization import TokenizationSettings, encode


USER = [{"role": "user", "content": "What is 7 * 8?"}]
FIVE_KINDS = [kind for kind in TOKENIZER_KINDS if kind != "bert"]


# -- outcome rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_outcome_labels_the_completion_and_what_closes_it(kind, chat):
    tokenizer = tiny_tokenizer(kind)
    prompt = USER if chat else "7 * 8 ="
    completion = [{"role": "assistant", "content": " 56."}] if chat else " 56."
    rows = [outcome(completion, label, prompt) for label in (True, False)]
    prepared, report = prepare(rows, "outcome", tokenizer)
    last, _ = prepare(rows, "outcome", tokenizer, label_placement="last")
    ids = encode(tokenizer, prompt, completion, TokenizationSettings.for_training(tokenizer)).ids
    alone = (
        tokenizer.apply_chat_template([prompt], add_generation_prompt=True) if chat else [tokenizer(prompt).input_ids]
    )
    for number, row in enumerate(prepared):
        assert row["span_input_ids"] == ids
        assert row["label_positions"] == list(range(row["completion_start"], len(ids)))
        assert row["label_values"] == [float(not number)] * len(row["label_positions"])
        assert set(row["label_steps"]) == set(row["label_categories"]) == {0}
        assert last[number]["label_positions"] == [len(ids) - 1]
        before = tokenizer.decode(ids[: row["completion_start"]])
        assert "56" not in before and "56" in tokenizer.decode(ids[row["completion_start"] :])
        assert row["completion_start"] >= len(alone[0]) - 2 or chat
    assert (report.rows, report.kept) == (2, 2)
    assert nonzero(report) == ({"stripped": 2} if chat and kind == "llama" else {})


def test_outcome_without_a_label_is_dropped_and_counted():
    rows = [outcome(label=1.0), outcome(label=None), outcome(label=0.25)]
    prepared, report = prepare(rows, "outcome")
    assert prepared["row_index"][:] == [0, 2]
    assert prepared[1]["label_values"][0] == 0.25
    assert nonzero(report) == {"unlabelled_rows": 1, "unannotated": 1}
    assert "1 dropped: without a labelled token" in report.summary()


def test_columns_are_new_and_others_stay():
    rows = [stepwise() | {"id": "a"}, stepwise(labels=(None, True)) | {"id": "b"}]
    source = Dataset.from_list(rows)
    prepared, _ = prepare(source, "stepwise")
    assert prepared.column_names == ["prompt", "completions", "labels", "id", *NEW]
    for name, feature in source.features.items():
        assert prepared.features[name] == feature
        assert prepared[name][:] == source[name][:]


# -- stepwise rows ---------------------------------------------------------------------------------------------------

PIECES = [
    "3 + 4 = 7",
    "So",
    " the answer",
    "\n",
    "\n\n",
    "  ",
    "日本語。",
    "🙂",
    "Über",
    "cafe\u0301",
    "don't",
    ".",
    ":",
    "é",
    "",
]


def random_steps(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 4))) for _ in range(rng.randint(1, 6))]


@pytest.mark.parametrize("kind", FIVE_KINDS)
@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки\n", ""])
def test_each_step_is_labelled_on_the_token_with_its_last_character(kind, separator):
    tokenizer = tiny_tokenizer(kind)
    rng = random.Random(kind + separator)
    rows = []
    while len(rows) < 60:
        steps = random_steps(rng)
        if "".join(steps) + separator:
            prompt = rng.choice(["Question: 12 - 3?", "Question?\n", "é", "日"])
            rows.append(stepwise(steps, [rng.random() < 0.5 for _ in steps], prompt))
    streamed, report = prepare(stream_of(rows), "stepwise", tokenizer, step_separator=separator, min_survival=0.0)
    prepared = {row["row_index"]: row for row in streamed}
    assert report.rows == 60
    clean = lost = 0
    for number, row in enumerate(rows):
        text = row["prompt"] + "".join(step + separator for step in row["completions"])
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        if number not in prepared:
            continue
        new = prepared[number]
        assert new["span_input_ids"] == ids
        # The reference: the first token after which the decoded text has the whole prefix.
        claims: dict[int, list[int]] = {}
        prefix = row["prompt"]
        for step, piece in enumerate(row["completions"]):
            prefix += piece + separator
            wanted = unicodedata.normalize("NFC", prefix) if kind == "qwen" else prefix
            if piece + separator:
                decoded = (tokenizer.decode(ids[: t + 1], skip_special_tokens=True) for t in range(len(ids)))
                anchor = next(t for t, head in enumerate(decoded) if head.startswith(wanted))
                claims.setdefault(anchor, []).append(step)
            else:
                lost += 1
        for anchor, steps in claims.items():
            labels = {row["labels"][step] for step in steps}
            if len(labels) == 1:
                at = new["label_positions"].index(anchor)
                assert new["label_values"][at] == float(labels.pop()) and new["label_steps"][at] == steps[0]
            else:
                assert anchor not in new["label_positions"]
            lost += (len(steps) - 1) if len({row["labels"][step] for step in steps}) == 1 else len(steps)
        assert set(new["label_positions"]) <= set(claims)
        if all(len(steps) == 1 for steps in claims.values()) and separator:
            clean += 1
            assert len(new["label_positions"]) == len(row["completions"])
    assert clean > 5 or not separator
    counted = sum(report.counts[reason] for reason in ("shared", "conflicting", "no_token"))
    assert counted == lost


def pieces_as_trl_1_13(row: dict, tokenizer, separator: str) -> tuple[list[int], list[int], list[float]]:
    """Ids (without special tokens), labelled positions and labels when each piece is tokenized by itself."""
    bare = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids, positions = bare(row["prompt"]), []
    for step in row["completions"]:
        ids = ids + bare(step) + bare(separator)
        positions.append(len(ids) - 1)
    return ids, positions, [float(label) for label in row["labels"]]


@pytest.mark.parametrize("kind", FIVE_KINDS)
def test_labels_are_where_trl_1_13_had_them(kind):
    tokenizer = tiny_tokenizer(kind)
    rng = random.Random(0)
    steps = ["Add 3 and 4", "So 7 * 2 = 14", "the answer is 14", "hello there", "Über 日本語"]
    rows = [
        stepwise(rng.choices(steps, k=4), rng.choices([True, False], k=4), "Question: how many") for _ in range(20)
    ]
    prepared, report = prepare(rows, "stepwise", tokenizer)
    same = 0
    for row, new in zip(rows, prepared, strict=True):
        ids, positions, values = pieces_as_trl_1_13(row, tokenizer, "\n")
        opening = int(new["span_input_ids"][0] == tokenizer.bos_token_id)
        assert new["label_values"] == values and new["label_steps"] == [0, 1, 2, 3]
        if new["span_input_ids"][opening:-1] == ids:
            same += 1
            assert new["label_positions"] == [position + opening for position in positions]
    assert report.counts["unlike_pieces"] == 20 - same
    assert same == (0 if kind == "mistral" else 20)  # each piece gets a space of its own in SentencePiece


def test_collisions_by_hand():
    # "." and newlines are one token each way in this tokenizer: "\n\n" after an empty step holds two separators.
    rows = [
        stepwise(["ab", "", "cd"], [True, True, False]),
        stepwise(["ab", "", "cd"], [True, False, False]),
        stepwise(["ab", "", "cd"], [True, None, False]),
        stepwise(["ab", "\ncd"], [False, True]),
    ]
    prepared, report = prepare(rows, "stepwise")
    assert [row["label_values"] for row in prepared] == [[1.0, 0.0], [0.0], [1.0, 0.0], [0.0, 1.0]]
    assert [row["label_steps"] for row in prepared] == [[0, 2], [2], [0, 2], [0, 1]]
    assert labelled_text(prepared[0]) == ["\n\n", "\n"]
    assert nonzero(report) == {
        "unannotated": 1,
        "empty_steps": 3,
        "shared": 1,
        "conflicting": 2,
        "straddling": 4,
        "unlike_pieces": 4,
    }


@pytest.mark.parametrize(
    ("labels", "num_labels", "values"),
    [
        ([True, False, None], 2, [1.0, 0.0]),
        ([1, 0, None], 1, [1.0, 0.0]),
        ([0.25, 1.0, 0.0], 2, [0.25, 1.0, 0.0]),
        ([-1, 0, 1], 3, [-1.0, 0.0, 1.0]),
        ([-1.0, None, 1.0], 3, [-1.0, 1.0]),
    ],
    ids=["bool", "int", "float", "three classes", "three classes as floats"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_of_every_type_survive_map_and_collate(labels, num_labels, values, streamed):
    rows = [stepwise(["a b", "c d", "e f"], labels)] * 2
    prepared, report = prepare(stream_of(rows) if streamed else rows, "stepwise", num_labels=num_labels)
    batch = SpanCollator(pad_token_id=0)(list(prepared))
    assert batch["token_labels"].dtype == torch.float32
    for number in range(2):
        mask = batch["label_mask"][number, :, 0]
        assert batch["token_labels"][number, mask, 0].tolist() == values
        assert batch["token_labels"][number, ~mask, 0].abs().sum() == 0
        kept = [step for step, label in enumerate(labels) if label is not None]
        assert batch["label_steps"][number, mask, 0].tolist() == kept
        assert batch["label_steps"][number, ~mask, 0].unique().tolist() == [-1]
    assert report.counts["unannotated"] == 2 * labels.count(None)


def test_last_step_only_and_masking_after_the_first_error():
    row = stepwise(["a", "b", "c", "d"], [True, False, True, False])
    prepared, report = prepare([row], "stepwise", train_on_last_step_only=True)
    assert (prepared[0]["label_values"], prepared[0]["label_steps"]) == ([0.0], [3])
    prepared, report = prepare([row], "stepwise", mask_after_first_error=True)
    assert (prepared[0]["label_values"], prepared[0]["label_steps"]) == ([1.0, 0.0], [0, 1])
    assert nonzero(report) == {"after_error": 2, "unlike_pieces": 1}
    three = stepwise(["a", "b", "c", "d"], [1, 0, -1, 1])
    prepared, report = prepare([three], "stepwise", mask_after_first_error=True, num_labels=3)
    assert prepared[0]["label_values"] == [1.0, 0.0, -1.0]


def test_helpers():
    assert mask_after_first_error([1, None, 0.4, 1]) == [1, None, 0.4, None]
    assert mask_after_first_error([0, -1, 0], wrong_below=0.0) == [0, -1, None]
    assert mask_after_first_error([None, True]) == [None, True] and mask_after_first_error([]) == []
    assert prefix_score_differences([0.5, 0.75, 0.25], initial=0.25) == [0.25, 0.25, -0.5]
    assert prefix_score_differences([1.0, None, 3.0, 4.0]) == [1.0, None, None, 1.0]
    assert prefix_score_differences([]) == []
    scores = [0.5, -2.0, 4.0, 4.0]
    assert sum(prefix_score_differences(scores, initial=1.0)) == scores[-1] - 1.0


# -- segment rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_segments_of_several_categories_at_several_grains(kind):
    tokenizer = tiny_tokenizer(kind)
    text = "Über 日本語🙂 hello. The answer is 56, and the city."
    first, comma = text.index(".") + 1, text.index(",") + 1
    row = segmented(
        text,
        (comma, len(text), -1.5, "fact"),  # unsorted
        (0, len(text), 0.5, "whole"),
        (0, first, True, "style"),
        (first, comma, 2.0, "fact"),
        (first, len(text), False, "style"),
        (0, first, None, "fact"),
    )
    for segment in row["segments"]:
        segment["score"] = segment.pop("label")
        segment["score"] = None if segment["score"] is None else float(segment["score"])
    prepared, report = prepare([row], "segment", tokenizer, categories=["style", "fact", "whole"])
    new = prepared[0]
    found = {
        (step, category): (position, value)
        for position, value, category, step in zip(*(new[name] for name in NEW[1:5]), strict=True)
    }
    assert {key: value for key, (_, value) in found.items()} == {
        (2, 0): 1.0,
        (4, 0): 0.0,
        (3, 1): 2.0,
        (0, 1): -1.5,
        (1, 2): 0.5,
    }
    assert report.counts["unannotated"] == 1
    for (step, _), (position, _) in found.items():
        segment = row["segments"][step]
        head = tokenizer.decode(new["span_input_ids"][: position + 1], skip_special_tokens=True)
        shorter = tokenizer.decode(new["span_input_ids"][:position], skip_special_tokens=True)
        if kind != "bert":
            wanted = "Well?" + text[: segment["end"]]
            assert head.startswith(wanted) and not shorter.startswith(wanted)
        else:
            assert head.endswith((".", ",")) and not shorter.endswith((".", ","))
    batch = SpanCollator(0, num_categories=3)([new])
    assert batch["token_labels"].shape == (1, len(new["span_input_ids"]), 3)
    assert batch["label_mask"].sum(dim=(0, 1)).tolist() == [2, 2, 1]
    assert new["label_positions"] == sorted(new["label_positions"])


def test_placements_by_hand():
    row = segmented(" hello there.\nThe answer", (0, 12, 1), (14, 24, 0))
    last, _ = prepare([row], "segment")
    assert labelled_text(last[0]) == [" there", " answer"]
    all_of, _ = prepare([row], "segment", label_placement="all")
    assert "".join(labelled_text(all_of[0])) == " hello thereThe answer"
    before, _ = prepare([row], "segment", label_placement="before")
    assert before[0]["label_positions"][0] == all_of[0]["completion_start"] - 1
    assert labelled_text(before[0])[1].endswith("\n")
    nothing_before, report = prepare(
        [segmented("hello there", (0, 5, 1), (6, 11, 0), prompt="")],
        "segment",
        tiny_tokenizer("gpt2"),
        label_placement="before",
    )
    assert nothing_before[0]["label_values"] == [0.0]
    assert nonzero(report) == {"no_prompt": 1, "no_token": 1}


def test_segments_that_meet_inside_a_token():
    assert TOKENIZER.tokenize(" answer") == ["Ġanswer"]
    rows = [
        segmented(" answer", (0, 3, 1), (3, 7, 1)),
        segmented(" answer", (0, 3, 1), (3, 7, 0)),
        segmented(" answer", (0, 3, 1, "a"), (3, 7, 0, "b")),
    ]
    for segment in [s for row in rows[:2] for s in row["segments"]]:
        segment["category"] = "a"
    prepared, report = prepare(rows, "segment", categories=["a", "b"])
    assert prepared["row_index"][:] == [0, 2]  # nothing true is left of the second
    assert [row["label_values"] for row in prepared] == [[1.0], [1.0, 0.0]]
    assert nonzero(report) == {"unlabelled_rows": 1, "shared": 1, "conflicting": 2, "straddling": 3}


def test_rows_without_segments_are_kept_and_segments_without_offsets_skipped():
    rows = [
        segmented(" ok", (0, 3, 1.0)),
        segmented(" ok"),
        segmented(" ok", (None, None, 1.0)),
        segmented(" ok", (None, None, 1.0), (0, 3, 0.0)),
        segmented(" ok", (0, 3, None)),
        {**segmented(" ok"), "segments": None},
    ]
    prepared, report = prepare(rows, "segment")
    assert prepared["row_index"][:] == [0, 1, 3, 5]
    assert [row["label_values"] for row in prepared] == [[1.0], [], [0.0], []]
    assert prepared[2]["label_steps"] == [1]
    assert nonzero(report) == {"unlabelled_rows": 2, "no_segments": 2, "no_offsets": 2, "unannotated": 1}
    batch = SpanCollator(0)(list(prepared))
    assert batch["label_mask"].sum(dim=(1, 2)).tolist() == [1, 0, 1, 0]


def test_find_categories():
    rows = [segmented("ab", (0, 1, 1, "b"), (1, 2, 1, "a")), segmented("ab"), {"segments": None}]
    assert find_categories(rows) == ["a", "b"]
    assert find_categories([segmented("ab", (0, 1, 1))]) == []
