"""The settings and templates of a judge: what goes together, and what is refused before anything is asked."""

import json
import subprocess
import sys

import pytest

from trl_ext.pipelines.feedback.judge_ratings import read_label, read_order
from trl_ext.pipelines.feedback.judge_settings import JudgeSettings


WHOLE = "{{ prompt }} {% for one in completions %}{{ one.label }}: {{ one.text }} {% endfor %}"


def test_importing_the_settings_imports_nothing_heavy():
    heavy = "{'torch', 'trl', 'transformers', 'datasets'}"
    code = f"import sys, trl_ext.pipelines.feedback.judge_settings; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "compete"}, "compare, rank, list, score"),
        ({"backend": "vlm"}, "transformers, vllm, openai"),
        ({"labels": ["A", "B", "C"]}, "two"),
        ({"labels": ["A", "A"]}, "different"),
        ({"labels": ["A", " B"]}, "without spaces"),
        ({"mode": "score", "labels": ["bad", "good"]}, "values"),
        ({"mode": "score", "labels": ["bad", "good"], "values": [0.0]}, "2 finite numbers"),
        ({"values": [0.0, 1.0]}, "mode='score'"),
        ({"mode": "score", "labels": ["1", "10"], "backend": "openai"}, "backend='vllm'"),
        ({"num_samples": 0}, "1 or more"),
        ({"num_samples": 3}, "reasoning=True"),
        ({"num_samples": 3, "read": "share", "temperature": 0}, "same answer"),
        ({"read": "share", "average": "log_odds"}, "share"),
        ({"mode": "list", "read": "probability"}, "mode='rank'"),
        ({"max_length": 10, "backend": "openai"}, "tokenizer"),
        ({"few_shot": [{"prompt": "x"}]}, "'completions'"),
        ({"few_shot": [{"prompt": "x", "completions": ["a", "b"], "label": "C"}]}, "A, B"),
        ({"top_p": 0.0}, "above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        JudgeSettings.of(**given)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'criteria'"):
        JudgeSettings.of(criterion="short")


@pytest.mark.parametrize(
    ("template", "more", "words"),
    [
        ("Which is better? {{ prompt }} A B", {}, "completions"),
        (WHOLE.replace("{{ prompt }}", ""), {}, "'prompt'"),
        (WHOLE.replace("one.text", "one.label"), {}, "the text of every completion"),
        (WHOLE.replace("{{ one.label }}", ""), {}, "labels"),
        (WHOLE, {"criteria": "short"}, "'criteria'"),
        (WHOLE, {"rubric": "1 is bad"}, "'rubric'"),
        (WHOLE + "{{ answer }}", {}, "'answer'"),
        (WHOLE + "{% endif %}", {}, "not valid Jinja"),
        (WHOLE, {"mode": "score"}, "'completion'"),
    ],
)
def test_a_template_without_its_fields_is_refused(template, more, words):
    with pytest.raises(ValueError, match=words):
        JudgeSettings.of(template=template, **more)


def test_a_template_cannot_run_code():
    with pytest.raises(ValueError, match="cannot be filled in: .*unsafe"):
        JudgeSettings.of(template=WHOLE + "{{ prompt.__class__.__mro__ }}")


def test_a_file_that_is_missing_or_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.jinja"):
        JudgeSettings.of(template=str(tmp_path / "mine.jinja"))
    with pytest.raises(FileNotFoundError, match="no template"):
        JudgeSettings.of(template="which one is better? " * 100)
    with pytest.raises(FileNotFoundError, match="rubric.md"):
        JudgeSettings.of(rubric=str(tmp_path / "rubric.md"))
    (tmp_path / "my rubric.md").write_text("1 is bad.\n")
    assert JudgeSettings.of(rubric=str(tmp_path / "my rubric.md")).rubric == "1 is bad."
    assert JudgeSettings.of(rubric="1 is bad.\nSee notes.md").rubric.endswith("notes.md")
    assert JudgeSettings.of(rubric="1 is bad. " * 100).rubric.startswith("1 is bad.")
    (tmp_path / "shots.jsonl").write_text("{")
    with pytest.raises(ValueError, match="shots.jsonl is not a JSONL file"):
        JudgeSettings.of(few_shot=str(tmp_path / "shots.jsonl"))


@pytest.mark.parametrize("mode", ["compare", "rank", "list", "score"])
@pytest.mark.parametrize("reasoning", [False, True])
def test_every_slot_is_in_the_question(mode, reasoning, tmp_path):
    example = {"prompt": "asked", "completions": ["one", "two"], "completion": "three", "reasoning": "because"}
    example["label"] = {"score": "4", "list": "B > A"}.get(mode, "B")
    (tmp_path / "shots.jsonl").write_text(json.dumps(example) + "\n")
    (tmp_path / "rubric.txt").write_text("RUBRIC\n")
    settings = JudgeSettings.of(
        mode=mode,
        reasoning=reasoning,
        criteria="CRITERIA",
        rubric=str(tmp_path / "rubric.txt"),
        few_shot=str(tmp_path / "shots.jsonl"),
    )
    texts = ["first text", "second text"][: 1 + settings.shows_several]
    question = settings.render("the request {{ 1 + 1 }}", texts, settings.labels_of(len(texts)))
    for part in ("CRITERIA", "RUBRIC", "asked", "because", "the request {{ 1 + 1 }}", *texts):
        assert part in question
    assert ("Answer: " in question) == reasoning
    assert question == question.strip()


def test_the_examples_of_a_list_have_the_labels_of_the_judge():
    example = {"prompt": "asked", "completions": ["one", "two", "three"], "label": "2 > 1 > 3"}
    settings = JudgeSettings.of(mode="list", labels=["1", "2", "3", "4"], few_shot=[example])
    shown = settings.render("p", ["x", "y"], settings.labels_of(2))
    assert [line for line in shown.split("\n") if "Example: answer" in line] == [
        f"### Example: answer {label}" for label in "123"
    ]
    assert "all of 1, 2 from best" in shown


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A", 0),
        (" **B**.", 1),
        ("A is short. Answer: B", 1),
        ("Answer: A? No. answer: (B)", 1),
        ("Answer:\n\nA\n", 0),
        ("I prefer A.", None),
        ("Answer: Abba", None),
        ("", None),
    ],
)
def test_labels_are_read_from_texts(text, label):
    assert read_label(text, ["A", "B"], "Answer:") == label


def test_a_label_that_begins_another_is_not_confused():
    assert read_label("Answer: 10", ["1", "10"], "Answer:") == 1
    assert read_label("Answer: 1", ["1", "10"], "Answer:") == 0


@pytest.mark.parametrize("text", ["-1", "4.5", "1.8", "3,5", ".5", "−2", "12"])
def test_a_part_of_a_number_is_no_label(text):
    grades = ["1", "2", "3", "4", "5"]
    assert read_label(text, grades, "Answer:") is None
    assert read_label(f"Answer: {text}", grades, "Answer:") is None
    assert read_label(f"Answer: {text}. Answer:\n- **4**.", grades, "Answer:") == 3
    assert read_label("Answer: -1", ["1", "0", "-1"], "Answer:") == read_label("-1", ["1", "0", "-1"], None) == 2
    assert read_label("Answer: -B", ["A", "B"], "Answer:") == 1


@pytest.mark.parametrize(
    ("text", "order"),
    [("C > A > B", [2, 0, 1]), ("A, B. Answer: B>C>A", [1, 2, 0]), ("A > B", None), ("A > B > B", None)],
)
def test_orders_are_read_from_texts(text, order):
    assert read_order(text, ["A", "B", "C"], "Answer:") == order
