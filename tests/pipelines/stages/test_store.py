"""The store: a shard is there whole or not at all, and a damaged, foreign or unwritable one is said."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.records import Sample, prompt_id
from trl_ext.pipelines.rejection_sampling.prompts import prompts_digest, write_prompts
from trl_ext.pipelines.stages.store import (
    DamagedError,
    ShardStore,
    StoreError,
    count_lines,
    key_of,
    read_lines,
    staging_of,
    write_lines,
)


ROWS = [{"text": "naïve ✓ \ud800", "n": 1}, {"text": 'line\nbreak "quoted"', "n": 2.5}, {"text": "", "n": None}]


def store(root: Path, sizes=(2, 1), **manifest) -> ShardStore:
    made = ShardStore(root, {"temperature": 1.0, "model": {"content": "abc"}} | manifest, list(sizes))
    made.create()
    return made


def test_what_is_written_is_read_and_plain_tools_read_it_too(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert write_lines(path, ROWS) == 3
    back = [{name: value for name, value in row.items() if name != "crc"} for row in read_lines(path)]
    assert back == ROWS
    assert count_lines(path) == 3
    plain = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["n"] for row in plain] == [1, 2.5, None]
    assert [item.name for item in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_lines(tmp_path / "rows.jsonl", [{"n": math.nan}])
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_truncated_file_is_damaged(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DamagedError, match="line 3: truncated or changed"):
        count_lines(path)


def test_every_changed_byte_is_seen(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS[:1])
    good = path.read_bytes()
    for place in [*range(9, 17), *range(20, len(good))]:  # all but the name of the checksum, which is not read
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DamagedError):
            count_lines(path)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)

    def rows():
        yield ROWS[0]
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_lines(path, rows())
    assert count_lines(path) == 3


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_finished(tmp_path):
    made = store(tmp_path)
    made.write(0, ROWS[:2])
    os.symlink("/dev/full", staging_of(made.path(1)))  # the kernel says ENOSPC
    with pytest.raises(StoreError, match=r"shard-000001.*No space left on device.*finished before is kept"):
        made.write(1, ROWS[2:])
    assert made.missing() == [1]


def test_missing_damaged_and_short_shards_are_made_again(tmp_path, caplog):
    made = store(tmp_path, sizes=(2, 1, 2))
    for shard, rows in ((0, ROWS[:2]), (1, ROWS[2:]), (2, ROWS[:2])):
        made.write(shard, rows)
    assert made.missing() == []
    assert list(made.read(0, [1])) == ROWS[1:2]
    made.path(0).unlink()
    made.path(1).write_bytes(made.path(1).read_bytes()[:-3])
    write_lines(made.path(2), ROWS[:1])
    again = ShardStore.at(made.folder, [2, 1, 2])
    assert again.missing() == [0, 1, 2]
    said = caplog.text
    assert "shard-000001.jsonl, line 1: truncated" in said and "holds 1 records; needed: 2" in said
    for shard in range(3):
        with pytest.raises(StoreError):
            list(again.read(shard))
    with pytest.raises(StoreError, match="got 1 records; needed: 2"):
        again.write(0, ROWS[:1])
    assert not again.path(0).exists()


def test_another_configuration_gets_its_own_folder_and_one_message(tmp_path, caplog):
    first = store(tmp_path)
    first.write(0, ROWS[:2])
    second = store(tmp_path, temperature=0.7)
    assert second.folder != first.folder and second.missing() == [0, 1] and first.missing() == [1]
    (message,) = [record.message for record in caplog.records]
    assert "temperature=1.0, now 0.7" in message and first.folder.name in message
    store(tmp_path, temperature=0.7)
    assert len(caplog.records) == 1


def test_a_manifest_that_does_not_belong_is_refused(tmp_path):
    made = store(tmp_path)
    path = made.folder / "manifest.json"
    path.write_text(path.read_text().replace("1.0", "0.9"))
    with pytest.raises(StoreError, match=r"manifest\.json was changed"):
        made.create()
    path.write_text('{"half')
    with pytest.raises(StoreError, match="not valid JSON"):
        made.create()


def test_the_key_depends_on_content_and_not_on_order():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


# Prompts and records


def test_a_prompt_is_its_content():
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert prompt_id("2 + 2 =") == "cd8bac32bb69bf62"  # on every machine
    assert prompt_id(chat) == prompt_id([dict(chat[0])], {"answer": "4", "tools": None})
    assert len({prompt_id("a"), prompt_id("b"), prompt_id(chat), prompt_id(chat, {"tools": [{"x": 1}]})}) == 4


def test_a_sample_survives_json():
    sample = Sample("id", 3, "p", "c", [1, 2], "stop", -0.5, 7, {"r": None}, None, {"answer": 4}, 0.1)
    assert Sample(**json.loads(json.dumps(asdict(sample)))) == sample


def test_prompts_are_read_back_in_shards(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": n, "completion": "gold"} for n in range(7)]
    made = write_prompts(rows, tmp_path, shard_size=3)
    assert made.sizes == [3, 3, 1]
    shards = dict(made.shards([2, 0]))
    assert [[row["prompt"] for row in shards[shard]] for shard in (0, 2)] == [["p0", "p1", "p2"], ["p6"]]
    assert shards[2][0]["columns"] == {"answer": 6}  # `completion` stands for what is made
    made.path.write_bytes(made.path.read_bytes()[:-5])
    assert write_prompts(rows, tmp_path, shard_size=3) == made and count_lines(made.path) == 7


def test_columns_count_for_scores_and_not_for_completions(tmp_path):
    rows = Dataset.from_list([{"prompt": "p", "answer": 1, "digits": [1, 2]}])
    forms = (
        rows,
        rows.with_format("torch"),
        rows.with_format("numpy"),
        rows.to_iterable_dataset().with_format("torch"),
    )
    assert len({write_prompts(form, tmp_path, 1) for form in forms}) == len(set(map(prompts_digest, forms))) == 1
    one = write_prompts([{"prompt": "p", "answer": 1}], tmp_path, 1)
    other = write_prompts([{"prompt": "p", "answer": 2}], tmp_path, 1)
    assert one.ids_key == other.ids_key and one.content_key != other.content_key


def test_repeated_rows_are_used_once_and_counted(tmp_path, caplog):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]
    assert write_prompts(rows, tmp_path, 2).count == 2
    assert "1 of 3 rows repeat an earlier row" in caplog.text


def test_prompts_that_repeat_with_other_columns_are_taken_and_the_columns_named(tmp_path, caplog):
    rows = [{"prompt": "a", "answer": 1, "id": 1}, {"prompt": "a", "answer": 1, "id": 2}, {"prompt": "b", "id": 3}]
    made = write_prompts([*rows, rows[1]], tmp_path, 8)
    (shard,) = (found for _, found in made.shards([0]))
    assert [row["columns"] for row in shard] == [{"answer": 1, "id": 1}, {"answer": 1, "id": 2}, {"id": 3}]
    assert len({row["prompt_id"] for row in shard}) == 3 and shard[0]["prompt_id"] == prompt_id("a")
    assert "1 rows repeat the prompt of an earlier row with other values in ['id']" in caplog.text
    assert "remove these columns" in caplog.text and "1 of 4 rows repeat an earlier row" in caplog.text


@pytest.mark.parametrize("rows", [{"prompt": ["a"]}, "rows.jsonl", DatasetDict(train=Dataset.from_list([]))])
def test_what_is_no_rows_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="needed: rows"):
        write_prompts(rows, tmp_path / "prompts", 2)


def test_tools_may_be_json_as_in_training(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    one, other = (write_prompts([{"prompt": "a", "tools": t}], tmp_path, 1) for t in (tools, json.dumps(tools)))
    assert one == other


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found no row; needed at least one prompt"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1, column 'prompt': found an empty prompt"),
        ([{"prompt": None}], "row 0, column 'prompt': found an empty prompt"),
        ([{"text": "a"}], r"found the columns \['text'\]; needed a column 'prompt'"),
        ([{"prompt": 3}], "row 0, column 'prompt': found int 3"),
        ([{"prompt": [{"content": "x"}]}], "a 'role'"),
        ([{"prompt": "a", "tools": "[{"}], "row 0, column 'tools'.*JSON"),
        ([{"prompt": "a", "when": {1, 2}}], r"row 0, column 'when'.*remove_columns\('when'\)"),
        ([{"prompt": "a", "n": math.nan}], r"row 0, column 'n'.*not JSON.*finite.*remove_columns\('n'\)"),
        ([{"prompt": "a", "x": 1}, {"prompt": "b", "x": {"y": [math.inf]}}], "row 1, column 'x'.*not JSON"),
        ([{"prompt": [{"role": "user", "content": "a", "weight": math.nan}]}], "row 0, column 'prompt'.*not JSON"),
    ],
)
def test_bad_prompts_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        write_prompts(rows, tmp_path, 2)
