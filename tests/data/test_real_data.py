"""The real data sets: every row goes in or is named, and the ids are TRL's."""

import json
import random

import pytest
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from tests.tiny import tiny_tokenizer
from trl_ext.data.collators import GroupCollator
from trl_ext.data.formats import prepare_groups
from trl_ext.data.tokenization import TokenizationSettings, encode
from trl_ext.data.validation import DataError


def read(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    return rows


def prepare(dataset, tokenizer, **kwargs):
    return prepare_groups(dataset, tokenizer, tokenization=TokenizationSettings.for_training(tokenizer), **kwargs)


def trl_pairs(rows, tokenizer, max_length):
    args = RewardConfig(output_dir="unused", max_length=max_length, report_to="none", use_cpu=True, bf16=False)
    prepared = RewardTrainer._prepare_dataset(None, Dataset.from_list(rows), tokenizer, args, "train")
    return [list(pair) for pair in zip(prepared["chosen_ids"], prepared["rejected_ids"], strict=True)]


def has_empty_answer(row: dict) -> bool:
    return not (row["chosen"][-1]["content"] and row["rejected"][-1]["content"])


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_hh_chat_pairs(every, data_dir, tmp_path):
    rows, tokenizer = read(data_dir / "pairs_hh_harmless" / "split_test.jsonl"), tiny_tokenizer("qwen")
    empty = [number for number, row in enumerate(rows) if has_empty_answer(row)]
    assert len(rows) == 2312 and len(empty) == 4
    with pytest.raises(DataError, match="row 0, column 'chosen': found an empty assistant message"):
        prepare(Dataset.from_list(rows[empty[0] :][: None if every == 1 else 50]), tokenizer, max_length=None)

    rows = [row for number, row in enumerate(rows) if number % every == 0 or not row["clean"] or number in empty]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usable = [row for row in rows if not has_empty_answer(row)]
    assert sum(not row["clean"] for row in usable) == 9  # irregular but usable: roles do not alternate, extra messages
    prepared, report = prepare(Dataset.from_list(usable), tokenizer, max_length=512)
    assert list(prepared["candidate_ids"]) == trl_pairs(usable, tokenizer, 512)
    assert report.rows == len(usable) and report.kept == len(prepared) == report.rows - report.counts["over_long_rows"]
    assert report.dropped > 0
    assert prepared["clean"][:] == [usable[index]["clean"] for index in prepared["row_index"]]

    stream = load_dataset("json", data_files=str(path), split="train", streaming=True)
    streamed, stream_report = prepare(stream.filter(lambda row: not has_empty_answer(row)), tokenizer, max_length=512)
    assert [row["row_index"] for row in streamed] == prepared["row_index"][:]
    assert stream_report.counts == report.counts


def test_hh_irregular_rows_with_a_template_that_wants_alternation(data_dir):
    rows = read(data_dir / "pairs_hh_harmless" / "split_test.jsonl")
    irregular = [row for row in rows if not row["clean"] and not has_empty_answer(row)]
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert len(irregular) == 9
    for row in irregular:
        with pytest.raises(DataError, match="row 0, column 'chosen'.*roles must alternate"):
            prepare(Dataset.from_list([row]), tokenizer, max_length=None)


def test_hh_raw_text_with_a_real_tokenizer(data_dir):
    rows = read(data_dir / "pairs_hh_harmless" / "raw_test.jsonl")[:200]
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260K")
    prepared, report = prepare(Dataset.from_list(rows), tokenizer, max_length=1024)
    assert list(prepared["candidate_ids"]) == trl_pairs(rows, tokenizer, 1024)
    assert report.kept == len(prepared) > 100


def test_oasst_rankings(data_dir):
    path = data_dir / "rankings_oasst_en100" / "rankings.jsonl"
    rows, tokenizer = read(path), tiny_tokenizer("llama")
    rng = random.Random(0)
    for row in rows:  # the file's order is the rank order
        order = rng.sample(range(len(row["ranks"])), len(row["ranks"]))
        for column in ("completions", "ranks", "synthetic"):
            row[column] = [row[column][i] for i in order]
    prepared, report = prepare(Dataset.from_list(rows), tokenizer, max_length=None)
    assert report.rows == report.kept == 211
    assert {len(ids) for ids in prepared["candidate_ids"]} == {2, 3, 4, 5, 6, 8, 9}
    tokenization = TokenizationSettings.for_training(tokenizer)
    for row, new in zip(rows, prepared, strict=True):
        assert new["candidate_ratings"] == [-float(rank) for rank in row["ranks"]]
        assert new["synthetic"] == row["synthetic"]
        answer = [{"role": "assistant", "content": row["completions"][0]}]
        assert new["candidate_ids"][0] == encode(tokenizer, row["prompt"], answer, tokenization).ids
    batch = GroupCollator(tokenizer.pad_token_id)([prepared[i] for i in range(8)])
    assert batch["group_mask"].sum().item() == len(batch["input_ids"])

    limited, limited_report = prepare(Dataset.from_list(rows), tokenizer, max_length=512, min_survival=0.0)
    lengths = [[len(ids) for ids in group] for group in prepared["candidate_ids"]]
    fitting = [sum(length <= 512 for length in group) for group in lengths]
    assert limited["row_index"][:] == [number for number, fit in enumerate(fitting) if fit >= 2]
    assert limited_report.counts["over_long_rows"] == sum(fit < 2 for fit in fitting)
    left_out = sum(len(group) - fit for group, fit in zip(lengths, fitting, strict=True) if fit >= 2)
    assert limited_report.counts["over_long_candidates"] == left_out > 0

    stream = load_dataset("json", data_files=str(path), split="train", streaming=True)
    streamed, stream_report = prepare(stream, tokenizer, max_length=None)
    assert sum(1 for _ in streamed) == stream_report.kept == 211


def test_topical_chat_rankings_and_ratings(data_dir):
    source = load_dataset(
        "json", data_files=str(data_dir / "rankings_topical_chat" / "rankings.jsonl"), split="train", streaming=True
    )
    rows, tokenizer = list(source), tiny_tokenizer("gpt2")
    dataset = Dataset.from_list(rows)
    by_rank, report = prepare(dataset, tokenizer, max_length=None)
    assert report.rows == report.kept == 60
    assert {len(ids) for ids in by_rank["candidate_ids"]} == {6}
    by_rating, _ = prepare(dataset.rename_column("scores", "ratings"), tokenizer, max_length=None)
    tied_groups = 0
    for rank_row, rating_row in zip(by_rank, by_rating, strict=True):
        ranks, ratings = rank_row["candidate_ratings"], rating_row["candidate_ratings"]
        assert ratings == rating_row["ratings"]
        tied_groups += len(set(ratings)) < 6
        for i in range(6):
            for j in range(6):
                assert (ranks[i] > ranks[j]) == (ratings[i] > ratings[j])
    assert tied_groups == 44
    with pytest.raises(DataError, match="ratings: this loss uses the distances"):
        prepare(dataset, tokenizer, max_length=None, loss_needs_ratings=True)
