"""Self-instruct: ROUGE-L, filters, what is read from answers, whole runs against a server, and kills."""

import json
import os
import signal
import sys
from collections import Counter
from functools import lru_cache

import pytest
import torch
import wandb
from trl import SFTConfig, SFTTrainer

from tests.pipelines.feedback.scripted_writer import answer
from tests.pipelines.http_server import serving
from tests.program import run_offline_wandb
from tests.tiny import save_tiny_model
from trl_ext import self_instruct
from trl_ext.cli.common.options import parse
from trl_ext.cli.main import main
from trl_ext.cli.self_instruct import make_parser
from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.instruct_pool import (
    Filters,
    Nearest,
    Pool,
    Task,
    read_seeds,
    screen_instances,
    words_of,
)
from trl_ext.pipelines.feedback.instruct_prompts import InstructPrompts, read_templates
from trl_ext.pipelines.feedback.templates import FOLDER


pytest.importorskip("rapidfuzz", reason="self-instruct needs rapidfuzz (pip install 'trl-ext[self-instruct]')")

SEEDS = FOLDER.parents[3] / "docs" / "data" / "self_instruct" / "seed_tasks.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("policy"), "llama"))


def run(url, folder, num_tasks=30, **more):
    options = {"server_base_url": url, "max_concurrency": 4}
    arguments = {"prompts_per_round": 4, "seed": 1, "backend": "openai", "backend_kwargs": options} | more
    return self_instruct("served", SEEDS, folder, num_tasks, **arguments)


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


def records_in(folder):
    return [json.loads(line) for path in sorted(folder.glob("rounds/*/shard-*.jsonl")) for line in path.open()]


# ------------------------------------------------------------------------------------------------------------- filters
def longest_common(one, other):
    """The length of the longest common subsequence, from its recursion."""

    @lru_cache(None)
    def length(i, j):
        if i == len(one) or j == len(other):
            return 0
        return 1 + length(i + 1, j + 1) if one[i] == other[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def test_rouge_l_by_hand_and_by_its_recursion():
    # "the cat sat on the mat" and "the cat on a mat": the cat on mat, 4 of 6 and of 5 words: 2 * 4 / 11
    assert Nearest(["the cat sat on the mat"])("The cat on a mat!") == (pytest.approx(8 / 11), 0)
    texts = [task.instruction for task in read_seeds(SEEDS)]
    nearest = Nearest(texts[1:])
    for text in (texts[0], "Sort the two sentences from the lightest to the heaviest", "什么 is it"):
        words = words_of(text)
        scores = [2 * longest_common(words, o) / (len(words) + len(o)) for o in map(words_of, texts[1:])]
        found, place = nearest(text)
        assert found == pytest.approx(max(scores)) and scores[place] == max(scores)
    assert words_of("我们 eat_2 Äpfel") == ["我", "们", "eat", "2", "äpfel"]
    assert Nearest()("anything") == (0.0, None)


def test_each_filter_of_instructions():
    seeds = [Task("Name the capital of the country.", False, [])]
    pool = Pool(seeds, Filters(max_words=12))
    given = {
        "Name it": "too_short",
        "word " * 13: "too_long",
        "- name three large rivers": "punctuation",
        '"Yes" or no: is it cold': None,
        "Describe the Images of a dream": "keyword",
        "Imagine that you are a bird": None,
        "name the capital of the country": "duplicate",
        "Name the capital of the old country.": "similar",  # 2 * 6 / 13
        "Imagine that you are a tiny bird": "similar",  # to one that passed before it
    }
    screened = pool.screen(list(given))
    assert [reason for reason, _ in screened] == list(given.values())
    assert screened[7][1] == pytest.approx(12 / 13) and screened[0][1] is None
    # those that passed belong to the pool only once they are added
    assert pool.screen(["Imagine that you are a tiny bird"])[0][0] is None
    pool.add(Task("Imagine that you are a bird", False, []))
    assert pool.screen(["Imagine that you are a tiny bird"])[0][0] == "similar"
    assert Pool(seeds, Filters(keywords=())).screen(["Draw the map of a city"])[0][0] is None


def test_each_filter_of_instances():
    def of(*pairs):
        return [{"input": source, "output": target} for source, target in pairs]

    found = of(("a", "b"), ("a", "b"), ("c", ""), ("D", "d"), ("", "Do it"), ("e", "f"), ("e", "g"), ("", "h"))
    kept, dropped = screen_instances("do it", found)
    assert kept == of(("a", "b"), ("", "h"))
    expected = {"duplicate_instance": 1, "empty_output": 1, "repeats_input": 2, "conflicting_outputs": 2}
    assert dropped == expected


# ------------------------------------------------------------------------------------------------------------- prompts
def prompts(style):
    return InstructPrompts(style, read_templates(style), read_seeds(SEEDS), 0, 3, 4, 2)


def test_what_prompts_show():
    base, chat = prompts("completion"), prompts("chat")
    text = base.instruction(["Do a.", "Do b."], 8)
    assert text.endswith("1. Do a.\n2. Do b.\n3.") and base.stops("instruction", 2, 8) == ["\n11."]
    (message,) = chat.instruction(["Do a.", "Do b."], 5)
    assert "1. Do a.\n2. Do b.\n" in message["content"] and "from 1 to 5" in message["content"]
    kinds = base.classification("Do c.")
    assert kinds.count("Fixed labels: Yes") == 3 and kinds.count("Fixed labels: No") == 4
    assert kinds.endswith("Task: Do c.\nFixed labels:") and kinds == prompts("completion").classification("Do c.")
    assert base.instances("Do c.", False).endswith("Task: Do c.\nInput:")
    assert base.instances("Do c.", True).endswith("Task: Do c.\nLabel:")
    assert base.instances("Do c.", True).count("Label: ") == 2


@pytest.mark.parametrize(
    ("style", "text", "cut", "found", "spoilt"),
    [
        ("completion", " Do a.\n10. Do\n b.\n11. Do c.", False, ["Do a.", "Do b.", "Do c."], {}),
        ("completion", " Do a.\n10. Do b", True, ["Do a."], {"cut": 1}),
        ("completion", " Do a.\n\nAnother text\n10.\n11) Do c.", False, ["Do a.", "Do c."], {"empty": 1}),
        (
            "chat",
            "Sure!\n1. **Do a.**\n2. Do b.\n3. Do c.\n4. Do d.",
            False,
            ["Do a.", "Do b.", "Do c."],
            {"surplus": 1},
        ),
        ("chat", "1. Sort these:\n3) b\n1) a\n2. Do b.", False, ["Sort these: 3) b 1) a", "Do b."], {}),
        ("chat", "I cannot do that.", False, [], {"no_list": 1}),
        ("chat", "1. In 2024. or so\n2. Do 3. things", True, ["In 2024. or so"], {"cut": 1}),
    ],
)
def test_instructions_of_an_answer(style, text, cut, found, spoilt):
    assert prompts(style).read_instructions(text, cut, 3) == (found, Counter(spoilt))


def test_a_list_inside_the_first_item_of_a_completion():
    found, _ = prompts("completion").read_instructions(" Sort:\n1) b\n2) a\n10. Do b.", False, 3, demonstrations=8)
    assert found == ["Sort: 1) b 2) a", "Do b."]


@pytest.mark.parametrize(
    ("style", "kind", "text", "cut", "found", "reason"),
    [
        (
            "completion",
            False,
            " none\nOutput: It is\nfine.\n\nTask: other\nInput: x",
            False,
            [("", "It is\nfine.")],
            None,
        ),
        ("completion", False, " a: b\nOutput: c\nInput: d\nOutput: e", True, [("a: b", "c")], None),
        ("completion", False, " a\nOutput: c", True, [], "cut"),
        ("completion", True, " good\nInput: I like it", False, [("I like it", "good")], None),
        ("chat", False, "Of course.\n**Input:** <none>\n**Output:** c", False, [("", "c")], None),
        ("chat", False, "Output: c", False, [("", "c")], None),
        ("chat", False, "Output: c\nExample: d\nTask force: e", False, [("", "c\nExample: d\nTask force: e")], None),
        ("chat", False, "Output: c\n\n**Task 2:** d\nOutput: e", False, [("", "c")], None),
        ("chat", True, "The label is good.", False, [], "no_instance"),
    ],
)
def test_instances_of_an_answer(style, kind, text, cut, found, reason):
    expected = [{"input": source, "output": target} for source, target in found]
    assert prompts(style).read_instances(text, kind, cut) == (expected, reason)


def test_kinds_of_an_answer():
    read = prompts("chat").read_classification
    assert [read(text) for text in (" Yes", "**No**, free text", "Yesterday", "It is yes", "")] == [
        True,
        False,
        None,
        None,
        None,
    ]


# ---------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with serving(answer) as server:
        rows = run(server.url, folder)
    return folder, rows, server.bodies


def test_a_run_counts_every_instruction(whole_run):
    folder, rows, bodies = whole_run
    report, records = report_in(folder), records_in(folder)
    candidates = [one for record in records for one in record["candidates"]]
    assert report["tasks"] == 30 and set(rows["task"]) == set(range(30)) and report["rows"] == len(rows)
    assert report["instructions"] == len(candidates) == report["kept"] + sum(report["dropped"].values())
    expected = {"too_short", "punctuation", "keyword", "duplicate", "similar", "no_label", "empty_output"}
    assert expected <= set(report["dropped"]) and report["unread"].keys() == {"cut"}
    assert sum(report["similarity"]["histogram"]) == 30 and sum(report["similarity"]["histogram"][7:]) == 0
    texts = [task.instruction for task in read_seeds(SEEDS)] + sorted(set(rows["instruction"]))
    for place, text in enumerate(texts[32:], start=32):
        assert Nearest(texts[:place] + texts[place + 1 :])(text)[0] < 0.7
    row = next(row for row in rows if row["input"])
    assert row["prompt"] == f"{row['instruction']}\n\n{row['input']}\n\n" and row["completion"] == row["output"]
    page = (folder / "report.html").read_text()
    assert "30 tasks" in page and "neither yes nor no" in page and "<script" not in page and "http" not in page
    # instructions are sampled as in the paper, everything else greedily
    sampled = {(body["temperature"], body["top_p"]) for body in bodies if body["stop"] == ["\n17."]}
    assert sampled == {(0.7, 0.5)} and {b["temperature"] for b in bodies if b["stop"] != ["\n17."]} == {0.0}
    assert {body["max_tokens"] for body in bodies if body["stop"] == ["\n"]} == {8}


def test_demonstrations_mix_seeds_and_tasks_of_earlier_rounds(whole_run):
    folder, _, _ = whole_run
    records, seeds = records_in(folder), {task.instruction for task in read_seeds(SEEDS)}
    made = [{one["instruction"] for one in record["candidates"] if one["dropped"] is None} for record in records]
    assert len(records) >= 8
    for place, record in enumerate(records):
        earlier = set().union(*made[: place // 4 * 4])
        new = [text for text in record["demonstrations"] if text not in seeds]
        assert len(set(record["demonstrations"])) == 8
        assert set(new) <= earlier and len(new) == (0 if place < 4 else 2)
    assert len({tuple(record["demonstrations"]) for record in records}) == len(records)


def test_a_finished_run_goes_on_and_a_changed_one_begins_again(whole_run, tmp_path):
    import shutil

    folder, rows, _ = whole_run
    shutil.copytree(folder, tmp_path / "copy")
    with serving(answer) as server:
        again = run(server.url, tmp_path / "copy")
        assert again.to_list() == rows.to_list() and not server.requests
        more = run(server.url, tmp_path / "copy", 45)
        assert server.requests and len(set(more["task"])) == 45 and more.to_list()[: len(rows)] == rows.to_list()
        run(server.url, tmp_path / "copy", 5, max_similarity=0.5)
    assert len(list((tmp_path / "copy").glob("rounds/*/manifest.json"))) == 2


@pytest.mark.parametrize("place", [3, 20, 60])
def test_killed_at_any_moment_nothing_is_missing_or_there_twice(whole_run, tmp_path, place):
    folder, rows, bodies = whole_run
    assert place < len(bodies)
    child = 0

    def kill(number, path, body):
        if number == place and child:
            os.kill(child, signal.SIGKILL)
        return answer(number, path, body)

    with serving(kill) as server:
        child = os.fork()
        if child == 0:
            try:
                run(server.url, tmp_path)
            finally:
                os._exit(1)  # not reached
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        child = 0
        assert run(server.url, tmp_path).to_list() == rows.to_list()
    assert report_in(tmp_path) == report_in(folder) and records_in(tmp_path) == records_in(folder)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_chat_rows_and_a_run_that_ends_early(tmp_path, caplog):
    with serving(answer) as server:
        rows = run(server.url, tmp_path, 500, style="chat", max_rounds=2, num_generated_demonstrations=0)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    row = rows[0]
    assert [m["role"] for m in (*row["prompt"], *row["completion"])] == ["user", "assistant"]
    assert row["prompt"][0]["content"].startswith(row["instruction"])
    assert row["completion"][0]["content"] == row["output"] and 5 < report_in(tmp_path)["tasks"] < 64
    assert "2 rounds (max_rounds) gave" in caplog.text


def test_without_classifications_the_kind_is_not_asked(tmp_path):
    rows = [json.loads(line) for line in SEEDS.open()]
    plain = [row for row in rows if not row["is_classification"]]
    with serving(answer) as server:
        options = {"server_base_url": server.url}
        made = self_instruct("served", plain, tmp_path, 5, backend="openai", backend_kwargs=options)
    assert not any(made["is_classification"]) and not any("Fixed" in body["prompt"] for body in server.bodies)


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_sft_trains_on_the_rows(tiny, tmp_path, style):
    with serving(answer) as server:
        rows = run(server.url, tmp_path / "tasks", 8, style=style)
    config = SFTConfig(
        tmp_path / "sft", max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(tiny, args=config, train_dataset=rows.select_columns(["prompt", "completion"]))
    before = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.get_input_embeddings().weight)
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
    shown = trainer.processing_class.decode(labels[labels >= 0], skip_special_tokens=True)
    assert rows[0]["output"] in shown and rows[0]["instruction"] not in shown


def two_runs_on_wandb(folder):
    """Run in a process of its own (`run_offline_wandb`)."""
    with serving(answer) as server:
        run(server.url, folder / "one", 4, report_to="wandb")
        mine = wandb.init()
        run(server.url, folder / "two", 4, report_to="wandb")
        return {"open": wandb.run is mine, "kept": mine.summary["self_instruct/kept"]}


@pytest.mark.slow
def test_counts_go_to_wandb(tmp_path):
    told = run_offline_wandb(two_runs_on_wandb, tmp_path, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert told == {"open": True, "kept": report["kept"]}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/self_instruct/tasks_table*.json"))


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([], "There are no seed tasks"),
        (
            [{"instruction": f"Do {n}", "output": "x"} for n in range(7)],
            "There are 7 seed tasks, and each prompt shows 8",
        ),
        ([{"instruction": "Do", "output": None}], "seed data, row 0, column 'output'"),
        ([{"instruction": "Do", "output": "x", "is_classification": "no"}], "column 'is_classification'"),
        ([{"instruction": "Do", "output": "x"}] * 2, "row 1, column 'instruction'"),
    ],
)
def test_wrong_seeds(seeds, said, tmp_path):
    with pytest.raises((ValueError, DataError), match=said):
        self_instruct("none", seeds, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_tasks": 0}, "num_tasks=0; needed: 1"),
        ({"style": "base"}, "style='base'; needed: one of completion, chat"),
        ({"max_similarity": 0.0}, "max_similarity=0.0"),
        ({"min_words": 9, "max_words": 8}, "min_words <= max_words"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path):
    with pytest.raises((ValueError, TypeError), match=said):
        self_instruct("none", SEEDS, tmp_path, **arguments)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        self_instruct("none", SEEDS, tmp_path)


def test_templates_of_the_user(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no template"):
        read_templates("chat", folder)
    (folder / "instruction.jinja").write_text("New tasks, please.")
    with pytest.raises(ValueError, match="does not use the field 'demonstrations'"):
        read_templates("chat", folder)
    (folder / "instruction.jinja").write_text("Tasks like {{ demonstrations[0] }}:\n1.")
    assert read_templates("chat", folder)["instruction"].render(demonstrations=["this"]) == "Tasks like this:\n1."
    (folder / "input.jinja").write_text("")
    with pytest.raises(ValueError, match="holds input.jinja; needed: some of instruction.jinja"):
        read_templates("chat", folder)


def test_without_rapidfuzz_nothing_begins(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidfuzz" else real(name))
    with pytest.raises(ImportError, match=r"trl-ext\[self-instruct\]"):
        self_instruct("none", SEEDS, tmp_path)


# ------------------------------------------------------------------------------------------------------------- command
def test_the_command_with_a_model_in_this_process(tiny, tmp_path, capsys):
    arguments = ["self-instruct", "--model_name_or_path", tiny, "--seed_tasks", str(SEEDS), "--num_tasks", "2"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_rounds", "1", "--prompts_per_round", "2"]
    arguments += ["--max_completion_length", "12", "--num_other_examples", "1", "--num_classification_examples", "1"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == 2 and report["path"].endswith("tasks.jsonl") and report["tasks"] == 0
    manifest = json.loads(next((tmp_path / "out").glob("rounds/*/manifest.json")).read_text())
    assert manifest["sampling"]["temperature"] == 0.7 and manifest["sampling"]["top_p"] == 0.5
    assert main([*arguments, "--num_seed_demonstrations", "99"]) == 1
    assert "32 seed tasks, and each prompt shows 101" in capsys.readouterr().err


def test_the_configs_are_parsed():
    paths = sorted((SEEDS.parents[3] / "configs" / "self_instruct").glob("*.yaml"))
    assert len(paths) == 2
    for path in paths:
        (args,) = parse(make_parser(), ["--config", str(path)])
        assert f"--config configs/self_instruct/{path.name}" in path.read_text() and args.num_tasks >= 1000
        assert SEEDS.samefile(SEEDS.parents[3] / args.seed_tasks)


def test_the_example_says_what_was_dropped(monkeypatch, capsys):
    import runpy

    path = SEEDS.parents[3] / "examples" / "self_instruct.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    assert " instructions, 0 kept, dropped: {" in capsys.readouterr().out
