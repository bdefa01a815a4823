"""Malformed rows: each gives a DataError with row, column and cure, from a data set, a stream and worker processes."""

import pickle

import pytest
from datasets import Dataset, IterableDataset

from tests.tiny import pair_rows, ranked_rows, tiny_tokenizer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.data.validation import DataError


TOKENIZER = tiny_tokenizer("llama")
NAN = float("nan")
USER = [{"role": "user", "content": "hello"}]


def prepare(dataset, tokenizer=TOKENIZER, **kwargs):
    tokenization = TokenizationSettings.for_training(tokenizer)
    return prepare_groups(dataset, tokenizer, **{"tokenization": tokenization, "max_length": None, **kwargs})


def pair(**changes) -> dict:
    return {"prompt": "a", "chosen": "b", "rejected": "c", **changes}


def ranked(**changes) -> dict:
    return {"prompt": "a", "completions": ["b", "c"], "ratings": [1.0, 2.0], **changes}


def by_ranks(ranks) -> dict:
    return {"prompt": "a", "completions": ["b", "c"], "ranks": ranks}


# (good row, bad row, column, what the message must contain)
BAD_ROWS = {
    "list for string": (pair(), pair(rejected=["c", "d"]), "rejected", "a list that holds str 'c'"),
    "list of strings in both": (pair(), pair(chosen=["b"], rejected=["c"]), "chosen", "a list that holds str 'b'"),
    "None for string": (pair(), pair(chosen=None), "chosen", "found None"),
    "number for string": (pair(), pair(chosen=3), "chosen", "found int 3"),
    "non-dict message": (
        pair(prompt=USER),
        pair(prompt=[*USER, "hello"]),
        "prompt",
        "a list that holds str 'hello'",
    ),
    "message without role": (pair(prompt=USER), pair(prompt=[{"content": "a"}]), "prompt", "a 'role' in it"),
    "message without content": (
        pair(prompt=USER),
        pair(prompt=[{"role": "user", "content": None}]),
        "prompt",
        "a 'content'",
    ),
    "empty completion": (pair(), pair(chosen=""), "chosen", "an empty string"),
    "empty list": (pair(prompt=USER), pair(prompt=USER, rejected=[]), "rejected", "an empty list"),
    "empty message": (
        pair(prompt=USER),
        pair(prompt=USER, rejected=[{"role": "assistant", "content": ""}], chosen=[*USER]),
        "rejected",
        "an empty assistant message",
    ),
    "one empty of three": (ranked(), ranked(completions=["b", ""]), "completions", "an empty string"),
    "chosen text, rejected chat": (pair(), pair(rejected=USER), "rejected", "completions of one kind"),
    "text prompt, chat completions": (
        pair(),
        pair(chosen=[{"role": "assistant", "content": "b"}], rejected=[{"role": "assistant", "content": "c"}]),
        "prompt",
        "Make the prompt a list of messages",
    ),
    "chat row among text rows": (pair(), pair(prompt=USER), "chosen", "found a chat row; needed text rows"),
    "text row among chat rows": (pair(prompt=USER), pair(), "chosen", "found a text row; needed chat rows"),
    "None margin": (pair(margin=1.0), pair(margin=None), "margin", "found None; needed a finite number >= 0"),
    "NaN margin": (pair(margin=1.0), pair(margin=NAN), "margin", "found float nan"),
    "infinite margin": (pair(margin=1.0), pair(margin=float("inf")), "margin", "found float inf"),
    "negative margin": (
        pair(margin=0.0),
        pair(margin=-0.5),
        "margin",
        "found float -0.5; needed a finite number >= 0",
    ),
    "text margin": (pair(margin=0.0), pair(margin="1"), "margin", "found str '1'"),
    "probability above 1": (
        pair(preference_probability=1.0),
        pair(preference_probability=1.1),
        "preference_probability",
        "from 0 to 1",
    ),
    "probability below 0": (
        pair(preference_probability=0.0),
        pair(preference_probability=-0.1),
        "preference_probability",
        "from 0 to 1",
    ),
    "probability of a larger group": (
        ranked(preference_probability=0.5),
        {"prompt": "a", "completions": ["b"] * 3, "ratings": [1.0] * 3, "preference_probability": 0.5},
        "preference_probability",
        "for 3 candidates",
    ),
    "chosen rated below rejected": (
        pair(chosen_rating=1.0, rejected_rating=1.0),
        pair(chosen_rating=1.0, rejected_rating=2.0),
        "chosen_rating",
        "found 1, below rejected_rating = 2",
    ),
    "NaN rating of a pair": (
        pair(chosen_rating=1.0, rejected_rating=1.0),
        pair(chosen_rating=1.0, rejected_rating=NAN),
        "rejected_rating",
        "found float nan",
    ),
    "single completion": (ranked(), ranked(completions=["b"], ratings=[1.0]), "completions", "1 completion(s)"),
    "no completions": (ranked(), ranked(completions=[], ratings=[]), "completions", "0 completion(s)"),
    "string for completions": (ranked(), ranked(completions="bc"), "completions", "a list of completions"),
    "None completions": (ranked(), ranked(completions=None), "completions", "found None"),
    "too many ratings": (ranked(), ranked(ratings=[1.0, 2.0, 3.0]), "ratings", "found 3 values; needed 2"),
    "too few ratings": (ranked(), ranked(ratings=[1.0]), "ratings", "found 1 values; needed 2"),
    "None ratings": (ranked(), ranked(ratings=None), "ratings", "a list of 2 numbers"),
    "NaN rating": (ranked(), ranked(ratings=[1.0, NAN]), "ratings", "found float nan"),
    "None rating": (ranked(), ranked(ratings=[1.0, None]), "ratings", "found None"),
    "negative rank": (by_ranks([0, 1]), by_ranks([0, -1]), "ranks", "a whole number >= 0"),
    "non-integer rank": (by_ranks([0.0, 1.0]), by_ranks([0.0, 0.5]), "ranks", "found float 0.5"),
    "None rank": (by_ranks([0, 1]), by_ranks([0, None]), "ranks", "found None"),
    "NaN rank": (by_ranks([0.0, 1.0]), by_ranks([0.0, NAN]), "ranks", "found float nan"),
    "bool rank": (by_ranks([0, 1]), by_ranks([False, True]), "ranks", "found bool False"),
    "too few ranks": (by_ranks([0, 1]), by_ranks([0]), "ranks", "found 1 values; needed 2"),
    "ranks against ratings": (
        ranked(ranks=[1, 0]),
        ranked(ranks=[0, 1]),
        "ranks",
        "contradict the ratings",
    ),
    "tools that are no JSON": (
        pair(prompt=USER, tools="[]"),
        pair(prompt=USER, tools="[{"),
        "tools",
        "a list of tools, or JSON of such a list",
    ),
    "kwargs that are no dictionary": (
        pair(prompt=USER, chat_template_kwargs={}),
        pair(prompt=USER, chat_template_kwargs=["a"]),
        "chat_template_kwargs",
        "a dictionary",
    ),
    "empty token ids": (
        {"chosen_ids": [1], "rejected_ids": [2]},
        {"chosen_ids": [1], "rejected_ids": []},
        "rejected_ids",
        "a non-empty list of token ids",
    ),
    "negative token id": (
        {"candidate_ids": [[1], [2]], "ratings": [1, 0]},
        {"candidate_ids": [[1], [-100]], "ratings": [1, 0]},
        "candidate_ids",
        "a non-empty list of token ids",
    ),
}
ARROW_CANNOT_HOLD = {  # mixed types in a column exist in a stream only
    "list for string", "list of strings in both", "number for string", "non-dict message", "empty list",
    "empty message", "chosen text, rejected chat", "text prompt, chat completions", "chat row among text rows",
    "text row among chat rows", "text margin", "string for completions", "bool rank", "kwargs that are no dictionary",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_in_a_stream(name):
    good, bad, column, message = BAD_ROWS[name]

    def generate():
        yield from [good, good, bad]

    stream, _ = prepare(IterableDataset.from_generator(generate))
    rows = iter(stream)
    next(rows)
    next(rows)
    with pytest.raises(DataError) as caught:
        next(rows)
    check(caught.value, 2, column, message)


@pytest.mark.parametrize("name", [name for name in BAD_ROWS if name not in ARROW_CANNOT_HOLD])
def test_bad_row_in_a_data_set(name):
    good, bad, column, message = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list([good, bad]))
    check(caught.value, 1, column, message)
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list([bad]))
    assert (caught.value.row, caught.value.column) == (0, column)


def check(error: DataError, row: int, column: str, message: str) -> None:
    assert (error.row, error.column) == (row, column)
    text = str(error)
    assert text.startswith(f"train data, row {row}, column {column!r}: found ")
    assert message in text
    assert "; needed " in text and error.fix and text.endswith(error.fix)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "rejected": "b"}, "chosen"),
        ({"question": "a", "answer": "b"}, "chosen"),
        ({"prompt": "a", "completions": ["b", "c"]}, "ratings"),
        ({"completions": ["b", "c"], "ratings": [1, 2]}, "prompt"),
        ({"candidate_ids": [[1], [2]]}, "ratings"),
        (pair(chosen_rating=1.0), "rejected_rating"),
        (pair(rejected_rating=1.0), "chosen_rating"),
    ],
)
def test_missing_column(row, column):
    with pytest.raises(DataError, match="no such column among") as caught:
        prepare(Dataset.from_list([row]))
    assert (caught.value.row, caught.value.column) == (0, column)


def test_reserved_and_ambiguous_columns():
    with pytest.raises(DataError, match="column 'row_index': found a column of that name"):
        prepare(Dataset.from_list([pair(row_index="r1")]))
    with pytest.raises(DataError, match="either ranked or preference rows"):
        prepare(Dataset.from_list([{**pair(), **ranked()}]))


def test_no_rows():
    with pytest.raises(DataError, match="found no rows"):
        prepare(Dataset.from_list([pair()]).select([]))


def test_error_crosses_worker_processes_and_pickling():
    rows = [*pair_rows(3), pair(margin=None)]
    for row in rows[:3]:
        row["margin"] = 0.5
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list(rows), num_proc=2)
    assert (caught.value.row, caught.value.column) == (3, "margin")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert vars(copy) == vars(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_beyond_the_vocabulary(stream):
    rows = [{"candidate_ids": [[1], [n, 3]], "ratings": [1, 0]} for n in (9, 10)]
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    with pytest.raises(DataError) as caught:
        list(prepare(data, vocab_size=10)[0])
    check(caught.value, 1, "candidate_ids", "the token id 10; needed ids below 10")
    assert len(list(prepare(data)[0])) == 2  # a vocabulary that is not known is not checked


def test_tokenizer_without_eos_works():
    prepared, report = prepare(Dataset.from_list(ranked_rows(3)), tokenizer=tiny_tokenizer("bert"))
    assert report.kept == 3


def test_tokenizer_without_chat_template():
    with pytest.raises(DataError, match="row 0, column 'chosen'.*chat_template_path"):
        prepare(Dataset.from_list(pair_rows(2, chat=True)), tokenizer=tiny_tokenizer(chat=False))


def test_chat_template_that_objects_to_a_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = pair_rows(2, chat=True)
    rows[1]["prompt"] = rows[1]["prompt"] * 2
    with pytest.raises(DataError, match="row 1, column 'chosen'.*roles must alternate"):
        prepare(Dataset.from_list(rows), tokenizer=tokenizer)


def test_text_that_gives_no_token():
    with pytest.raises(DataError, match="row 0, column 'chosen'.*without any token"):
        tokenization = TokenizationSettings(append_eos=False, adds_special_tokens=False)
        prepare(
            Dataset.from_list([pair(prompt="", chosen=" ")]),
            tokenizer=tiny_tokenizer("bert"),
            tokenization=tokenization,
        )


def test_margin_zero_is_accepted_and_kept():
    prepared, _ = prepare(Dataset.from_list([pair(margin=0.0), pair(margin=0.0)]))
    assert prepared["group_margin"][:] == [0.0, 0.0]
