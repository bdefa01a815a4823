"""Rows in, labelled rows out: what is left out is counted, agreement is measured, and nothing is asked twice."""

import functools
import json
import math
import os
import signal
import threading
import time

import pytest
import wandb
from datasets import Dataset, IterableDataset

from tests.pipelines.feedback.rigged import biased_judge, shown_texts
from tests.pipelines.http_server import serving
from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from trl_ext import RewardConfig, RewardTrainer, label_preferences
from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.judge import JudgeError
from trl_ext.pipelines.feedback.judge_labels import judge_rows
from trl_ext.pipelines.feedback.judge_reward import JudgeReward
from trl_ext.pipelines.generation.generator import GenerationError, LabelError


quick = functools.partial(label_preferences, resamples=20)


def good_words(text):
    return float(sum(text.count(word) for word in ("good", "clear", "correct", "kind")))


def logistic(value):
    return 1 / (1 + math.exp(-value))


FAIR = biased_judge(good_words, 0.0)
LEANS = biased_judge(good_words, 2.5)


def test_pairs_get_the_judge_s_probability_and_keep_their_texts():
    rows = pair_rows(40, chat=True)
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n % 2 else row for n, row in enumerate(rows)
    ]
    found = quick(LEANS, swapped)
    assert found.column_names == ["prompt", "chosen", "rejected", "preference_probability", "position_bias", "row"]
    for row, label in zip(rows, found, strict=True):
        gap = good_words(row["chosen"][0]["content"]) - good_words(row["rejected"][0]["content"])
        assert {name: label[name] for name in ("prompt", "chosen", "rejected")} == row
        assert label["preference_probability"] == pytest.approx(logistic(gap))
        when = (logistic(gap + 2.5), logistic(gap - 2.5))
        assert label["position_bias"] == pytest.approx((when[0] - when[1]) / 2)


def test_a_planted_position_bias_is_measured_and_removed_by_both_orders():
    rows = pair_rows(60)
    both, one = (judge_rows(LEANS, rows, orders=orders, resamples=200).report for orders in ("both", "one"))
    assert both.metrics["accuracy"] == both.metrics["kappa"] == 1.0
    assert both.metrics["position_bias"] == pytest.approx(both.metrics["position_bias_size"]) and "ece" in both.metrics
    assert both.metrics["position_bias"] > 0.2 > 0.0 < both.intervals["position_bias"][0]
    assert both.metrics["accuracy_one_order"] < 0.8 and both.metrics["consistent"] < 0.5
    assert one.metrics["accuracy"] == pytest.approx(both.metrics["accuracy_one_order"], abs=0.15)
    assert "position_bias" not in one.metrics and one.answers == {"asked": 60, "reused": 0}


@pytest.mark.parametrize(
    ("columns", "known"),
    [
        ({"preference_probability": 0.1}, True),
        ({"preference_probability": 0.5}, False),
    ],
)
def test_people_may_say_that_the_rejected_one_is_better(columns, known):
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"], **columns} for row in pair_rows(10)]
    metrics = judge_rows(FAIR, rows, resamples=20).report.metrics
    assert metrics.get("accuracy") == (1.0 if known else None)


def test_an_error_names_the_column_that_a_ranked_row_has():
    row = {"prompt": "q", "completions": ["a", [{"role": "assistant", "content": "b"}]], "ratings": [1.0, 0.0]}
    with pytest.raises(DataError) as caught:
        quick(FAIR, [row])
    assert caught.value.column == "completions"


def test_a_reward_model_trains_on_the_rows_as_they_are(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    for name, rows, mode in (("pairs", pair_rows(8), "compare"), ("ranked", ranked_rows(8, k=3), "score")):
        judge = FAIR if mode == "compare" else lambda chats: [{"3": 0.5, "4": 0.5, "1": 0.1} for _ in chats]
        found = quick(judge, rows, tmp_path / name, mode=mode)
        loss = "bradley_terry" if mode == "compare" else "plackett_luce"
        args = RewardConfig(
            output_dir=str(tmp_path / f"{name}-model"),
            loss_type=loss,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = RewardTrainer(str(base), args, train_dataset=found)
        assert len(trainer.train_dataset) == 8
        assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("mode", ["rank", "list", "score"])
def test_rankings_get_ratings(mode):
    def judge(chats):
        if mode == "rank":
            return FAIR(chats)
        if mode == "score":
            return [{str(1 + int(good_words(shown_texts(chat)[0]))): 1.0} for chat in chats]
        texts = [shown_texts(chat) for chat in chats]
        orders = [sorted(range(len(one)), key=lambda place: -good_words(one[place])) for one in texts]
        return [" > ".join("ABCDE"[place] for place in order) for order in orders]

    rows = ranked_rows(10, k=4, ragged=True)
    judged = judge_rows(judge, rows, mode=mode, resamples=200)
    assert judged.dataset.column_names == ["prompt", "completions", "ratings", "row"]
    for row, label in zip(rows, judged.dataset, strict=True):
        assert label["completions"] == row["completions"] and len(label["ratings"]) == len(row["ratings"])
        order = sorted(range(len(row["ratings"])), key=row["ratings"].__getitem__)
        assert order == sorted(range(len(order)), key=label["ratings"].__getitem__)
        if mode == "score":
            assert label["ratings"] == pytest.approx([1 + rating for rating in row["ratings"]], abs=1e-4)
    assert judged.report.metrics["accuracy"] == 1.0 and ("ece" in judged.report.metrics) == (mode == "rank")


def test_what_cannot_be_labelled_is_counted(tmp_path):
    rows = [
        {"prompt": "a", "completions": ["x", "good"]},
        {"prompt": "b", "completions": ["alone"]},
        {"prompt": "c", "completions": ["x", "  "]},
        {"prompt": "d", "completions": ["same", "same"]},
        {"prompt": "e", "completions": ["silent", "good"]},
        {"prompt": "f", "completions": ["y", "z"]},
    ]

    def judge(chats):
        return [
            None if "silent" in chat[-1]["content"] else answer
            for chat, answer in zip(chats, FAIR(chats), strict=True)
        ]

    judged = judge_rows(judge, rows, tmp_path)
    reasons = {"one_completion": 1, "empty_completion": 1, "identical_completions": 1, "no_label": 1}
    assert judged.report.left_out == reasons and judged.report.failed == {"the answer has no label": 2}
    assert judged.dataset["row"][:] == [0, 5] and judged.report.ties == 1
    assert judged.dataset["preference_probability"][1] == 0.5
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["left_out"] == reasons and stored["kept"] == 2
    fewer = judge_rows(judge, rows, tmp_path, ties="drop")
    assert fewer.report.left_out["ties"] == 1 and fewer.report.answers["asked"] == 0
    surer = judge_rows(judge, rows, tmp_path, min_confidence=0.9, ties="keep", tie_band=0.01)
    assert surer.report.left_out["below_min_confidence"] == 1 and surer.dataset["row"][:] == [5]


def test_ratings_that_hardly_differ_are_ties():
    rows = [{"prompt": "a", "completions": ["3", "4", "4"]}, {"prompt": "b", "completions": ["1", "5", "2"]}]
    grade = lambda chats: [shown_texts(chat)[0] for chat in chats]  # noqa: E731
    kept, dropped = (judge_rows(grade, rows, mode="score", tie_band=1.0, ties=ties) for ties in ("keep", "drop"))
    assert kept.dataset["ratings"][0] == pytest.approx([11 / 3] * 3) and kept.report.ties == 1
    assert dropped.dataset["row"][:] == [1] and dropped.report.left_out == {"ties": 1}


@pytest.mark.parametrize(
    ("rows", "settings", "error", "words"),
    [
        ([], {}, DataError, "no row"),
        ("pairs.jsonl", {}, TypeError, "a list of rows"),
        (pair_rows(1) + [3], {}, DataError, "row 1: found int 3"),
        (pair_rows(2), {"max_rows": 0}, ValueError, "1 or more"),
        (pair_rows(2), {"min_confidence": 0.4}, ValueError, "0.5"),
        (pair_rows(2), {"tie_band": 0.5}, ValueError, "below 0.5"),
        (pair_rows(2), {"ties": "maybe"}, ValueError, "'keep' or 'drop'"),
        (pair_rows(2), {"mode": "rank", "min_confidence": 0.9}, ValueError, "tie_band"),
        (ranked_rows(2, k=3), {}, DataError, "mode='rank'"),
        (ranked_rows(2, k=3), {"mode": "list", "labels": ["A", "B"]}, DataError, "at most 2 labels"),
        ([{"prompt": "a", "completion": "b", "label": True}], {}, DataError, "outcome rows"),
        ([{"prompt": "a", "text": "b"}], {}, DataError, "columns"),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], {}, DataError, "row 0, column 'rejected'"),
        ([{"prompt": "a", "completions": ["b"]}] * 3, {}, JudgeError, "3 one completion"),
    ],
)
def test_bad_input_is_refused(rows, settings, error, words):
    with pytest.raises(error, match=words):
        quick(FAIR, rows, **settings)


def test_a_judge_must_be_a_model_or_a_function():
    with pytest.raises(TypeError, match="a int; needed"):
        quick(3, pair_rows(2))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="label-preferences runs in one process"):
        quick(FAIR, pair_rows(2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_streams_and_data_sets_give_the_same(tmp_path):
    rows = pair_rows(5)
    plain = quick(FAIR, rows).to_list()
    assert quick(FAIR, Dataset.from_list(rows)).to_list() == plain
    assert quick(FAIR, IterableDataset.from_generator(lambda: iter(rows))).to_list() == plain


def test_only_new_questions_are_asked(tmp_path):
    calls = []

    def judge(chats):
        calls.extend(chat[0]["content"] for chat in chats)
        return FAIR(chats)

    rows = pair_rows(6)
    first = quick(judge, rows[:4], tmp_path)
    assert len(calls) == 8
    again = judge_rows(judge, rows, tmp_path)
    assert len(calls) == len(set(calls)) == 12 and again.report.answers == {"asked": 4, "reused": 8}
    assert again.dataset.to_list()[:4] == first.to_list()
    quick(judge, rows, tmp_path, criteria="Is it short?")
    assert len(calls) == len(set(calls)) == 24  # another question
    quick(judge, rows, tmp_path, system_prompt="Be strict.")
    assert len(calls) == 36  # the same questions to another judge


def test_what_a_function_reads_and_no_key_can_see_is_said(tmp_path, caplog):
    lock = threading.Lock()

    def judge(chats):
        with lock:
            return FAIR(chats)

    quick(judge, pair_rows(2), tmp_path)
    assert "lock" not in caplog.text
    quick(judge, pair_rows(2), tmp_path)
    assert "lock (_thread.lock), whose content cannot be compared" in caplog.text


def test_numbers_and_tables_go_to_the_run_that_is_open(monkeypatch):
    logged = {}
    run = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    report = judge_rows(LEANS, pair_rows(4), resamples=20).report
    monkeypatch.setattr(wandb, "run", None)
    report.log_to_wandb()
    assert not logged
    monkeypatch.setattr(wandb, "run", run)
    report.log_to_wandb()
    assert logged["judge/position_bias"] == report.metrics["position_bias"]
    assert [row[0] for row in logged["judge/metrics"].data] == list(report.metrics)
    assert [row[0] for row in logged["judge/rows"].data] == [0, 1, 2, 3]


# Servers


def chat_answer(logprobs, text="A"):
    top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    content = [{"token": text, "logprob": 0.0, "top_logprobs": top}]
    return {"choices": [{"message": {"content": text}, "finish_reason": "length", "logprobs": {"content": content}}]}


def judging(number, path, body):
    """Answers as FAIR does, with the label tokens spelled in two ways."""
    (answer,) = FAIR([body["messages"]])
    logs = {"A": math.log(answer["A"] / 2), " A": math.log(answer["A"] / 2), "B": math.log(answer["B"]), "C": -9.0}
    return 200, chat_answer(logs), {}


def test_a_server_gives_its_likeliest_tokens():
    rows = pair_rows(12)
    with serving(judging) as server:
        found = quick("m", rows, backend="openai", server_base_url=server.url, max_concurrency=3)
    assert found["preference_probability"][:] == pytest.approx(quick(FAIR, rows)["preference_probability"][:])
    assert server.most_at_once <= 3 and len(server.bodies) == 24
    body = server.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    assert {path for path, *_ in server.requests} == {"/v1/chat/completions"}


def test_a_label_below_the_likeliest_tokens_gets_their_bound():
    answers = {"A": math.log(0.9), "C": math.log(0.05), "D": math.log(0.01)}
    with serving(lambda *request: (200, chat_answer(answers), {})) as server:
        judged = judge_rows("m", pair_rows(1), backend="openai", server_base_url=server.url)
    assert judged.report.metrics["position_bias"] == pytest.approx(0.9 / 0.91 - 0.5)
    with (
        serving(lambda *request: (200, chat_answer({"C": -1.0}), {})) as server,
        pytest.raises(JudgeError, match="likeliest"),
    ):
        quick("m", pair_rows(20), backend="openai", server_base_url=server.url)


def test_a_label_of_several_tokens_on_a_server_is_refused():
    answers = {"cert": math.log(0.4), "B": math.log(0.3)}
    with serving(lambda *request: (200, chat_answer(answers), {})) as server:
        where = {"backend": "openai", "server_base_url": server.url}
        with pytest.raises(LabelError, match="'certainly' is not a single token.*'cert'"):
            quick("m", pair_rows(1), labels=["certainly", "B"], **where)


def test_a_server_without_log_probabilities_is_said_with_the_cure(tmp_path):
    plain = {"choices": [{"message": {"content": "Answer: A"}, "finish_reason": "stop"}]}
    with serving(lambda *request: (200, plain, {})) as server:
        where = {"backend": "openai", "server_base_url": server.url}
        with pytest.raises(GenerationError, match="read='share'"):
            quick("m", pair_rows(2), tmp_path, **where)
        judged = judge_rows("m", pair_rows(2), tmp_path, read="share", **where)
    assert judged.report.metrics["position_bias"] == 0.5 and judged.report.ties == 2


def test_a_server_that_fails_for_a_moment_is_asked_again(short_pauses):
    def answer(number, path, body):
        return (503, {}, {}) if number % 3 == 0 else judging(number, path, body)

    with serving(answer) as server:
        found = quick("m", pair_rows(4), backend="openai", server_base_url=server.url, max_concurrency=1)
    assert len(found) == 4


def test_a_judge_ends_with_its_first_failure_and_asks_again_when_it_is_called_again():
    with serving(lambda *request: (503, {}, {})) as server:
        judge = JudgeReward(
            "m", mode="rank", backend="openai", server_base_url=server.url, max_concurrency=1, max_retries=0
        )
        prompts, completions = ["a"] * 2 + ["b"] * 2, ["one", "two"] * 2
        with pytest.raises(GenerationError, match="HTTP 503"):
            judge(prompts, completions)
        assert len(server.requests) == 1
        server.answer = judging
        assert None not in judge(prompts, completions)


def test_after_a_kill_nothing_that_was_answered_is_asked_again(tmp_path):
    rows, stuck = pair_rows(10), []

    def answer(number, path, body):
        if number == 7 and not stuck:
            stuck.append(body["messages"])
            time.sleep(60)
        return judging(number, path, body)

    with serving(answer) as server:
        settings = {"backend": "openai", "server_base_url": server.url, "max_concurrency": 1}
        child = os.fork()
        if child == 0:
            quick("m", rows, tmp_path, **settings)
            os._exit(1)
        while not stuck:
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (tmp_path / "preferences.jsonl").exists()
        judged = judge_rows("m", rows, tmp_path, **settings)
    asked = [json.dumps(body["messages"]) for body in server.bodies]
    assert judged.report.answers == {"asked": 13, "reused": 7}
    assert len(asked) == 21 and {one for one in asked if asked.count(one) > 1} == {json.dumps(stuck[0])}
    expected = quick(FAIR, rows)["preference_probability"][:]
    assert judged.dataset["preference_probability"][:] == pytest.approx(expected)
