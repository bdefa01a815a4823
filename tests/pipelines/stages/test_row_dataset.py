"""Rows of a file as a data set: the values are those of the file, whatever they look like and wherever they begin."""

import json

import pytest

from trl_ext.pipelines.stages import row_dataset
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows


def written(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = [{"role": "user", "content": "hi"}]
COLUMNS = {
    "date": ["2020-01-01", "2020-01-01 10:00:00", "2020-01-01T10:00:00Z", None],
    "late": [None, None, None, "text"],
    "score": [1, None, 2.5, 3.0],
    "scores": [{"a": None, "b": 1.0}, {"a": None, "b": 2.0}, {"a": 0.5, "b": None}, {"a": None, "b": 0.0}],
    "list": [[], [], ["x"], None],
    "chat": [CHAT, CHAT, CHAT, [*CHAT, {"role": "assistant", "content": "two\u2028lines"}]],
    "keys": [{"a": 1}, {"a": 2}, {"b": "x"}, None],
    "mixed": [1, "1", None, [1]],
    "messages_with_tools": [CHAT, CHAT, [{"role": "tool", "name": "f", "content": "1"}], CHAT],
    "unsigned": [-1, 2**63 + 5, 2**64 - 1, 0],
    "flag": [True, False, None, True],
}


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_values_come_back_as_they_are(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(row_dataset, "CHUNK_ROWS", chunk)
    rows = [{name: values[place] for name, values in COLUMNS.items()} for place in range(4)]
    found = dataset_of_rows(written(tmp_path, rows))
    assert found.to_list() == rows
    types = {name: str(found.features[name]) for name in ("date", "late", "score", "keys")}
    assert types == {
        "date": "Value('string')",
        "late": "Value('string')",
        "score": "Value('float64')",
        "keys": "Json(decode=True)",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.arrow", "rows.jsonl"]


def test_a_column_may_be_missing_in_some_rows_and_a_changed_file_is_read_again(tmp_path):
    assert dataset_of_rows(written(tmp_path, [{"a": 1}, {"b": "x"}])).to_list() == [
        {"a": 1, "b": None},
        {"a": None, "b": "x"},
    ]
    assert dataset_of_rows(written(tmp_path, [{"a": 2}])).to_list() == [{"a": 2}]


def test_a_data_set_goes_on_as_any_other(tmp_path):
    found = dataset_of_rows(written(tmp_path, [{"prompt": "p", "keys": {"a": 1}}, {"prompt": "q", "keys": {"b": 2}}]))
    mapped = found.map(lambda row: {"prompt": row["prompt"] + "!"}).select([1])
    assert mapped.to_list() == [{"prompt": "q!", "keys": {"b": 2}}]


@pytest.mark.parametrize("chunk", [1, 1000])
def test_values_that_arrow_does_not_know_are_no_error(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(row_dataset, "CHUNK_ROWS", chunk)
    columns = {"large": [1, 2**70, [-(2**70)]], "half": ["a", "\ud83d", "b"], "deep": [{"a": 1}, {"a": 2**70}, None]}
    rows = [{name: values[place] for name, values in columns.items()} for place in range(3)]
    found = dataset_of_rows(written(tmp_path, rows)).to_list()
    assert [row["half"] for row in found] == ["a", "", "b"]
    assert found[0] == rows[0] and found[1]["large"] == str(2**70)
