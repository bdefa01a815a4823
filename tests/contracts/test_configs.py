"""Every file in configs/ is parsed by the command that it is for, says what it must, and trains a tiny model."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.table import outcome_rows, segment_rows, step_rows


ROOT = Path(__file__).resolve().parents[2]
# Configs of pipelines are tested beside their commands.
TRAINERS = ("reward", "orm", "prm", "segment", "ensemble")
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name in TRAINERS)
IDS = [f"{path.parent.name}/{path.stem}" for path in FILES]
CATEGORIES = {"tone": "factuality", "length": "relevance"}


def command_of(config: Path):
    """The module of the command that a config is for: its folder says which."""
    return importlib.import_module(f"trl_ext.cli.{config.parent.name}")


def write_rows(folder: Path, config: Path) -> Path:
    """A data folder of the kind that the config is for: its folder and the first word of its name say which."""
    folder.mkdir()
    for split, count, seed in (("train", 12, 0), ("test", 4, 1)):
        if config.parent.name == "orm":
            rows = outcome_rows(count, seed=seed)
        elif config.parent.name == "prm":
            rows = step_rows(count, seed=seed)
        elif config.parent.name == "segment":
            rows = segment_rows(count, binary=True, seed=seed)
            for segment in (segment for row in rows for segment in row["segments"]):
                segment["category"] = CATEGORIES[segment["category"]]
        elif config.name.startswith("rankings"):
            rows = ranked_rows(count, k=4, ragged=True, ties=True, seed=seed)
        else:
            rows = pair_rows(count, seed=seed)
        if "margin" in config.name:
            rows = [{**row, "margin": 0.5} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), "qwen3")


def test_there_are_configs():
    assert len(FILES) >= 10
    assert {path.parent.name for path in FILES} == {"reward", "ensemble", "orm", "prm", "segment"}
    for kind in ("reward", "ensemble", "orm", "prm", "segment"):
        own = [path.name for path in FILES if path.parent.name == kind]
        assert any("qlora_8b" in name for name in own) and any("8b" not in name for name in own)
    assert not list((ROOT / "configs").rglob("*.yml"))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_header_gives_the_command_the_memory_and_the_row(path):
    header = path.read_text().split("\n\n")[0]
    name = path.relative_to(ROOT).as_posix()
    assert f"trl-ext {path.parent.name} --config {name}" in header
    assert f"accelerate launch -m trl_ext.cli.{path.parent.name} --config {name}" in header
    assert "Memory: " in header
    assert json.loads(re.search(r"\{.*\}", header)[0])["prompt"]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_each_number_has_its_source(path):
    for line in path.read_text().splitlines():
        if re.match(r"\w+: .*\d", line) and not re.match(r"(model_name_or_path|dataset_name|output_dir):", line):
            assert re.search(r"#|^lr_scheduler_kwargs.*#", line), f"no source beside: {line}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_key_is_parsed_and_kept(path):
    make_parser = command_of(path).make_parser
    config = yaml.safe_load(path.read_text())
    parsed = make_parser().parse_args_and_config(["--config", str(path), "--bf16", "false", "--use_cpu"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert {name: values[name] for name in config} == config


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_an_unknown_key_is_an_error(path, tmp_path, capsys):
    main = command_of(path).main
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text() + "\nlearning_rat: 1.0\n")
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(wrong)])
    assert stop.value.code == 2
    assert "learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_each_config_trains_a_tiny_model(path, tiny_base, tmp_path):
    main = command_of(path).main
    out = tmp_path / "out"
    status = main(
        ["--config", str(path), "--model_name_or_path", str(tiny_base), "--output_dir", str(out)]
        + ["--dataset_name", str(write_rows(tmp_path / "rows", path)), "--use_cpu"]
        + ["--max_steps", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--eval_steps", "2"]
    )
    assert status == 0
    config = yaml.safe_load(path.read_text())
    model = out / "member-3" if path.parent.name == "ensemble" else out
    assert (model / "adapter_config.json").is_file() == config.get("use_peft", False)
    assert (model / "reward_model.json").is_file()
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert len([entry for entry in history if "eval_loss" in entry]) == 1
