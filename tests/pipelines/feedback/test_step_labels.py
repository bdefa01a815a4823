"""`label_steps` on a policy whose chance of a right answer is known after every prefix."""

import json
import os
import random
import re
import signal
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb

from tests.pipelines.feedback.lines_policy import AFTER_A_LINE, AT_THE_START, ones, save_lines_policy
from tests.pipelines.http_server import serving
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext import PRMConfig, PRMTrainer, label_steps
from trl_ext.cli.label_steps import LabelStepsArguments, make_parser
from trl_ext.cli.main import main
from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.step_labels import label_steps_with_report
from trl_ext.pipelines.reward_functions import RewardError


ROOT = Path(__file__).resolve().parents[3]
QUICK = {"max_completion_length": 24, "generation_batch_size": 512}
PROMPTS = [{"prompt": f"{number}:"} for number in range(12)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_lines_policy(tmp_path_factory.mktemp("lines"))


def solutions(number: int, seed: int = 0) -> list[dict]:
    """Wrong and right solutions of one prompt each, of different lengths."""
    rng = random.Random(seed)
    steps = [[rng.choice("1110") for _ in range(rng.randint(1, 7))] for _ in range(number)]
    return [{"prompt": f"{row}:", "completions": own} for row, own in enumerate(steps)]


def exact(steps: list[str]) -> list[float]:
    """Whether all lines so far are right."""
    return [float("0" not in steps[: end + 1]) for end in range(len(steps))]


def test_full_monte_carlo_estimates_the_chance_after_each_prefix(policy, tmp_path, monkeypatch):
    rows = [{"prompt": "a:", "completions": ["1", "1", "1", "0", "1"]}] * 6
    found = label_steps_with_report(policy, rows, ones, tmp_path, num_rollouts=30, reuse=False, **QUICK)
    labels = list(zip(*found.dataset["labels"], strict=True))
    right = sum(labels[:3], ())  # 540 rollouts: a standard error of 0.02
    assert sum(right) / len(right) == pytest.approx(AFTER_A_LINE, abs=0.08)
    assert set(labels[3]) == set(labels[4]) == {0.0}
    report = found.report
    assert report["rollouts"] == 6 * 4 * 30 and report["prefixes"] == 24 and report["prefixes_all_wrong"] == 6
    assert report["solutions"] == report["labelled"] == 6 and report["steps"] == 30 and not report["omitted"]
    assert report["tokens"] == report["rollout_tokens"] > report["rollouts"]
    assert json.loads((found.path.parent / "report.json").read_text())["rollouts"] == report["rollouts"]
    logged: dict = {}
    monkeypatch.setattr(wandb, "run", None)
    found.log_to_wandb()
    monkeypatch.setattr(wandb, "run", SimpleNamespace(log=logged.update))
    found.log_to_wandb()
    assert logged["steps/rollouts"] == report["rollouts"] and len(logged["steps/rows"].data) == 30


def test_shared_rollouts_estimate_the_same_with_fewer_tokens(policy, tmp_path):
    prompts = [{"prompt": f"{number}:"} for number in range(16)]
    found = {
        reuse: label_steps_with_report(policy, prompts, ones, tmp_path, reuse=reuse, num_solutions=4, **QUICK)
        for reuse in (True, False)
    }
    for one in found.values():
        pairs = [(row["completions"], row["labels"]) for row in one.dataset]
        right = [
            label for steps, labels in pairs for step, label in zip(exact(steps)[:-1], labels, strict=False) if step
        ]
        wrong = [
            label for steps, labels in pairs for step, label in zip(exact(steps), labels, strict=True) if not step
        ]
        assert sum(right) / len(right) == pytest.approx(AFTER_A_LINE, abs=0.08)
        assert set(wrong) == {0.0}
        assert [labels[-1] for _, labels in pairs] == [exact(steps)[-1] for steps, _ in pairs]
    shared, alone = found[True].report, found[False].report
    assert shared["solution_tokens"] == alone["solution_tokens"] > 0  # the same solutions
    assert shared["rollout_tokens"] < 0.4 * alone["rollout_tokens"]


def test_searches_find_the_first_error_with_fewer_tokens(policy, tmp_path):
    rows = solutions(12)
    tokens = {}
    for method, more in (("full", {"reuse": False, "labels": "hard"}), ("binary", {}), ("adaptive", {})):
        found = label_steps_with_report(policy, rows, ones, tmp_path, method=method, num_rollouts=16, **more, **QUICK)
        wrong = sum(row["labels"] != exact(row["completions"]) for row in found.dataset)
        assert wrong == 0 and len(found.dataset) == 12  # a right prefix has 16 wrong rollouts once in 6 million times
        tokens[method] = found.report["rollout_tokens"]
    assert tokens["adaptive"] < tokens["binary"] < 0.6 * tokens["full"]


def test_denoising_leaves_out_what_the_policy_cannot_solve(policy, tmp_path):
    def picky(prompts, completions, **columns):
        return [
            0.0 if prompt == "1:" else score for prompt, score in zip(prompts, ones(prompts, completions), strict=True)
        ]

    found = label_steps_with_report(policy, PROMPTS[:4], picky, tmp_path, denoise=True, num_rollouts=64, **QUICK)
    assert "1:" not in found.dataset["prompt"] and found.report["omitted"]["low_confidence"] >= 3
    records = [json.loads(line) for line in next(found.path.parent.glob("shard-*")).read_text().splitlines()]
    shares = [record["confidence"] for record in records if record["labels"]]
    assert sum(shares) / len(shares) == pytest.approx(AT_THE_START, abs=0.12)
    for row in found.dataset:
        first = row["labels"].index(0.0) if 0.0 in row["labels"] else len(row["labels"])
        assert row["labels"][:first] == pytest.approx([1.0] * first, abs=0.3)  # 0.625 / 0.5, at most 1
        assert set(row["labels"][first:]) <= {0.0}


def test_rows_go_into_the_prm_trainer(policy, tmp_path):
    rows = label_steps(policy, PROMPTS, ones, 4, "adaptive", label_end=True, **QUICK)
    assert rows.column_names == ["prompt", "completions", "labels"]
    for row in rows:
        assert row["completions"][-1] == "" and row["labels"][-1] == exact(row["completions"])[-1]
    args = PRMConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = PRMTrainer(str(policy), args, train_dataset=rows)
    assert trainer.train().metrics["train_loss"] > 0


def test_a_run_that_is_interrupted_goes_on(policy, tmp_path):
    rows = solutions(12, seed=1)
    calls = count(1)

    def breaks(prompts, completions, **columns):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return ones(prompts, completions)

    options = {"chunk_size": 3, "num_rollouts": 2, **QUICK}
    verifier = f"{ones.__module__}.ones"
    whole = label_steps_with_report(policy, rows, verifier, tmp_path / "whole", **options)
    broken, dead = tmp_path / "broken", tmp_path / "dead"
    with pytest.raises(KeyboardInterrupt):
        label_steps(policy, rows, breaks, output_dir=broken, **options)
    assert 1 <= len(list(broken.rglob("shard-*"))) < 4
    # a run that died while it wrote leaves a hidden file, and a damaged shard is made again
    again = label_steps_with_report(policy, rows, verifier, dead, **options)
    shards = sorted(dead.rglob("shard-*"))
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    shards[2].unlink()
    again = label_steps_with_report(policy, rows, verifier, dead, **options)
    assert again.dataset.to_list() == whole.dataset.to_list()
    assert {**again.report, "seconds": 0, "path": ""} == {**whole.report, "seconds": 0, "path": ""}


def forked(work) -> int:
    """The process of a function call."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.slow
def test_killed_at_any_moment_it_gives_what_an_uninterrupted_run_gives(policy, tmp_path):
    def run(name: str) -> list[dict]:
        options = {"output_dir": tmp_path / name, "chunk_size": 1, **QUICK}
        return label_steps(policy, PROMPTS, f"{ones.__module__}.ones", 16, "adaptive", **options).to_list()

    whole, rng, killed = run("whole"), random.Random(0), []
    while len(killed) < 6:
        made = len(list((tmp_path / "killed").rglob("shard-*")))
        pid, wanted = forked(lambda: run("killed")), made + rng.randint(1, 6)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if len(list((tmp_path / "killed").rglob("shard-*"))) >= wanted:
                time.sleep(rng.uniform(0, 0.05))
                os.kill(pid, signal.SIGKILL)
                killed.append(os.waitpid(pid, 0)[1])
                break
            time.sleep(0.002)
        else:
            break  # it came to its end
    assert len(killed) >= 3 and set(killed) == {signal.SIGKILL}
    assert run("killed") == whole


# Chats, tokenizers, servers


def test_the_prefix_of_a_chat_is_a_begun_answer(tmp_path):
    template = (
        "{% for message in messages %}<{{ message['role'] }}>:{{ message['content'] | trim }}{{ eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>:{% endif %}"
    )
    policy = save_lines_policy(tmp_path / "policy", template)
    seen = []

    def watched(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return ones(prompts, completions)

    question = [{"role": "user", "content": "go"}]
    rows = [{"prompt": question, "completions": ["1", "1", "0"]}, {"prompt": question, "completions": ["1", "0", "1"]}]
    found = label_steps(policy, rows, watched, 64, **QUICK)
    assert found[0]["prompt"] == question and found[0]["completions"] == ["1", "1", "0"]
    assert found[0]["labels"][:2] == pytest.approx([AFTER_A_LINE] * 2, abs=0.2) and found[0]["labels"][2] == 0.0
    assert found[1]["labels"][1:] == [0.0, 0.0]
    for prompt, (message,) in seen:
        assert prompt == question and message["role"] == "assistant"
    rollouts = [message["content"] for _, (message,) in seen[2:]]
    # the template trims the line break that ends a prefix; the model sees it all the same
    assert not any("\n\n" in text for text in rollouts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_a_rollout_begins_with_its_prefix_whatever_the_tokenizer(kind, tmp_path):
    model = save_tiny_model(tmp_path / kind, "llama", tokenizer=tiny_tokenizer(kind))
    seen = []

    def watched(prompts, completions, **columns):
        seen.extend(completions)
        return [float("e" in text) for text in completions]

    steps = ["First, 3 + 4 = 7. ", " Then é\u3000doubling:", "x", "14"]
    found = label_steps(model, [{"prompt": "3 + 4?", "completions": steps}], watched, 3, max_completion_length=4)
    assert len(found[0]["labels"]) == 4 and seen[0] == "\n".join(steps)
    assert all(text.startswith(steps[0] + "\n") for text in seen)


def test_two_servers_get_texts_and_begun_answers(policy):
    def answer(number, path, body):
        text = "1\n" if body["seed"] % 3 else "0\n"
        content = {"message": {"content": text}} if "messages" in body else {"text": text}
        return 200, {"choices": [content | {"finish_reason": "stop"}]}, {}

    question = [{"role": "user", "content": "go"}]
    chats = [{"prompt": question, "completions": ["1", "1", "0"]}, {"prompt": question, "completions": ["1", "0"]}]
    with serving(answer) as one, serving(answer) as two:
        options = {"backend": "openai", "server": {"server_base_url": f"{one.url},{two.url}"}}
        found = label_steps("served", chats, ones, 6, **options)
        texts = label_steps("served", solutions(12), ones, 6, "adaptive", **options)
        bodies = one.bodies + two.bodies
    assert 0 < found[0]["labels"][0] < 1 and found[0]["labels"][2] == 0.0 and len(texts) == 12
    begun = [body for body in bodies if "messages" in body]
    assert all(body["continue_final_message"] and body["messages"][-1]["role"] == "assistant" for body in begun)
    assert {body["messages"][-1]["content"] for body in begun} == {"1\n", "1\n1\n"}
    assert len({body["seed"] for body in begun}) == len(begun) and one.bodies and two.bodies


# Bad input


def test_what_cannot_be_judged_is_counted_and_never_wrong(policy, tmp_path):
    def shy(prompts, completions, **columns):
        scores = ones(prompts, completions)
        unknown = [text.startswith("1\n1") and text != "1\n1\n1\n0" for text in completions]
        return [None if skip else score for skip, score in zip(unknown, scores, strict=True)]

    rows = [{"prompt": "a:", "completions": ["1", "0"]}, {"prompt": "b:", "completions": ["1", "1"]}]
    rows += [{"prompt": "c:", "completions": ["1", "", "0", "1"]}]
    found = label_steps_with_report(policy, rows, shy, tmp_path, num_rollouts=16, **QUICK)
    assert found.report["omitted"] == {"unscored_solution": 1} and found.report["unscored_rollouts"] > 8
    assert found.dataset["prompt"] == ["a:", "c:"]
    assert found.dataset[1]["labels"][1] is None and found.report["unlabelled_steps"] == 1  # the empty step
    rows = [{"prompt": "a:", "completions": ["1", "1", "1", "0"]}, rows[0]]
    found = label_steps_with_report(policy, rows, shy, tmp_path, method="binary", num_rollouts=8, **QUICK)
    assert found.report["omitted"] == {"unscored_prefix": 1}


def test_all_right_and_all_wrong_are_said(policy, tmp_path, caplog):
    rows = [{"prompt": "a:", "completions": ["1", "0", "1"]}]
    for value, word in ((1.0, "right"), (0.0, "wrong")):
        found = label_steps_with_report(
            policy, rows, lambda value=value, **given: [value] * len(given["prompts"]), tmp_path, **QUICK
        )
        assert f"are {word}" in caplog.text and found.report[f"prefixes_all_{word}"] == 2
    with pytest.raises(ValueError, match="None of 1 solutions got labels.*unscored_solution"):
        label_steps(policy, rows, lambda prompts, **given: [None] * len(prompts), **QUICK)


@pytest.mark.parametrize(
    "steps, message",
    [
        (["1\n1", "0"], "separator"),
        ("1\n0", "a list of steps"),
        (["1", None], "a string"),
        ([], "a list of steps"),
        (["", " "], "only empty steps"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(policy, steps, message):
    rows = [*solutions(2), {"prompt": "a:", "completions": steps}]
    with pytest.raises(DataError, match=message) as caught:
        label_steps(policy, rows, ones, **QUICK)
    assert caught.value.row == 2 and caught.value.column == "completions"


def test_arguments_that_cannot_be_meant(policy, tmp_path):
    rows = solutions(1)
    for more, message in (
        ({"dataset": []}, "no row"),
        ({"method": "fast"}, "method"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"num_rollout": 3}, "num_rollout"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"server": {"max_retries": 1}}, "server"),
        ({"dataset": PROMPTS, "segmenter": lambda text: [(0, 1), (1, len(text))]}, "step_separator=''"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            label_steps(**{"model": policy, "dataset": rows, "verifier": ones, **QUICK, **more})
    with pytest.raises(RewardError, match="nan"):
        label_steps(policy, rows, lambda prompts, **given: [float("nan")] * len(prompts), **QUICK)
    with pytest.raises(ValueError, match="solution"):
        label_steps(policy, rows, lambda prompts, completions, solution, **given: [0.0], **QUICK)
    long = {"prompt": "a" * 500 + ":", "completions": ["1", "0"]}
    with pytest.raises(DataError, match="positions") as caught:
        label_steps(policy, [*solutions(3), long], ones, **QUICK)
    assert caught.value.row == 3


def test_a_prefix_that_leaves_no_room_for_a_rollout_is_counted(policy, tmp_path):
    rows = [*solutions(2), {"prompt": "a:", "completions": ["1"] * 600 + ["0"]}]
    for _ in range(2):  # the second run reads what the first one kept
        found = label_steps_with_report(policy, rows, ones, tmp_path, num_rollouts=1, method="binary", **QUICK)
        assert found.report["omitted"] == {"too_long_prefix": 1} and len(found.dataset) == 2


def test_solutions_of_one_prompt_are_verified_with_their_own_columns(policy, tmp_path, caplog):
    def verifier(prompts, completions, answer, **columns):
        return [score * (own == "ones") for score, own in zip(ones(prompts, completions), answer, strict=True)]

    def labelled(answers, name, **options):
        rows = [{"prompt": "a:", "completions": ["1", "1", "0"], "answer": answer} for answer in answers]
        return label_steps_with_report(policy, rows, verifier, tmp_path / name, num_rollouts=32, **options, **QUICK)

    alone, equal = labelled(["ones"], "alone"), labelled(["ones", "ones"], "equal")
    assert equal.report["rollouts"] == alone.report["rollouts"] < 64  # shared
    assert "share no rollouts" not in caplog.text
    for answers in (["ones", "none"], ["none", "ones"]):
        found = labelled(answers, f"{answers[0]} first")
        by_answer = dict(zip(answers, found.dataset["labels"], strict=True))
        assert by_answer["none"] == [0.0, 0.0, 0.0] and min(by_answer["ones"][:2]) > 0.3
        assert found.report["rollouts"] >= 64  # 32 from the first step of each
        assert "different values in ['answer']. They share no rollouts" in caplog.text
        caplog.clear()
        # the confidence of SCAN too
        found = labelled(answers, f"{answers[0]} first, denoised", denoise=True, reuse=False)
        assert found.report["omitted"] == {"low_confidence": 1} and len(found.dataset) == 1


def test_chunks_of_one_prompt_get_different_rollouts(policy, tmp_path):
    rows = [{"prompt": "a:", "completions": ["1", "1", "1", "0"]}] * 3
    options = {"num_rollouts": 4, "chunk_size": 1, "reuse": False}
    found = label_steps_with_report(policy, rows, ones, tmp_path, **options, **QUICK)
    assert len({tuple(labels) for labels in found.dataset["labels"]}) > 1


def test_several_processes_are_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="label-steps runs in one process"):
        label_steps(policy, solutions(1), ones, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


# The command


def test_the_command_labels_prompts_and_resumes(policy, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    command = ["label-steps", "--model_name_or_path", str(policy), "--dataset_name", str(rows), "--method", "adaptive"]
    command += ["--reward_funcs", f"{ones.__module__}.ones", "--output_dir", str(tmp_path / "out")]
    command += ["--max_completion_length", "40", "--generation_batch_size", "256", "--label_end"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    written = [json.loads(line) for line in Path(report["path"]).read_text().splitlines()]
    assert len(written) == report["labelled"] == 48 - sum(report["omitted"].values())
    assert all(len(row["labels"]) == len(row["completions"]) for row in written)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("shard-*")}
    assert main(command) == 0 and times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(SystemExit):
        main([*command, "--reward_funcs", f"{ones.__module__}.ones", f"{ones.__module__}.ones"])
    assert "one reward function" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "label_steps").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_config_says_how_to_run_it(path):
    (args,) = make_parser().parse_args_and_config(["--config", str(path)])
    assert isinstance(args, LabelStepsArguments)
    text = path.read_text()
    header = text.split("\n\n")[0]
    assert f"trl-ext label-steps --config configs/label_steps/{path.name}" in header
    assert "Memory: " in header and '{"prompt"' in header
    for line in text.splitlines():
        if re.match(r"\w+: .*\d", line) and not re.match(r"(model_name_or_path|dataset_name|output_dir):", line):
            assert "#" in line, f"no source beside: {line}"


def test_there_are_configs():
    assert len(list((ROOT / "configs" / "label_steps").glob("*.yaml"))) >= 2
