"""best_of_n on a tiny model: picks, ties, votes, columns, chats, and what is refused; answers read off texts."""

import json
import linecache
import math

import pandas as pd
import pytest
from datasets import Dataset

from tests.pipelines.http_server import good, serving
from trl_ext import best_of_n
from trl_ext.cli.main import main
from trl_ext.data.validation import DataError
from trl_ext.demo.model import tiny_reward_base
from trl_ext.pipelines.best_of_n import Best, Picker
from trl_ext.pipelines.generation.records import Completion
from trl_ext.pipelines.reward_functions import RewardError


SAMPLING = dict(max_completion_length=6, backend_kwargs={"generation_batch_size": 256})
PROMPTS = ["one:", "a longer prompt, two:", "3:"]


def length(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


def nothing(prompts, completions, **kwargs):
    return [None] * len(completions)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_reward_base(tmp_path_factory.mktemp("base"), hidden_size=32)


def test_picks_have_the_highest_score_and_the_order_of_the_prompts(base):
    picks = best_of_n(base, length, PROMPTS, n=5, return_candidates=True, **SAMPLING)
    assert [pick.prompt for pick in picks] == PROMPTS
    for pick in picks:
        scores = [sample.score for sample in pick.candidates]
        assert len(scores) == 5 and pick.score == max(scores) == len(pick.completion)
        assert pick.sample_index == scores.index(max(scores))  # of equals the first
        assert pick.completion == pick.candidates[pick.sample_index].completion
    again = best_of_n(base, length, PROMPTS, n=5, **SAMPLING)
    assert [pick.completion for pick in again] == [pick.completion for pick in picks]
    assert again[0].candidates is None
    other = best_of_n(base, length, PROMPTS, n=5, seed=1, return_candidates=True, **SAMPLING)
    assert [s.completion for s in other[0].candidates] != [s.completion for s in picks[0].candidates]


def test_rewards_are_weighted_and_get_the_columns(base):
    seen = []

    def wanted(prompts, completions, target, **kwargs):
        seen.extend(target)
        return [-abs(len(text) - size) for text, size in zip(completions, target, strict=True)]

    rows = Dataset.from_list(
        [{"prompt": prompt, "target": size} for prompt, size in zip(PROMPTS, (2, 3, 4), strict=True)]
    )
    picks = best_of_n(
        base,
        [wanted, length],
        Dataset.from_list(rows),
        n=4,
        reward_weights=[2.0, 0.5],
        return_candidates=True,
        **SAMPLING,
    )
    assert seen == [2] * 4 + [3] * 4 + [4] * 4
    for sample in picks[1].candidates:
        assert sample.score == 2 * sample.scores["wanted"] + 0.5 * sample.scores["length"]


def test_chats_give_messages(base):
    def chat_length(prompts, completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    (pick,) = best_of_n(base, chat_length, [[{"role": "user", "content": "hello"}]], n=3, **SAMPLING)
    assert pick.completion[0]["role"] == "assistant" and pick.score == len(pick.completion[0]["content"])


def test_without_a_score_the_first_is_given_and_counted(base, caplog):
    picks = best_of_n(base, nothing, PROMPTS, n=3, **SAMPLING)
    assert [(pick.score, pick.sample_index) for pick in picks] == [(None, 0)] * 3
    assert "3 of 3 prompts have no candidate with a score" in caplog.text


class Texts:
    """A generator that gives the same texts for each prompt."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, num_generations, seed, columns=None):
        return [[Completion(text, None, "stop", None, seed, 0.0) for text in self.texts] for _ in prompts]


def pick_from(base, texts, scores, **kwargs):
    def given(prompts, completions, **_):
        return scores

    picker = Picker(base, given, n=len(texts), **kwargs)
    picker._generator = Texts(texts)
    return picker(["q"])[0]


class TestVotes:
    TEXTS = ["so 4", "it is 5", "no idea", "5, I say", "4"]
    SCORES = [2.0, -1.0, 9.0, -2.0, 1.0]

    def test_majority_takes_the_best_scored_of_the_winning_answer(self, base):
        pick = pick_from(base, self.TEXTS, self.SCORES, vote="majority", answers="number")
        assert (pick.answer, pick.completion, pick.score) == (4.0, "so 4", 2.0)
        pick = pick_from(base, self.TEXTS, [-3.0, 1.0, 0.0, 0.5, -4.0], vote="majority", answers="number")
        assert (pick.answer, pick.completion) == (4.0, "so 4")  # a tie goes to the answer given first
        pick = pick_from(base, self.TEXTS, [None] * 5, vote="majority", answers="number")
        assert (pick.answer, pick.score, pick.sample_index) == (4.0, None, 0)

    def test_weighted_and_softmax(self, base):
        pick = pick_from(base, self.TEXTS, [0.1, 0.4, 0.9, 0.3, 0.2], vote="weighted", answers="number")
        assert (pick.answer, pick.completion) == (5.0, "it is 5")
        pick = pick_from(base, self.TEXTS, self.SCORES, vote="softmax", answers="number")
        assert pick.answer == 4.0 and math.exp(2) + math.exp(1) > math.exp(-1) + math.exp(-2)
        with pytest.raises(ValueError, match="the weight -1.0 is negative"):
            pick_from(base, self.TEXTS, self.SCORES, vote="weighted", answers="number")

    def test_nobody_answers(self, base):
        pick = pick_from(base, ["no", "none"], [0.0, 1.0], vote="majority", answers="number")
        assert pick == Best("q", "none", 1.0, 1)

    def test_a_function_reads_answers(self, base):
        pick = pick_from(base, self.TEXTS, self.SCORES, vote="majority", answers=lambda texts: ["x"] * len(texts))
        assert (pick.answer, pick.completion) == ("x", "no idea")


def test_a_begun_answer_and_its_continuation_are_one_turn(base):
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}]
    seen = []

    def notes(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    (pick,) = best_of_n(base, notes, [begun], n=2, return_candidates=True, **SAMPLING)
    assert pick.prompt == begun[:1]
    for sample in pick.candidates:
        (message,) = sample.completion
        assert message["role"] == "assistant" and message["content"].startswith("good") and len(message["content"]) > 4
    assert all(prompt == begun[:1] for prompt, _ in seen)
    with pytest.raises(DataError, match="an assistant message alone"):
        best_of_n(base, notes, [begun[1:]], n=2, **SAMPLING)


def test_tuples_series_and_what_is_no_list_of_prompts(base):
    picks = best_of_n(base, (length, nothing), tuple(PROMPTS), n=2, reward_weights=(1.0, 3.0), **SAMPLING)
    series = pd.Series(PROMPTS, index=[2, 0, 1])
    assert picks == best_of_n(base, [length, nothing], series, n=2, **SAMPLING)
    assert [pick.prompt for pick in picks] == PROMPTS
    for wrong in ("one text", {"prompt": PROMPTS}, pd.DataFrame({"prompt": PROMPTS})):
        with pytest.raises(ValueError, match="prompts is a .*; needed: a list"):
            best_of_n(base, length, wrong, n=2, **SAMPLING)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n": 0}, ValueError, "n=0"),
        ({"temperature": 0.0}, ValueError, "temperature=0 gives the same completion 4 times"),
        ({"vote": "mean"}, ValueError, "vote='mean'"),
        ({"answers": "words"}, ValueError, "answers='words'"),
        ({"reward_funcs": []}, ValueError, "no reward function"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 numbers; needed: 1"),
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": [""]}, DataError, "empty prompt"),
        ({"prompts": [{"question": "x"}]}, DataError, "a column 'prompt'"),
        ({"max_new_tokens": 4}, TypeError, "Unknown sampling argument 'max_new_tokens'"),
        ({"reward_funcs": lambda prompts, completions, **_: [1.0]}, RewardError, "gave 1 scores for 4"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(base, kwargs, error, message):
    arguments = {"model": base, "reward_funcs": length, "prompts": ["x"], "n": 4, **SAMPLING, **kwargs}
    with pytest.raises(error, match=message):
        best_of_n(**arguments)


def test_command_writes_in_order_and_goes_on(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "tests_rewards.py").write_text(
        "def length(prompts, completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_ext.cli.best_of_n.CHUNK_ROWS", 2)
    # U+2028 ends a line for Python's `splitlines`, not in JSON lines
    rows = [{"prompt": f"{number}:", "id": number, "note": "one\u2028text"} for number in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    arguments = ["best-of-n", "--model_name_or_path", str(base), "--reward_funcs", "tests_rewards.length"]
    arguments += ["--input", "in.jsonl", "--n", "3", "--max_completion_length", "5", "--output"]
    assert main([*arguments, "whole.jsonl", "--return_candidates"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    whole = (tmp_path / "whole.jsonl").read_bytes()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in found] == list(range(5))
    assert all(row["score"] == max(item["score"] for item in row["candidates"]) for row in found)

    # killed in the middle of the fourth line: the second chunk is made again
    (tmp_path / "whole.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + whole.splitlines()[3][:20])
    assert main([*arguments, "whole.jsonl", "--return_candidates"]) == 0
    assert json.loads(capsys.readouterr().out)["earlier"] == 2
    assert (tmp_path / "whole.jsonl").read_bytes() == whole
    assert main([*arguments, "whole.jsonl"]) == 1
    assert "other settings (return_candidates=" in capsys.readouterr().err
    # as many rows as there are whole chunks, and fewer than there are lines: nothing of them is cut off
    (tmp_path / "in.jsonl").write_text("\n".join(lines.split("\n")[:4]), encoding="utf-8")
    assert main([*arguments, "whole.jsonl", "--return_candidates"]) == 1
    assert "has 5 rows, and the input 4" in capsys.readouterr().err
    assert (tmp_path / "whole.jsonl").read_bytes() == whole
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(lines.replace('"id": 1', '"id": 7'), encoding="utf-8")
    assert main([*arguments, "whole.jsonl", "--return_candidates"]) == 1
    assert "line 2: this row is not line 2 of" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(lines.replace('"id"', '"candidates"'), encoding="utf-8")
    assert main([*arguments, "other.jsonl", "--return_candidates"]) == 1
    assert "row 1 has a column 'candidates'" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    rewards = (tmp_path / "tests_rewards.py").read_text()
    (tmp_path / "tests_rewards.py").write_text(rewards.replace("len(text)", "-len(text)"))
    linecache.clearcache()
    assert main([*arguments, "whole.jsonl", "--return_candidates"]) == 1
    assert "other settings (rewards=" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "note": "half a pair: \\ud83d"}\n')
    assert main([*arguments, "half.jsonl"]) == 0
    assert json.loads((tmp_path / "half.jsonl").read_text())["note"] == "half a pair: \ud83d"
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\nno\n')
    assert main([*arguments, "other.jsonl"]) == 1
    assert "line 2 is not valid JSON" in capsys.readouterr().err


ENSEMBLE = """
import threading
from trl_ext import RewardEnsemble

def length(completions, **columns):
    return [float(len(text)) for text in completions]

lock = threading.Lock()

def locked(completions, **columns):
    with lock:
        return length(completions)

ens = RewardEnsemble([length])
"""


def test_scores_of_an_ensemble_are_not_taken_for_those_of_another(base, tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "own.py").write_text(ENSEMBLE)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    arguments = ["best-of-n", "--model_name_or_path", str(base), "--input", "in.jsonl", "--n", "2"]
    arguments += ["--max_completion_length", "5"]
    ensemble = [*arguments, "--output", "ensemble.jsonl", "--reward_funcs", "own.py:ens"]
    assert main(ensemble) == 0
    assert "RewardEnsemble is an ensemble in memory" in caplog.text or "ens is an ensemble in memory" in caplog.text
    assert main(ensemble) == 1
    assert "other settings (rewards=" in capsys.readouterr().err
    locked = [*arguments, "--output", "locked.jsonl", "--reward_funcs", "own.py:locked"]
    assert main(locked) == 0 and "used again" not in caplog.text
    assert main(locked) == 0
    assert "The scores of locked in locked.jsonl are used again. The function reads lock (_thread.lock)" in caplog.text


def test_a_vote_without_its_package_fails_at_once_and_blocks_nothing(
    base, tmp_path, without_math_verify, monkeypatch, capsys
):
    (tmp_path / "tests_rewards.py").write_text(
        "def length(prompts, completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "1"}]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": begun}) + "\n")
    arguments = ["best-of-n", "--model_name_or_path", str(base), "--reward_funcs", "tests_rewards.py:length"]
    arguments += ["--input", "in.jsonl", "--n", "3", "--max_completion_length", "5", "--output", "out.jsonl"]
    assert main([*arguments, "--vote", "majority"]) == 1
    assert "--answers number" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
    for earlier in (0, 1):  # the second time nothing is left to do
        assert main([*arguments, "--vote", "majority", "--answers", "number"]) == 0
        assert json.loads(capsys.readouterr().out)["earlier"] == earlier
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["prompt"] == begun[:1] and row["completion"][0]["content"].startswith("1") and "answer" in row


def test_every_way_to_sample_reaches_the_server(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests_rewards.py").write_text(
        "def length(prompts, completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "2+2="}\n')
    (tmp_path / "few.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.1}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    arguments += ["--stop", ";", "--generation_kwargs", '{"logit_bias": {"3": 1}}', "--few_shot", "few.jsonl"]
    arguments += ["--max_completion_length", "5", "--input", "in.jsonl", "--output", "out.jsonl", "--n", "2"]
    with serving(good()) as server:
        arguments += ["--backend", "openai", "--server_base_url", server.url, "--server_timeout", "9"]
        arguments += ["--max_concurrency", "1", "--max_retries", "0", "--api_key_variable", "HOME"]
        arguments += ["--model_name_or_path", "served", "--reward_funcs", "tests_rewards.length"]
        assert main(["best-of-n", *arguments]) == 0
        for text, words in (('{"prompt": "", "completion": "3"}', "(few_shot="), ("nope", "few.jsonl, line 1 is no")):
            (tmp_path / "few.jsonl").write_text(f"{text}\n")  # the same name, other examples
            assert main(["best-of-n", *arguments]) == 1
            assert words in capsys.readouterr().err
    expected = given | {"stop": [";"], "logit_bias": {"3": 1}, "max_tokens": 5, "prompt": "1+1=2\n\n2+2="}
    for body in server.bodies:
        assert expected.items() <= body.items()
    assert len(server.bodies) == 2 and server.most_at_once == 1
    assert all("Authorization" in headers for *_, headers in server.requests)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["best-of-n", "--model_name_or_path", "m", "--input", "in.jsonl", "--output", "other.jsonl"])
    assert "best-of-n needs --reward_funcs" in capsys.readouterr().err
