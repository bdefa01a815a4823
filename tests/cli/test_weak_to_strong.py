"""`trl-ext weak-to-strong`: its configs, from a file of rows to a report, and how it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_tiny_model
from trl_ext.cli.main import main
from trl_ext.cli.weak_to_strong import make_parser, task_of


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "weak_to_strong").glob("*.yaml"))


def rows(task: str, number: int = 40) -> list[dict]:
    if task == "preference":
        return [{"prompt": f"{n}", "chosen": f" {n} yes", "rejected": f" {n} no"} for n in range(number)]
    return [{"prompt": f"{n}", "completion": f" {n % 3}"} for n in range(number)]


def test_there_are_configs_for_both_kinds():
    assert {yaml.safe_load(path.read_text())["task"] for path in FILES} == {"preference", "generation"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_parsed_whole_and_its_header_true(path):
    config, name = yaml.safe_load(path.read_text()), path.relative_to(ROOT).as_posix()
    header = path.read_text().split("\n\n")[0]
    assert f"trl-ext weak-to-strong --config {name}" in header and "Memory: " in header
    parser = make_parser(task=task_of(["--config", str(path)]))
    parsed = parser.parse_args_and_config(["--config", str(path), "--bf16", "false", "--use_cpu"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert {name: values[name] for name in config} == config
    assert not [
        line for line in path.read_text().splitlines() if line[:1].isalpha() and ": 1" in line and "#" not in line
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_runs_on_tiny_models(path, tmp_path, capsys):
    config = yaml.safe_load(path.read_text())
    base = str(save_tiny_model(tmp_path / "model", "llama"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(config["task"])))
    out = tmp_path / "out"
    given = ["--weak_model_name_or_path", base, "--strong_model_name_or_path", base, "--output_dir", str(out)]
    given += ["--dataset_name", str(data), "--use_cpu", "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    # a weak model that writes texts has to learn to end them
    weak = {"max_steps": 40, "learning_rate": 5e-3} if config["task"] == "generation" else {"max_steps": 1}
    given += ["--seeds", "0", "--weak_training", json.dumps(weak), "--dtype", "float32"]
    given += ["--max_completion_length", "4"] if config["task"] == "generation" else []
    assert main(["weak-to-strong", "--config", str(path), *given]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == config["task"] and report["student_loss"] == config["student_loss"]
    assert "# Weak to strong" in capsys.readouterr().out
    assert (out / "student-weak-0-0-seed-0" / "adapter_config.json").is_file()
    assert not (out / "weak-0-seed-0" / "adapter_config.json").exists()  # trained in full


def test_task_decides_which_arguments_there_are(capsys):
    assert task_of(["--task", "process"]) == task_of(["--task=process"]) == "process" and task_of([]) == "preference"
    assert task_of(["--task", "steps"]) == "process"  # its former name
    with pytest.raises(SystemExit) as stop:
        models = ["--weak_model_name_or_path", "a", "--strong_model_name_or_path", "b"]
        main(["weak-to-strong", "--task", "outcome", *models, "--use_cpu", "--bf16", "false", "--kd_weight", "1"])
    assert stop.value.code == 2 and "kd_weight" in capsys.readouterr().err


@pytest.mark.parametrize("text,words", [("a: [1\n b: 2\n", "while parsing"), ("- 1\n", "must contain a YAML mapping")])
@pytest.mark.parametrize("command", ["weak-to-strong", "reward"])
def test_a_config_that_is_no_mapping_is_said_in_a_line(command, text, words, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main([command, "--config", str(tmp_path / "bad.yaml")])
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--model_name_or_path", "v1"], "name one model, but this command needs two"),
        (["--model_revision", "v1"], "name one model, but this command needs two"),
        (["--dataset_streaming"], "splitting the rows by prompt needs all rows"),
    ],
)
def test_flags_without_a_meaning_here_are_refused(flag, message, capsys):
    models = ["--weak_model_name_or_path", "a", "--strong_model_name_or_path", "b", "--dataset_name", "x.jsonl"]
    assert main(["weak-to-strong", *models, *flag, "--use_cpu", "--bf16", "false"]) == 1
    assert message in capsys.readouterr().err


def test_a_test_split_that_is_named_and_missing_is_said(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    models = ["--weak_model_name_or_path", "a", "--strong_model_name_or_path", "b", "--use_cpu", "--bf16", "false"]
    assert (
        main(["weak-to-strong", *models, "--dataset_name", str(tmp_path / "x.jsonl"), "--dataset_test_split", "tset"])
        == 1
    )
    assert "no split 'tset'" in capsys.readouterr().err


def test_no_model_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["weak-to-strong", "--dataset_name", "x.jsonl", "--use_cpu", "--bf16", "false"])
    assert "No model was named" in capsys.readouterr().err
