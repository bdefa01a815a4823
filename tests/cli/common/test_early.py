"""Names that are certainly wrong end a command before torch is imported; names that may be right pass."""

import subprocess
import sys

import pytest

from trl_ext.cli.common.early import check_format, check_names, flags
from trl_ext.data.recipes import RECIPES
from trl_ext.pipelines.names import check_name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("import torch\n\ndef short(completions, **kwargs):\n    return [0.0]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:f", "there is no nowhere.py"),
        ("reward.py:short", "Did you mean 'rewards.py'"),
        ("rewards.py:shrt", "Did you mean 'short'"),
        ("rewards.py", "rewards.py:short"),
        ("rewards.shrt", "Did you mean 'short'"),
        ("rewrads.short", "Did you mean 'rewards'"),
        ("no_such_package.sub.f", "there is no no_such_package"),
        ("json.decoder.JSONDecode", "Did you mean 'JSONDecoder'"),
        ("think_format_rewrd", "Did you mean 'think_format_reward'"),
        ("empty", "holds no model"),
        ("./modle", "Did you mean 'model'"),
        ("a/b/c", "is not a folder"),
    ],
)
def test_a_wrong_name_is_an_error(name, message, here):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "rewards.py:short",
        "rewards.short",
        "model",
        "user/a-model-of-the-hub",
        "think_format_reward",
        "http://localhost:8000",
        "json.dumps",
        "trl.rewards.think_format_reward",  # what a package imports lazily only an import can tell
        "os.path.basename",
    ],
)
def test_a_name_that_may_be_right_passes(name, here):
    check_name(name)


def test_a_plain_folder_hides_no_package_and_no_module(here, monkeypatch):
    installed = here / "installed"
    for file in ("mylib/__init__.py", "mylib/rewards.py", "tools/sub/rewards.py"):
        (installed / file).parent.mkdir(parents=True, exist_ok=True)
        (installed / file).write_text("def good(completions, **kwargs):\n    return [0.0]\n")
    for name in ("mylib", "tools", "rewards", "mine/sub"):  # without __init__.py
        (here / name).mkdir(parents=True)
    (here / "mine" / "sub.py").write_text("def good(completions, **kwargs):\n    return [0.0]\n")
    monkeypatch.syspath_prepend(installed)
    for name in ("mylib.rewards.good", "tools.sub.rewards.good", "rewards.short", "mine.sub.good"):
        check_name(name)
    for path in (None, here):  # the current folder may be on the path or not
        if path:
            monkeypatch.syspath_prepend(path)
        for name, message in (
            ("mylib.rewards.god", "has no function 'god'"),
            ("mine.sub.god", "has no function 'god'"),
            ("mine.sbu.good", "there is no mine.sbu"),
        ):
            with pytest.raises(ValueError, match=message):
                check_name(name)


def test_the_names_of_a_config_file_are_checked_and_flags_win(here):
    (here / "run.yaml").write_text("reward_funcs: [rewards.py:shrt]\nmodel_name_or_path: ./model\n")
    with pytest.raises(ValueError, match="has no function 'shrt'"):
        check_names("rejection-sample", ["--config", "run.yaml"])
    check_names("rejection-sample", ["--config", "run.yaml", "--reward_funcs", "rewards.py:short"])
    (here / "run.yaml").write_text("temprature: 1.0\n")
    with pytest.raises(ValueError, match="unknown argument 'temprature'. Did you mean 'temperature'"):
        check_names("rejection-sample", ["--config", "run.yaml"])
    (here / "run.yaml").write_text("backend: vllm\njudge: /on/the/server\n")  # its name there
    check_names("label-preferences", ["--config", "run.yaml"])
    assert flags(["--a", "1", "2", "--b-c=3", "--d"]) == {"a": ["1", "2"], "b_c": ["3"], "d": []}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["score", "--model", "./modle"], "./modle is not a folder.*Did you mean 'model'"),
        (["label-preferences", "--judge", "./modle"], "./modle is not a folder.*Did you mean 'model'"),
        (["reward", "--config", "run.yaml"], "run.yaml is no file"),
        (["score", "--dataset_format", "rewardbnch"], "Did you mean 'rewardbench'"),
        (["dense-grpo", "--dense_reward_funcs", "rewards.py:shrt"], "Did you mean 'short'"),
    ],
)
def test_other_names(argv, message, here):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_names(argv[0], argv[1:])


def test_the_model_of_a_server_may_be_a_path_of_another_machine(here):
    check_names("best-of-n", ["--model_name_or_path", "/models/theirs", "--backend", "vllm"])
    check_names("evaluate", ["--policy", "/models/theirs", "--backend", "openai"])
    for argv in (
        ["best-of-n", "--model_name_or_path", "/models/theirs"],
        ["evaluate", "--policy", "/models/theirs"],
        ["evaluate", "--policy", "/models/theirs", "--backend", "openai", "--model", "/models/ours"],  # runs here
    ):
        with pytest.raises(FileNotFoundError):
            check_names(argv[0], argv[1:])


def test_every_format_is_known():
    for name in RECIPES:
        check_format(name)


def test_a_command_ends_in_one_line_without_torch(here):
    code = (
        "import sys; from trl_ext.cli.main import main; status = main(sys.argv[1:]);"
        "assert status == 1 and not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    )
    argv = ["best-of-n", "--model_name_or_path", "./model", "--input", "rows.jsonl", "--output", "best.jsonl"]
    run = subprocess.run(
        [sys.executable, "-c", code, *argv, "--reward_funcs", "rewards.py:shrt"],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.startswith("trl-ext best-of-n: error: ") and run.stderr.count("\n") == 1
    assert not (here / "best.jsonl").exists()
