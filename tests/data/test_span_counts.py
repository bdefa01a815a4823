"""prepare_spans: rows that are dropped or cut, the counts, streams, caches and workers."""

import json
import logging

import pytest
from datasets import load_dataset

from tests.data.span_helpers import nonzero, outcome, prepare, segmented, stepwise, stream_of
from tests.tiny import tiny_tokenizer
from trl_ext.data import spans
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.data.validation import DataError


def test_over_long_rows_are_dropped():
    rows = [stepwise(), stepwise(["one two three four five six seven"] * 3, [True] * 3), stepwise()]
    length = len(prepare(rows, "stepwise")[0][0]["span_input_ids"])
    prepared, report = prepare(rows, "stepwise", max_length=length)
    assert prepared["row_index"][:] == [0, 2]
    assert nonzero(report) == {"over_long_rows": 1, "unlike_pieces": 2}
    assert f"1 dropped: longer than max_length={length}" in report.summary()
    with pytest.raises(DataError, match=r"2 of 3 rows kept; 1 dropped.*at least 80%"):
        prepare(rows, "stepwise", max_length=length, min_survival=0.8)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_completions_cut_as_in_trl_1_13(kind):
    tokenizer = tiny_tokenizer(kind)
    row = stepwise(["3 + 4 = 7.", "7 * 2 = 14.", "The answer is 14."], [True, True, False])
    whole = prepare([row], "stepwise", tokenizer)[0][0]
    start, second = whole["completion_start"], whole["label_positions"][1]
    prepared, report = prepare([row], "stepwise", tokenizer, max_completion_length=second - start + 2)
    cut = prepared[0]
    closing = [tokenizer.sep_token_id] if kind == "bert" else []
    assert cut["span_input_ids"] == whole["span_input_ids"][: second + 2] + closing
    assert cut["label_positions"] == whole["label_positions"][:2] and cut["completion_start"] == start
    assert report.counts["cut_rows"] == report.counts["cut_labels"] == 1
    same, report = prepare([row], "stepwise", tokenizer, max_completion_length=1000)
    assert same[0] == whole and report.counts["cut_rows"] == 0
    answer, _ = prepare([outcome()], "outcome", tokenizer, max_completion_length=2)
    assert answer[0]["label_positions"][-1] == len(answer[0]["span_input_ids"]) - 1


def test_a_label_before_a_segment_that_was_cut_off_goes_with_it():
    row = segmented("apples are left when eaten", (0, 6, 1.0), (7, 10, 0.0), (11, 15, 1.0))
    tokenizer = tiny_tokenizer("bert")  # here a token a word
    for length, kept in ((1, 1), (2, 2), (3, 3)):
        prepared, report = prepare([row], "segment", tokenizer, label_placement="before", max_completion_length=length)
        assert prepared[0]["label_steps"] == list(range(kept))
        assert report.counts["cut_labels"] == 3 - kept


def mixed_rows() -> list[dict]:
    return [
        stepwise(),
        stepwise(["one two three four five six seven"] * 9, [True] * 9),  # too long
        stepwise(labels=(None, None)),  # no label
        stepwise(["ab", "", "cd"], [True, True, False], prompt=""),
        stepwise(labels=(True, None)),
    ]


def check_mixed(prepared, report):
    rows = list(prepared)
    assert [row["row_index"] for row in rows] == [0, 3, 4]
    assert nonzero(report) == {
        "over_long_rows": 1,
        "unlabelled_rows": 1,
        "no_prompt": 1,
        "unannotated": 3,
        "empty_steps": 1,
        "shared": 1,
        "straddling": 1,
        "unlike_pieces": 4,
    }
    assert (report.rows, report.kept, report.dropped) == (5, 3, 2)
    assert "row_counts" not in rows[0]


def test_counts_at_once_in_a_stream_and_with_workers(caplog):
    limit = 60
    check_mixed(*prepare(mixed_rows(), "stepwise", max_length=limit))
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    check_mixed(*prepare(mixed_rows(), "stepwise", max_length=limit, num_proc=2))
    streamed, report = prepare(stream_of(mixed_rows()), "stepwise", max_length=limit)
    assert report.rows == 0
    check_mixed(list(streamed), report)
    check_mixed(list(streamed), report)  # a second pass is not counted again
    assert list(streamed) == list(prepare(mixed_rows(), "stepwise", max_length=limit)[0])


def test_counts_that_need_no_warning_give_none(caplog):
    rows = [stepwise(["3 + 4 = 7.", "7 * 2 = 14."], [True, None])]
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        _, report = prepare(rows, "stepwise")
        list(prepare(stream_of(rows), "stepwise")[0])
    assert nonzero(report) == {"unannotated": 1, "unlike_pieces": 1}
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.INFO, report.summary())]


def test_preparing_twice_changes_nothing():
    once, _ = prepare([stepwise()] * 2, "stepwise")
    twice, report = prepare(once, "stepwise")
    assert twice is once and (report.rows, report.kept) == (2, 2)
    streamed, _ = prepare(stream_of([stepwise()] * 2), "stepwise")
    assert list(prepare(streamed, "stepwise")[0]) == list(once)


def test_cache_is_read_and_keyed_by_every_argument(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows()))

    def load():
        return load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    check_mixed(*prepare(load(), "stepwise", max_length=60))

    def never(*args, **kwargs):
        raise AssertionError("the cache was not read")

    monkeypatch.setattr(spans, "encode_batch_with_offsets", never)
    check_mixed(*prepare(load(), "stepwise", max_length=60))
    for change in (
        dict(max_length=61),
        dict(label_placement="all"),
        dict(step_separator="\n\n"),
        dict(num_labels=1),
        dict(max_completion_length=9),
        dict(train_on_last_step_only=True),
        dict(mask_after_first_error=True),
        dict(tokenization=TokenizationSettings(append_eos=False)),
    ):
        with pytest.raises(AssertionError, match="cache was not read"):
            prepare(load(), "stepwise", **{"max_length": 60, **change})
