"""Reward functions by name: what a string means, and that a wrong one is refused before anything is generated."""

import sys

import numpy as np
import pytest
from trl.rewards import think_format_reward

from trl_ext.cli.main import main
from trl_ext.demo.model import tiny_reward_base
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator
from trl_ext.pipelines.reward_functions import (
    as_list,
    call_reward,
    check_rewards,
    load_reward,
    reward_identity,
    reward_name,
    weighted_total,
    weighted_totals,
    weights_by_name,
)


def plain(prompts, completions, **columns):
    return [1.0] * len(prompts)


def wants_solution(completions, solution, **columns):
    return [1.0] * len(completions)


def takes_nothing_else(prompts, completions):
    return [1.0] * len(prompts)


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A folder with `my_rules.py`, which is the current one."""
    text = "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    (tmp_path / "my_rules.py").write_text(text + "\nLIMIT = 3\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_rules", "_file_my_rules"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("spec", ["my_rules.length", "my_rules:length", "my_rules.py:length", "{}/my_rules.py:length"])
def test_a_function_by_module_or_file(rules, spec):
    spec = spec.format(rules)
    assert reward_name(spec) == "length"
    assert load_reward(spec)(completions=["ab", "c"]) == [2.0, 1.0]
    assert load_reward(spec) is load_reward(spec)
    assert reward_identity(spec)["name"] == "length" and reward_identity(spec)["source"]
    check_rewards([spec], [])


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("my_rules.py", ValueError, r"names the file my_rules.py.*It has: my_rules.py:length\."),
        ("there/is/none.py", ValueError, "names the file there/is/none.py; needed: one of its functions"),
        ("my_rules.py:lenght", ValueError, r"has no function 'lenght'\. Did you mean 'length'\?"),
        ("my_rules.lenght", ValueError, r"has no function 'lenght'\. Did you mean 'length'\?"),
        ("my_rules.LIMIT", ValueError, "has no function 'LIMIT'"),
        ("my_rule.length", ValueError, r"'my_rule.length' cannot be imported.*Did you mean 'my_rules'\?"),
        ("my_rulse.py:length", ValueError, r"cannot be imported.*Did you mean 'my_rules.py'\?"),
        ("acuracy_reward", ValueError, r"no reward function or model 'acuracy_reward'\. Did you mean 'accuracy_r"),
        ("./no_model", FileNotFoundError, "no_model is not a folder"),
        ("empty", FileNotFoundError, "empty holds no model"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_meant(rules, spec, error, words):
    (rules / "empty").mkdir()
    for check in (load_reward, lambda spec: check_rewards([spec])):
        with pytest.raises(error, match=words):
            check(spec)


def test_a_module_that_cannot_be_imported_says_why(rules):
    (rules / "broken_rules.py").write_text("import no_such_package\n")
    for spec in ("broken_rules.length", "broken_rules.py:length"):
        with pytest.raises(ValueError, match="cannot be imported.*No module named 'no_such_package'"):
            check_rewards([spec])


def test_a_missing_extra_is_said_at_the_start(without_math_verify):
    from trl.rewards import accuracy_reward

    for spec in ("accuracy_reward", "trl.rewards.accuracy_reward", accuracy_reward):
        with pytest.raises(ImportError, match=r"'accuracy_reward' needs math-verify.*'trl-ext\[math\]'"):
            check_rewards([spec])
    check_rewards(["think_format_reward"], [])


def test_the_data_must_have_what_a_function_takes():
    check_rewards([plain, wants_solution, think_format_reward], ["solution"])
    with pytest.raises(ValueError, match=r"needs the argument 'solution'.*Did you mean 'solutions'\?.*prompt, sol"):
        check_rewards([wants_solution], ["solutions"])
    with pytest.raises(ValueError, match=r"does not accept the arguments .*'trainer_state'.*Add \*\*kwargs"):
        check_rewards([takes_nothing_else], [])


def test_columns_named_like_the_arguments_do_not_reach_a_function_twice():
    seen = {}

    def notes(prompts, completions, **columns):
        seen.update(columns, completions=completions)
        return [0.0] * len(prompts)

    columns = {"completions": ["old"], "prompts": 1, "label": True, "score": 2}
    call_reward(notes, "notes", [Sample("a", 0, "p", "new", None, "stop", None, 0, columns=columns)])
    assert seen["completions"] == ["new"] and seen["label"] == [True] and seen["score"] == [2]
    assert "completion_ids" not in seen


def test_weights_and_totals_have_one_meaning():
    scores = np.array([[1.0, np.nan, np.nan], [2.0, 3.0, np.nan]])
    totals = weighted_totals(scores, np.array([2.0, 0.5]))
    assert totals[:2].tolist() == [3.0, 1.5] and np.isnan(totals[2])
    weights = weights_by_name([plain, wants_solution], (2.0, 0.5))
    assert weighted_total({"plain": 1.0, "wants_solution": 2.0}, weights) == 3.0
    assert weighted_total({"plain": None, "wants_solution": 3.0}, weights) == 1.5
    assert weighted_total({"plain": None}, weights) is None and weighted_total({}, weights) is None
    assert as_list((plain, plain)) == [plain, plain] and as_list(plain) == [plain] == as_list([plain])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--selection", "top_per_promt"], "Did you mean 'top_per_prompt'?"),
        (["--selection_kwargs", '{"m": 2}'], "The selector 'top_per_prompt' cannot be called"),
    ],
)
def test_a_wrong_selector_fails_before_the_first_token(rules, monkeypatch, capsys, flags, words):
    generated = []
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *args, **kwargs: generated.append(args))
    policy = tiny_reward_base(rules / "policy", hidden_size=32)
    (rules / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["rejection-sample", "--model_name_or_path", str(policy), "--reward_funcs", "my_rules.py:length"]
    assert main([*arguments, "--dataset_name", "in.jsonl", "--output_dir", "out", *flags]) == 1
    assert words in capsys.readouterr().err and not generated


@pytest.mark.parametrize("command", ["best-of-n", "rejection-sample"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reward_funcs", "my_rules.py"], "my_rules.py:length"),
        (["--reward_funcs", "my_rules.lenght"], "Did you mean 'length'?"),
        (["--reward_funcs", "tests.pipelines.test_reward_functions.wants_solution"], "needs the argument 'solution'"),
        (["--reward_funcs", "accuracy_reward"], "needs math-verify"),
    ],
)
def test_the_commands_fail_before_the_first_token(
    rules, without_math_verify, monkeypatch, capsys, command, flags, words
):
    generated = []
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *args, **kwargs: generated.append(args))
    policy = tiny_reward_base(rules / "policy", hidden_size=32)
    (rules / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = [command, "--model_name_or_path", str(policy), *flags, "--max_completion_length", "4"]
    if command == "best-of-n":
        arguments += ["--input", "in.jsonl", "--output", "out.jsonl", "--n", "2"]
    else:
        arguments += ["--dataset_name", "in.jsonl", "--output_dir", "out", "--num_generations", "2"]
    assert main(arguments) == 1
    assert words in capsys.readouterr().err and not generated and not (rules / "out.jsonl").exists()
