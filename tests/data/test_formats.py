"""prepare_groups: every row format, streams, caches, workers, and the counts."""

import json
import logging

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from tests.tiny import pair_rows, ranked_rows, tiny_tokenizer
from trl_ext.data import formats
from trl_ext.data.collators import GroupCollator
from trl_ext.data.formats import prepare_groups
from trl_ext.data.report import STREAM_ROWS_BEFORE_JUDGING
from trl_ext.data.tokenization import TokenizationSettings, encode
from trl_ext.data.validation import DataError


TOKENIZER = tiny_tokenizer("llama")
SETTINGS = TokenizationSettings.for_training(TOKENIZER)


def prepare(rows, **kwargs):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_groups(dataset, TOKENIZER, **{"tokenization": SETTINGS, "max_length": None, **kwargs})


def stream_of(rows: list[dict]) -> IterableDataset:
    def generate():
        yield from rows

    return IterableDataset.from_generator(generate)


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_pairs(chat):
    rows = pair_rows(6, chat=chat)
    prepared, report = prepare(rows)
    assert prepared.column_names == [
        "prompt",
        "chosen",
        "rejected",
        "candidate_ids",
        "candidate_ratings",
        "row_index",
    ]
    for index, (row, new) in enumerate(zip(rows, prepared, strict=True)):
        expected = [encode(TOKENIZER, row["prompt"], row[name], SETTINGS).ids for name in ("chosen", "rejected")]
        assert new["candidate_ids"] == expected
        assert new["candidate_ratings"] == [1.0, 0.0]
        assert new["row_index"] == index
        assert {name: new[name] for name in row} == row
    assert (report.rows, report.kept, report.dropped) == (6, 6, 0)


def test_pairs_with_margin_target_and_ratings():
    rows = pair_rows(3)
    for i, row in enumerate(rows):
        row |= {"margin": i, "preference_probability": 0.5 + i / 10, "chosen_rating": 5, "rejected_rating": 5 - i}
    prepared, report = prepare(rows)
    assert prepared["group_margin"][:] == [0.0, 1.0, 2.0]
    assert prepared["group_target"][:] == [0.5, 0.6, 0.7]
    assert prepared["candidate_ratings"][:] == [[5.0, 5.0], [5.0, 4.0], [5.0, 3.0]]
    assert report.counts["tied"] == 1
    batch = GroupCollator(0)(list(prepared))
    assert batch["margin"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("ranks", [False, True], ids=["ratings", "ranks"])
def test_ranked(chat, ranks):
    rows = ranked_rows(8, k=4, ragged=True, ranks=ranks, chat=chat)
    prepared, _ = prepare(rows)
    assert len({len(row["completions"]) for row in rows}) > 1
    for row, new in zip(rows, prepared, strict=True):
        expected = [encode(TOKENIZER, row["prompt"], completion, SETTINGS).ids for completion in row["completions"]]
        assert new["candidate_ids"] == expected
        wanted = [-rank for rank in row["ranks"]] if ranks else row["ratings"]
        assert new["candidate_ratings"] == wanted
        assert {name: new[name] for name in row} == row


@pytest.mark.parametrize(
    ("ranks", "ratings"),
    [([0, 1, 2], [0, -1, -2]), ([1, 1, 3], [-1, -1, -3]), ([9, 4, 0], [-9, -4, 0]), ([1.0, 2.0, 3.0], [-1, -2, -3])],
    ids=["0-based", "ties and 1-based", "gaps", "whole floats"],
)
def test_ranks_become_negative_ratings(ranks, ratings):
    prepared, _ = prepare([{"prompt": "a", "completions": ["b", "c", "d"], "ranks": ranks}])
    assert prepared[0]["candidate_ratings"] == ratings
    assert str(prepared[0]["candidate_ratings"][ratings.index(max(ratings))]) != "-0.0"


@pytest.mark.parametrize("ratings", [[True, False], [3, -2], [0.25, 1e6]], ids=["bool", "int", "float"])
def test_ratings_of_every_number_type_survive(ratings):
    prepared, _ = prepare([{"prompt": "a", "completions": ["b", "c"], "ratings": ratings}])
    assert prepared[0]["candidate_ratings"] == [float(rating) for rating in ratings]
    assert prepared[0]["ratings"] == ratings
    assert torch.equal(GroupCollator(0)([prepared[0]])["ratings"], torch.tensor([[float(r) for r in ratings]]))


def test_ratings_win_over_agreeing_ranks():
    prepared, _ = prepare(
        [{"prompt": "a", "completions": ["b", "c", "d"], "ratings": [1.5, 4, 4], "ranks": [2, 0, 1]}]
    )
    assert prepared[0]["candidate_ratings"] == [1.5, 4.0, 4.0]


def test_string_and_single_message_completions_after_a_chat_prompt():
    prompt = [{"role": "user", "content": "hello"}]
    strings, _ = prepare([{"prompt": prompt, "completions": ["fine", "bad"], "ranks": [0, 1]}])
    message = [{"role": "assistant", "content": "fine"}, {"role": "assistant", "content": "bad"}]
    messages, _ = prepare([{"prompt": prompt, "completions": message, "ranks": [0, 1]}])
    lists, _ = prepare([{"prompt": prompt, "completions": [[m] for m in message], "ranks": [0, 1]}])
    assert strings[0]["candidate_ids"] == messages[0]["candidate_ids"] == lists[0]["candidate_ids"]


def test_text_prompt_repeated_inside_chat_completions_is_not_added_again():
    chosen, rejected = ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": c}] for c in "ab")
    twice, _ = prepare([{"prompt": "hi", "chosen": chosen, "rejected": rejected}])
    once, _ = prepare([{"chosen": chosen, "rejected": rejected}])
    assert twice[0]["candidate_ids"] == once[0]["candidate_ids"]


@pytest.mark.parametrize(("chat", "empty"), [(False, None), (False, ""), (True, None), (True, [])])
def test_empty_prompt_is_an_implicit_one_and_counted(chat, empty):
    rows = pair_rows(2, chat=chat)
    for row in rows[1:]:
        row["chosen"], row["rejected"] = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        row["prompt"] = empty
    prepared, report = prepare(rows)
    plain, _ = prepare(pair_rows(2, chat=chat))
    assert prepared["candidate_ids"][:] == plain["candidate_ids"][:]
    assert report.counts["no_prompt"] == 1


@pytest.mark.parametrize("names", [("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")])
def test_tokenized_pairs_are_taken_as_they_are(names):
    rows = [{names[0]: [1, 2, 3], names[1]: [1, 4]}, {names[0]: [5, 6], names[1]: [5, 5, 5, 5]}]
    prepared, report = prepare(rows, max_length=3)
    assert prepared["candidate_ids"][:] == [[[1, 2, 3], [1, 4]]]
    assert report.counts["over_long_rows"] == 1
    assert prepared[0][names[0]] == [1, 2, 3]


def test_tokenized_rankings_are_taken_as_they_are():
    rows = [{"candidate_ids": [[1, 2, 3], [1, 4], [9] * 9], "ratings": [1, 2, 3]}]
    prepared, report = prepare(rows, max_length=3)
    assert prepared[0]["candidate_ids"] == [[1, 2, 3], [1, 4]]
    assert prepared[0]["candidate_ratings"] == [1.0, 2.0]
    assert report.counts["over_long_candidates"] == 1


def test_preparing_twice_changes_nothing():
    once, _ = prepare(ranked_rows(3))
    twice, report = prepare(once)
    assert twice is once
    assert (report.rows, report.kept) == (3, 3)
    streamed, _ = prepare(stream_of(ranked_rows(3)))
    again, _ = prepare(streamed)
    assert list(again) == list(once)


def test_original_columns_keep_their_values_and_types():
    rows = pair_rows(2)
    for row in rows:
        row |= {"clean": True, "marks": [-100, 1, 0], "weights": [0.5, None]}
    source = Dataset.from_list(rows)
    prepared, _ = prepare(source)
    for name, feature in source.features.items():
        assert prepared.features[name] == feature
        assert prepared[name][:] == source[name][:]


def test_a_format_set_on_the_data_set_does_not_matter():
    prepared, _ = prepare(Dataset.from_list(ranked_rows(3)).with_format("numpy"))
    plain, _ = prepare(ranked_rows(3))
    assert list(prepared) == list(plain)


def test_losses_on_distances_refuse_ranks():
    with pytest.raises(DataError, match="column 'ranks'.*only give their order"):
        prepare(ranked_rows(2, ranks=True), loss_needs_ratings=True)
    prepare(ranked_rows(2), loss_needs_ratings=True)


# -- counts ----------------------------------------------------------------------------------------------------------


def mixed_rows() -> list[dict]:
    """Rows with every countable property, for max_length=12."""
    short, other, long = "a b", "c d", "one two three four five six seven eight nine ten"
    return [
        {"prompt": "x", "completions": [short, other], "ratings": [1.0, 0.0]},
        {"prompt": "x", "completions": [short, long], "ratings": [1.0, 0.0]},  # dropped
        {"prompt": "x", "completions": [short, long, other], "ratings": [1.0, 3.0, 1.0]},  # one left out, tied
        {"prompt": "x", "completions": [short, short], "ratings": [2.0, 0.0]},  # identical
        {"prompt": "", "completions": [short, other, long], "ratings": [2.0, 0.0, 1.0]},  # no prompt, one left out
        {"prompt": "x", "completions": [long, long, other], "ratings": [2.0, 0.0, 1.0]},  # dropped
        {"prompt": "x", "completions": [short, other], "ratings": [4.0, 4.0]},  # tied
    ]


EXPECTED = {
    "over_long_rows": 2,
    "over_long_candidates": 2,
    "tied": 2,
    "identical": 1,
    "no_prompt": 1,
    "unseen": 0,
    "unknown": 0,
    "unseen_prompt": 0,
}


def check_mixed(prepared, report):
    assert [row["row_index"] for row in prepared] == [0, 2, 3, 4, 6]
    assert report.counts == EXPECTED
    assert (report.rows, report.kept, report.dropped) == (7, 5, 2)
    assert "row_counts" not in next(iter(prepared))


def test_counts_by_reason():
    prepared, report = prepare(mixed_rows(), max_length=12)
    check_mixed(prepared, report)
    assert prepared[1]["candidate_ratings"] == [1.0, 1.0]
    assert len(prepared[1]["candidate_ids"]) == 2


def test_ratings_that_are_equal_in_fp32_are_counted_as_tied():
    ratings = [(0.1 + 0.2 + 0.3) / 3, 0.2]
    assert ratings[0] != ratings[1]
    prepared, report = prepare([{"prompt": "a", "completions": ["b", "c"], "ratings": ratings}])
    assert GroupCollator(0)(list(prepared))["ratings"].unique().numel() == report.counts["tied"] == 1


def test_summary_is_one_line_and_metrics_are_numbers():
    _, report = prepare(mixed_rows(), max_length=12)
    assert report.summary() == (
        "train data: 5 of 7 rows kept; 2 dropped: longer than max_length=12 (fewer than 2 candidates fit); "
        "2 single candidates longer than max_length=12 left out of larger groups; 2 fully tied (no gradient); "
        "1 with candidates of identical tokens; 1 with an empty prompt"
    )
    assert report.as_metrics() == {
        "data/train/rows": 7,
        "data/train/kept": 5,
        "data/train/dropped": 2,
        **{f"data/train/{reason}": count for reason, count in EXPECTED.items()},
    }


def test_counts_are_shown_once(caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        _, report = prepare(mixed_rows(), max_length=12, dataset_name="eval")
        report.show()
    assert [record.getMessage() for record in caplog.records] == [report.summary()]
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        prepare(pair_rows(2))
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "train data: 2 of 2 rows kept")
    ]


def test_counts_are_shown_on_the_main_process_only(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare(mixed_rows(), max_length=12)
    assert not caplog.records


def test_counts_with_worker_processes():
    prepared, report = prepare(mixed_rows(), max_length=12, num_proc=2)
    check_mixed(prepared, report)


def test_counts_are_right_when_the_cache_is_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows()))

    def load():
        return load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    check_mixed(*prepare(load(), max_length=12))

    def never(*args, **kwargs):
        raise AssertionError("the cache was not read")

    monkeypatch.setattr(formats, "encode_batch", never)
    check_mixed(*prepare(load(), max_length=12))
    # Anything that changes the ids is part of the cache's key.
    with pytest.raises(AssertionError, match="cache was not read"):
        prepare(load(), max_length=13)
    with pytest.raises(AssertionError, match="cache was not read"):
        prepare(load(), max_length=12, tokenization=TokenizationSettings(append_eos=False))
    with pytest.raises(AssertionError, match="cache was not read"):
        prepare_groups(load(), tiny_tokenizer("qwen"), tokenization=SETTINGS, max_length=12)


def test_nothing_is_dropped_at_exactly_max_length():
    prepared, _ = prepare(pair_rows(5))
    longest = max(len(ids) for row in prepared["candidate_ids"] for ids in row)
    assert prepare(pair_rows(5), max_length=longest)[1].dropped == 0
    assert prepare(pair_rows(5), max_length=longest - 1)[1].dropped >= 1


def test_too_few_survivors_stop_with_the_counts():
    rows = [row for row in mixed_rows() if len(row["completions"]) == 2]  # 4 rows, 1 dropped
    prepare(rows, max_length=12, min_survival=0.75)
    with pytest.raises(DataError, match=r"3 of 4 rows kept; 1 dropped.*at least 80%.*max_length"):
        prepare(rows, max_length=12, min_survival=0.8)
    with pytest.raises(DataError, match="0 of 4 rows kept"):
        prepare(rows, max_length=1, min_survival=0.0)


# -- streams ---------------------------------------------------------------------------------------------------------


def test_stream_equals_data_set_and_fills_the_report_once():
    prepared, report = prepare(stream_of(mixed_rows()), max_length=12)
    assert report.rows == 0
    streamed = list(prepared)
    check_mixed(streamed, report)
    assert "so far" in report.summary()
    at_once, _ = prepare(mixed_rows(), max_length=12)
    assert streamed == list(at_once)
    check_mixed(list(prepared), report)  # a second pass is not counted again


def test_stream_of_a_jsonl_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows()))
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True)
    assert isinstance(stream, IterableDataset)
    prepared, report = prepare(stream, max_length=12)
    check_mixed(list(prepared), report)


def test_rows_of_a_stream_need_not_have_the_same_columns():
    plain, given = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"margin": 1.0}
    other, _ = prepare(stream_of([{"chosen": "ab", "rejected": "ac"}, {**plain, "tools": None, "more": 1}]))
    assert [row["candidate_ids"] for row in other] == [prepare([plain])[0]["candidate_ids"][0]] * 2
    for rows, message in (
        ([plain, {**plain, **given}], "row 1, column 'margin': found a column that the first row does not have"),
        ([{**plain, **given}, plain], "row 1, column 'margin': found None; needed a finite number"),
        ([plain, plain, {"prompt": "a", "chosen": "b"}], "row 2, column 'rejected': found None"),
    ):
        with pytest.raises(DataError, match=message):
            list(prepare(stream_of(rows))[0])


def test_stream_survives_shuffling_and_a_data_loader():
    prepared, report = prepare(stream_of(mixed_rows()), max_length=12)
    loader = torch.utils.data.DataLoader(
        prepared.shuffle(seed=0, buffer_size=3), batch_size=2, collate_fn=GroupCollator(0)
    )
    indices = torch.cat([batch["row_index"] for batch in loader]).tolist()
    assert sorted(indices) == [0, 2, 3, 4, 6]
    assert report.counts == EXPECTED


def test_stream_tells_the_first_row_of_each_reason_once(caplog):
    prepared, _ = prepare(stream_of(mixed_rows()), max_length=12)
    list(prepared)
    list(prepared)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == sum(count > 0 for count in EXPECTED.values())
    assert messages[0].startswith("train data, row 1 is the first row counted as over_long_rows: dropped: longer than")


def test_stream_with_too_few_survivors_stops():
    rows = [mixed_rows()[1]] * STREAM_ROWS_BEFORE_JUDGING
    prepared, report = prepare(stream_of(rows), max_length=12)
    with pytest.raises(DataError, match=f"0 of {STREAM_ROWS_BEFORE_JUDGING} rows kept"):
        list(prepared)
    short, report = prepare(stream_of(rows[:3]), max_length=12)
    assert list(short) == []
    with pytest.raises(DataError, match="0 of 3 rows kept"):
        report.check_survival(0.5)


def test_map_style_data_set_as_a_stream_with_known_features():
    stream = Dataset.from_list(mixed_rows()).to_iterable_dataset(num_shards=2)
    prepared, report = prepare(stream, max_length=12)
    assert len(list(prepared)) == 5
    assert report.counts == EXPECTED


def test_caching_can_be_switched_off():
    datasets.disable_caching()
    try:
        check_mixed(*prepare(mixed_rows(), max_length=12))
    finally:
        datasets.enable_caching()
