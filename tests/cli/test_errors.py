"""What a user did wrong is one line and status 1; a bug keeps its traceback; a reader that goes away is no error."""

import json
import subprocess
import sys
import types
from pathlib import Path

import datasets  # noqa: F401  its log handler keeps the stream it was imported under: not that of one test
import pytest

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows, save_tiny_model
from trl_ext.cli import main as cli
from trl_ext.data.validation import DataError


ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--report_to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and files, good and bad."""
    folder = tmp_path_factory.mktemp("errors")
    save_tiny_model(folder / "lm", "llama")
    (folder / "martian").mkdir()
    (folder / "martian" / "config.json").write_text('{"model_type": "martian"}')
    (folder / "empty").mkdir()
    rows = pair_rows(4)
    write(folder / "rows.jsonl", rows)
    write(folder / "none.jsonl", [*rows[:2], {**rows[2], "chosen": None}])
    write(folder / "both.jsonl", [{**row, "margin": 0.5, "preference_probability": 0.5} for row in rows])
    write(folder / "ids.jsonl", [{"chosen_ids": [5, 6], "rejected_ids": [5, n]} for n in (7, 100_000)])
    for name in ("text", "nothing"):  # `text` is also the name of a builder of `datasets`
        (folder / name).mkdir()
    write(folder / "text" / "train.jsonl", [{"label": 1}])
    (folder / "nothing" / "train.jsonl").touch()
    (folder / "tab.yaml").write_text("loss_type:\n\t- x\n")
    (folder / "number.yaml").write_text("loss_type: 3\n")
    (folder / "choice.yaml").write_text("shared_prefix: maybe\n")
    (folder / "resume.yaml").write_text("resume_from_checkpoint: true\n")
    (folder / "damaged.jsonl").write_text('{"prompt": "a"}\n{nope\n')
    reward = save_reward_model(folder / "moved", lora=True)
    reward.rename(folder / "adapter")
    (folder / "moved" / "base").rename(folder / "base")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reward(model="lm", data="rows.jsonl", *more):
    return ["reward", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", "out", *SHORT, *more]


def score(model, data="rows.jsonl"):
    return ["score", "--model", model, "--input", data, "--output", "scored.jsonl"]


# (arguments, what the line must contain)
MISTAKES = {
    "merge: no such folder": (["merge", "./nowhere", "merged"], "./nowhere is not a folder"),
    "merge: a language model": (
        ["merge", "lm", "merged"],
        "lm is a language model (LlamaForCausalLM) without a reward",
    ),
    "merge: the base is gone": (["merge", "adapter", "merged"], "which does not exist here. Restore that folder"),
    "score: no such folder": (score("./nowhere"), "./nowhere is not a folder"),
    "score: a language model": (
        score("lm"),
        "lm is a language model (LlamaForCausalLM) without a reward head. Needed",
    ),
    "score: an empty folder": (score("empty"), "config.json"),
    "score: an unknown family": (score("martian"), "martian cannot be loaded as a model"),
    "score: the base is gone": (score("adapter"), "which does not exist here. Restore that folder"),
    "score: no such file": (score("lm", "nothing.jsonl"), "nothing.jsonl"),
    "reward: no model": (["reward", "--output_dir", "out", *SHORT], "Give `--model_name_or_path`"),
    "reward: no such folder": (reward("./nowhere"), "./nowhere is not a folder"),
    "reward: an unknown family": (reward("martian"), "martian cannot be loaded as a model"),
    "reward: no such file": (reward(data="nothing.jsonl"), "No data file at 'nothing.jsonl'"),
    "reward: a damaged file": (
        reward(data="damaged.jsonl"),
        "'damaged.jsonl' cannot be read as a data set: JSON parse",
    ),
    "reward: a bad row": (reward(data="none.jsonl"), "train data, row 2, column 'chosen': found None"),
    "reward: margin and probability": (
        reward(data="both.jsonl"),
        "column 'margin': found 'margin' beside 'preference_probability', and the loss 'bradley_terry'",
    ),
    "reward: ids of another tokenizer": (
        reward(data="ids.jsonl"),
        "row 1, column 'rejected_ids': found the token id 100000; needed ids below",
    ),
    "reward: no such split": (reward("lm", "rows.jsonl", "--dataset_train_split", "tain"), "no split 'tain'"),
    "score: a folder as output": (score("lm")[:-1] + ["empty"], "--output empty is a folder"),
    "reward: no such model by name": (reward("nowhere"), "nowhere is not a folder here, and could not be loaded"),
    "reward: no such data by name": (reward(data="nowhere"), "'nowhere' is neither a folder nor a file here"),
    "reward: a folder named as a builder": (reward(data="text"), "found no such column among ['label']"),
    "reward: an empty file": (reward(data="nothing"), "has an empty data file"),
    "reward: a checkpoint that is not there": (
        reward("lm", "rows.jsonl", "--resume_from_checkpoint", "nowhere"),
        "resume_from_checkpoint='nowhere' is not a folder",
    ),
    "reward: no checkpoint yet": (
        reward("lm", "rows.jsonl", "--config", "resume.yaml"),
        "out has no checkpoint-<step>",
    ),
    "reward: no such layers": (
        reward("lm", "rows.jsonl", "--use_peft", "--lora_target_modules", "nope"),
        "check your `target_modules`",
    ),
    "reward: an argument of a loss": (
        reward("lm", "rows.jsonl", "--loss_type", "listnet", "--loss_kwargs", '{"temperature": "hot"}'),
        "'listnet' cannot be computed with loss_kwargs={'temperature': 'hot'}",
    ),
    "reward: an unknown loss": (reward("lm", "rows.jsonl", "--loss_type", "placket_luce"), "plackett_luce"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments, message = MISTAKES[name]
    assert cli.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(f"trl-ext {arguments[0]}: error: ")
    assert message in lines[0]
    assert not (folder / "merged").exists()


IN_ONE_PROCESS = {
    "score": (score("adapter")[1:], "--shard i/n"),
    "best-of-n": (
        [
            "--model_name_or_path",
            "lm",
            "--reward_funcs",
            "adapter",
            "--input",
            "rows.jsonl",
            "--output",
            "scored.jsonl",
        ],
        "vllm",
    ),
    "evaluate": (["--model", "adapter", "--dataset_name", "rows.jsonl", "--output_dir", "scored.jsonl"], ""),
    "choose": (["--model", "adapter", "--dataset_name", "rows.jsonl", "--n", "1", "--output", "scored.jsonl"], ""),
    "merge": (["adapter", "scored.jsonl"], ""),
    "demo": (["--smoke", "--output_dir", "scored.jsonl"], ""),
}


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_several_processes_of_a_launcher_are_refused_where_one_writes(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments, advice = IN_ONE_PROCESS[name]
    assert cli.main([name, *arguments]) == 1
    error = capsys.readouterr().err
    assert f"error: {name} runs in one process, and the launcher started 2" in error and advice in error
    assert not (folder / "scored.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("tab.yaml", 'in "tab.yaml", line 2'),
        ("number.yaml", "loss_type=3 is no loss"),
        ("choice.yaml", "shared_prefix='maybe' is not known"),
    ],
)
def test_a_config_that_cannot_be_read(config, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        cli.main(reward("lm", "rows.jsonl", "--config", config))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_full_disk_as_the_writer_of_weights_says_it(monkeypatch, capsys):
    from safetensors import SafetensorError

    assert run_command(SafetensorError("I/O error: No space left on device (os error 28)"), monkeypatch) == 1
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(SafetensorError):
        run_command(SafetensorError("header too large"), monkeypatch)


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    assert run_command(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "trl-ext merge: interrupted\n"


@pytest.mark.parametrize("error", [DataError("a", "b", "c", row=3), FileNotFoundError("gone"), ValueError("bad")])
def test_the_traceback_on_request(error, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_command(error, monkeypatch)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug"), TypeError("a bug"), ValueError("from below")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        run_command(error, monkeypatch)


@pytest.mark.parametrize("error", [DataError("a", "b", "c", row=3), FileNotFoundError("gone"), OSError()])
def test_what_is_said(error, monkeypatch, capsys):
    assert run_command(error, monkeypatch) == 1
    assert capsys.readouterr().err == f"trl-ext merge: error: {str(error) or 'OSError()'}\n"


def run_command(error, monkeypatch):
    """`trl-ext merge` where the command raises this, in code that is not ours."""

    def main(argv):
        raise error

    module = types.ModuleType("trl_ext.cli.merge")
    module.main = main
    monkeypatch.setitem(sys.modules, "trl_ext.cli.merge", module)
    return cli.main(["merge"])


def test_as_a_module():
    """As launchers call it."""
    arguments = [sys.executable, "-m", "trl_ext.cli.reward", "--output_dir", "out", *SHORT]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trl-ext reward: error: No model was named." in done.stderr


def test_a_reader_that_is_gone():
    """As `| head` is after its lines."""
    program = (
        "import os, sys, types; from trl_ext.cli import main as cli\n"
        "module = types.ModuleType('trl_ext.cli.plugins')\n"
        "exec('def main(argv):\\n    for n in range(9): print(\"x\" * 100_000)', module.__dict__)\n"
        "sys.modules['trl_ext.cli.plugins'] = module\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(cli.main(['plugins']))"
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, "")
