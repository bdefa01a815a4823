"""Transforms, content parts, tools of different keys, templates that leave text out: the model sees what is meant."""

import copy
import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.mapping import plain_rows
from trl_ext.data.spans import prepare_spans
from trl_ext.data.tokenization import TextRow, TokenizationSettings, encode, encode_batch
from trl_ext.data.validation import DataError


TOKENIZER = tiny_tokenizer("qwen")
SETTINGS = TokenizationSettings.for_training(TOKENIZER)
LAST_PART_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'].split('</think>')[-1] + '\n' }}"
    "{% endfor %}"
)
READS_PARTS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] + '|' }}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
IGNORES_CONTENT = "{% for message in messages %}{{ message['role'] + '\n' }}{% endfor %}"


def with_template(template: str):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def prepare(dataset, tokenizer=TOKENIZER, **kwargs):
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    return prepare_groups(dataset, tokenizer, tokenization=SETTINGS, max_length=None, **kwargs)


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def says(content) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def chat(good="four", bad="five", prompt="2 + 2?", **columns) -> dict:
    return {"prompt": user(prompt), "chosen": says(good), "rejected": says(bad), **columns}


# -------------------------------------------------------------------------------------------------------- transforms
def as_pairs(batch: dict) -> dict:
    return {
        "prompt": [f"Question: {question}" for question in batch["question"]],
        "chosen": [str(answer) for answer in batch["answer"]],
        "rejected": [str(answer + 1) for answer in batch["answer"]],
    }


def test_a_transform_is_applied():
    raw = Dataset.from_list([{"question": f"{n} + 1?", "answer": n + 1} for n in range(5)])
    prepared, report = prepare(raw.with_transform(as_pairs))
    expected, _ = prepare(raw.map(as_pairs, batched=True, remove_columns=raw.column_names))
    assert prepared["candidate_ids"][:] == expected["candidate_ids"][:] and report.kept == 5
    assert prepared.column_names == expected.column_names  # those of the transform, and ours
    raw.set_transform(as_pairs)
    assert prepare(raw)[0]["candidate_ids"][:] == expected["candidate_ids"][:]


def test_a_transform_may_return_dictionaries_with_different_keys():
    raw = Dataset.from_list([{"number": n} for n in range(1500)])

    def transform(batch):
        calls = [{"name": "add", "arguments": {f"key{n // 1000}": n}} for n in batch["number"]]
        return {
            "prompt": [user(f"{n}?") for n in batch["number"]],
            "chosen": [says("yes")] * len(calls),
            "rejected": [says("no")] * len(calls),
            "tools": [[call] for call in calls],
        }

    prepared, _ = prepare(raw.with_transform(transform))
    for row in (3, 1400):
        tools = [{"name": "add", "arguments": {f"key{row // 1000}": row}}]
        expected = encode(TOKENIZER, user(f"{row}?"), says("yes"), SETTINGS, tools=tools).ids
        assert prepared[row]["candidate_ids"][0] == expected


def test_a_transform_of_labelled_rows_is_applied():
    raw = Dataset.from_list([{"q": "1 + 1?", "a": "2", "ok": 1}, {"q": "1 + 2?", "a": "4", "ok": 0}])
    shown = raw.with_transform(
        lambda batch: {"prompt": batch["q"], "completion": batch["a"], "label": [bool(ok) for ok in batch["ok"]]}
    )
    tokenizer = tiny_tokenizer("llama")
    prepared, _ = prepare_spans(shown, tokenizer, kind="outcome", tokenization=SETTINGS, max_length=None)
    assert [set(row["label_values"]) for row in prepared] == [{1.0}, {0.0}]
    assert prepared["prompt"][:] == ["1 + 1?", "1 + 2?"]


def test_columns_that_a_format_hides_stay_hidden():
    raw = Dataset.from_list([chat(margin=-1.0, note="n")])
    shown = raw.with_format(None, columns=["prompt", "chosen", "rejected"])
    assert "note" not in prepare(shown)[0].column_names  # and the margin, which would be refused, is not read
    beside = raw.remove_columns("margin").with_format("numpy", columns=["prompt"], output_all_columns=True)
    assert prepare(beside)[0].column_names[:4] == ["prompt", "chosen", "rejected", "note"]


def test_a_transform_that_fails_is_refused():
    raw = Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="a transform .* cannot be applied to all rows: no such thing"):
        prepare(raw.with_transform(lambda batch: (_ for _ in ()).throw(ValueError("no such thing"))))


@pytest.mark.parametrize("later", [-1, 0.3, [True, 0.3]])
def test_bools_that_become_numbers_later_are_refused(later):
    raw = Dataset.from_list([{"number": n} for n in range(1200)])
    first = [True, True] if isinstance(later, list) else True

    def transform(batch):
        return {"label": [first if n < 1000 else later for n in batch["number"]]}

    with pytest.raises(DataError, match="each of one type"):
        plain_rows(raw.with_transform(transform))
    same = plain_rows(raw.with_transform(lambda batch: {"label": [n % 2 == 0 or None for n in batch["number"]]}))
    assert same["label"][:2] == [True, None]


def test_numbers_and_arrays_of_numpy_in_a_generator():
    row = {"prompt": "1 + 1?", "completion": "2", "label": np.bool_(True)}
    steps = {"prompt": "1 + 1?", "completions": ["1", "2"], "labels": np.array([True, False])}
    for kind, one in (("outcome", row), ("stepwise", steps)):
        stream = IterableDataset.from_generator(lambda one=one: iter([one, one]))
        prepared, _ = prepare_spans(stream, tiny_tokenizer("llama"), kind=kind, tokenization=SETTINGS, max_length=None)
        assert set(next(iter(prepared))["label_values"]) == ({1.0} if kind == "outcome" else {1.0, 0.0})


def test_a_dictionary_of_data_sets_is_refused():
    pairs = DatasetDict(train=Dataset.from_list([{"chosen": "a", "rejected": "b"}]))
    outcomes = DatasetDict(train=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]))
    with pytest.raises(DataError, match=r"a dictionary of data sets \(train\).*such as dataset\['train'\]"):
        prepare(pairs)
    with pytest.raises(DataError, match=r"a dictionary of data sets \(train\)"):
        prepare_spans(outcomes, tiny_tokenizer("llama"), kind="outcome", tokenization=SETTINGS, max_length=None)


# ------------------------------------------------------------------------------------------------------ content parts
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_text_parts_are_joined_for_a_template_of_strings(kind):
    tokenizer = tiny_tokenizer(kind)
    rows = [chat(good=parts("four", " apples"), bad=parts("five"), prompt=parts("2 + ", "2?"))]
    prepared, _ = prepare(rows, tokenizer)
    expected = [encode(tokenizer, user("2 + 2?"), says(text), SETTINGS).ids for text in ("four apples", "five")]
    assert prepared[0]["candidate_ids"] == expected
    assert encode(tokenizer, user(parts("2 + ", "2?")), says(parts("four", " apples")), SETTINGS).ids == expected[0]


def test_a_template_that_reads_parts_gets_them():
    tokenizer = with_template(READS_PARTS)
    ids = encode(tokenizer, user(parts("2 + ", "2?")), says("four"), SETTINGS).ids
    assert tokenizer.decode(ids) == "user: 2 + |2?|\nassistant: four\n"


def test_labels_count_in_the_joined_text():
    tokenizer = tiny_tokenizer("llama")
    segments = [{"start": 5, "end": 11, "label": 1.0}]
    rows = [{"prompt": user("2 + 2?"), "completion": says(parts("four ", "apples")), "segments": segments}]
    arguments = {"kind": "segment", "tokenization": SETTINGS, "max_length": None}
    found, _ = prepare_spans(Dataset.from_list(rows), tokenizer, **arguments)
    rows[0]["completion"] = says("four apples")
    expected, _ = prepare_spans(Dataset.from_list(rows), tokenizer, **arguments)
    for column in ("span_input_ids", "label_positions"):
        assert found[0][column] == expected[0][column]


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a_part_that_is_no_text_is_refused(column):
    picture = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "this"}]
    good = {"good": parts("a"), "bad": parts("b"), "prompt": parts("c")}
    bad = {**good, "good" if column == "chosen" else "prompt": picture}
    with pytest.raises(DataError, match=f"row 1, column '{column}'.*parts"):
        prepare([chat(**good), chat(**bad)])


def test_an_empty_text_part_is_an_empty_completion():
    with pytest.raises(DataError, match="column 'rejected'.*an empty assistant message"):
        prepare([chat(good=parts("a"), bad=parts(""))])


# -------------------------------------------------------------------------------------------- what the template leaves
def test_text_that_the_template_leaves_out_is_counted_and_shown():
    rows = [chat(), chat(good="<think>two and two</think>four"), chat(bad=" five \n"), chat()]
    _, report = prepare(rows, with_template(LAST_PART_ONLY))
    assert report.counts["unseen"] == 1 and report.first_unseen == (1, "<think>two and two</think>four")
    assert "row 1: str '<think>two and two</think>four'" in report.summary()


@pytest.mark.parametrize("template", [IGNORES_CONTENT, LAST_PART_ONLY])
def test_a_template_that_leaves_out_text_of_all_rows_is_refused(template):
    rows = [chat(good="<think>a</think>b"), chat(bad="<think>a</think>c")]
    with pytest.raises(DataError, match="row 0.*the chat template leaves out in every row.*chat_template_path"):
        prepare(rows, with_template(template))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "note": 'say "hi"'}}}
WITH_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['reasoning_content'] or '' }}{{ message['content'] or '' }}"
    "{{ message['tool_calls'] | tojson if message['tool_calls'] else '' }}{{ '\n' }}{% endfor %}"
)
WITHOUT_CALLS = (
    "{% for message in messages %}{{ message['role'] + ': ' + (message['content'] or '') + '\n' }}{% endfor %}"
)
NAMES_ONLY = WITHOUT_CALLS.replace(
    "(message['content'] or '')", "(message['content'] or message['tool_calls'][0]['function']['name'])"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("answer", "template", "seen"),
    [
        ([{"role": "assistant", "tool_calls": [CALL]}], WITH_CALLS, True),
        ([{"role": "assistant", "tool_calls": [CALL]}], WITHOUT_CALLS, False),
        ([{"role": "assistant", "tool_calls": [CALL]}], NAMES_ONLY, False),
        ([{"role": "assistant", "content": "Sunny.", "reasoning_content": "I look up."}], WITH_CALLS, True),
        ([{"role": "assistant", "content": "Sunny.", "reasoning_content": "I look up."}], WITHOUT_CALLS, False),
    ],
    ids=["call", "no call", "no arguments", "thinking", "no thinking"],
)
def test_calls_and_thinking_are_text_of_a_completion(answer, template, seen):
    row = {"prompt": user("Sun?"), "chosen": answer, "rejected": says("No idea.")}
    _, report = prepare([row, chat()], with_template(template))
    assert report.counts["unseen"] == (0 if seen else 1)
    if answer[-1].get("content"):
        rows = [{"prompt": user("Sun?"), "completion": one, "label": True} for one in (answer, says("No idea."))]
        data = Dataset.from_list(rows)
        _, report = prepare_spans(
            data, with_template(template), kind="outcome", tokenization=SETTINGS, max_length=None
        )
        assert report.counts["unseen"] == (0 if seen else 1)


def test_a_prompt_of_which_the_template_leaves_out_something_is_counted():
    system = [{"role": "system", "content": "Be brief."}, *user("2 + 2?")]
    thought = [*user("Hi"), *says("<think>A greeting.</think>Hello!"), *user("2 + 2?")]
    no_system = (
        "{% for message in messages if message['role'] != 'system' %}{{ message['content'] + '\n' }}{% endfor %}"
    )
    rows = [chat(), {**chat(), "prompt": system}, {**chat(), "prompt": thought}]
    _, report = prepare(rows, with_template(no_system))
    assert report.counts["unseen_prompt"] == 1 and report.first_unseen == (1, "Be brief.")
    assert report.kept == 3 and "row 1: str 'Be brief.'" in report.summary()
    _, report = prepare(rows, with_template(LAST_PART_ONLY))
    assert report.counts["unseen_prompt"] == 0


def test_tools_that_the_template_leaves_out_are_counted():
    rows = [{**chat(), "tools": json.dumps([WEATHER])}, {**chat(), "tools": None}]
    for template, count in ((WITH_CALLS, 0), (WITHOUT_CALLS, 1)):
        _, report = prepare(rows, with_template(template))
        assert report.counts["unseen_prompt"] == count
    assert report.first_unseen == (0, "weather")


@pytest.mark.parametrize(
    "calls", ["[]", [None], [{"function": None}], [{"name": "f", "arguments": "{"}], [{"name": 3}]]
)
def test_calls_of_another_form_are_for_the_template_to_judge(calls):
    encoded = encode_batch(TOKENIZER, [TextRow(user("Sun?"), [{**says("Yes.")[0], "tool_calls": calls}])], SETTINGS)
    assert encoded[0].unseen in (None, "f") and encoded[0].ids


def test_a_stream_says_and_refuses_it_too(caplog):
    rows = [chat(), chat(good="<think>a</think>b"), chat()]
    list(prepare(IterableDataset.from_generator(lambda: iter(rows)), with_template(LAST_PART_ONLY))[0])
    assert "row 1 is the first row counted as unseen" in caplog.text
    stream = IterableDataset.from_generator(lambda: (chat() for _ in range(300)))
    with pytest.raises(DataError, match="the chat template leaves out in every row"):
        list(prepare(stream, with_template(IGNORES_CONTENT))[0])


def test_an_earlier_message_of_a_labelled_completion_is_counted_too():
    tokenizer = with_template(LAST_PART_ONLY)
    completions = [[*says("<think>a</think>b"), *user("why?"), *says("c")], says("d")]
    rows = [{"prompt": user("so?"), "completion": completion, "label": True} for completion in completions]
    _, report = prepare_spans(
        Dataset.from_list(rows), tokenizer, kind="outcome", tokenization=SETTINGS, max_length=None
    )
    assert report.counts["unseen"] == 1 and report.first_unseen == (0, "<think>a</think>b")


def test_text_of_unknown_tokens_only_is_counted():
    tokenizer = tiny_tokenizer("bert")
    settings = TokenizationSettings.for_training(tokenizer)
    rows = [{"chosen": "a good answer \u2603", "rejected": "no"}, {"chosen": "yes", "rejected": "\u2603 \u2602\u2602"}]
    _, report = prepare_groups(Dataset.from_list(rows), tokenizer, tokenization=settings, max_length=None)
    assert report.counts["unknown"] == 1 and report.first_unseen == (1, "\u2603 \u2602\u2602")
    assert encode(tokenizer, user("why?"), says("\u2603"), settings).unknown == "\u2603"
    labelled = [{"prompt": "why?", "completion": text, "label": True} for text in ("yes", "\u2603")]
    arguments = {"kind": "outcome", "tokenization": settings, "max_length": None}
    assert prepare_spans(Dataset.from_list(labelled), tokenizer, **arguments)[1].first_unseen == (1, "\u2603")
    assert encode(tiny_tokenizer("gpt2"), None, "\u2603", settings).unknown is None  # it has every byte


def test_white_space_that_a_template_moves_is_not_missing():
    template = LAST_PART_ONLY.replace(".split('</think>')[-1]", ".replace('</think>', '\n</think>\n\n') | trim")
    assert encode(with_template(template), user("a"), says(" <think>b</think>c "), SETTINGS).unseen is None


# ------------------------------------------------------------------------------------------------- tools with own keys
TOOLS = [
    [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "text"}}}},
        }
    ],
    [{"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "text"}}}}}],
]
CALLS = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if 'tool_calls' in message %}{{ message['tool_calls'] | tojson }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def call(**arguments) -> list[dict]:
    return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


def test_each_row_keeps_the_keys_that_it_was_given():
    rows = [
        {"prompt": user("hot?"), "chosen": call(city="Rome"), "rejected": says("no"), "tools": TOOLS[0]},
        {"prompt": user("late?"), "chosen": call(zone="CET", exact=True), "rejected": says("yes"), "tools": TOOLS[1]},
    ]
    tokenizer = with_template(CALLS)
    prepared, _ = prepare(rows, tokenizer)
    assert prepared[0]["tools"][0]["function"]["parameters"]["properties"]["zone"] is None  # what the column holds
    for row, new in zip(rows, prepared, strict=True):
        for column, ids in zip(("chosen", "rejected"), new["candidate_ids"], strict=True):
            wanted = tokenizer.apply_chat_template(row["prompt"] + row[column], tools=row["tools"])["input_ids"]
            scored = encode(tokenizer, row["prompt"], row[column], SETTINGS, tools=row["tools"]).ids
            assert ids == wanted == scored
    as_json = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    assert prepare(as_json, tokenizer)[0]["candidate_ids"][:] == prepared["candidate_ids"][:]


def test_template_arguments_of_other_rows_are_not_passed():
    template = "{% if language is defined %}{{ 'in ' ~ language }}{% endif %}" + LAST_PART_ONLY
    rows = [
        chat(chat_template_kwargs={"language": "French", "thinking": True}),
        chat(chat_template_kwargs={"thinking": True}),
    ]
    prepared, _ = prepare(rows, with_template(template))
    texts = [with_template(template).decode(row["candidate_ids"][0]) for row in prepared]
    assert texts[0].startswith("in French") and texts[1].startswith("user")


def test_a_template_of_a_row_that_reads_the_clock_is_refused():
    """The template of a tokenizer is frozen in the checkpoint; one that stands in the rows is not."""
    clock = "{{ strftime_now('%d %B') }}" + LAST_PART_ONLY
    plain = chat(chat_template_kwargs={"chat_template": LAST_PART_ONLY})
    prepare([plain])
    with pytest.raises(DataError, match="row 1, column 'chat_template_kwargs'.*today's date"):
        prepare([plain, chat(chat_template_kwargs={"chat_template": clock})])


# -------------------------------------------------------------------------------------------------------- in batches
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_rows_of_all_kinds_in_one_call_are_encoded_as_alone(kind):
    tokenizer = tiny_tokenizer(kind)
    settings = TokenizationSettings.for_training(tokenizer)
    rows = [
        TextRow("2 + 2 =", " 4"),
        TextRow(user("hello"), says("hi there")),
        TextRow(None, "日本語 🙂"),
        TextRow(user("hello"), "hi", TOOLS[0]),
        TextRow(user("hello"), says("hi"), None, {"thinking": True}),
        TextRow(user("so?"), "hm", TOOLS[1], {"thinking": True}),
        TextRow("", ""),
        TextRow(None, [*user("a"), *says("b")]),
    ]
    together = encode_batch(tokenizer, rows, settings)
    for row, found in zip(rows, together, strict=True):
        arguments = {"tools": row.tools, "chat_template_kwargs": row.chat_template_kwargs}
        assert found == encode(tokenizer, row.prompt, row.completion, settings, **arguments)
    assert encode_batch(tokenizer, [], settings) == []
