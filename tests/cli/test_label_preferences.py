"""`trl-ext label-preferences`: its configs, and a run whose rows `trl-ext reward` takes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import pair_rows, save_tiny_model, tiny_tokenizer
from trl_ext.cli.label_preferences import make_parser
from trl_ext.cli.main import main
from trl_ext.pipelines.feedback.judge_settings import JudgeFields, JudgeSettings


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "label_preferences").glob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_what_the_judge_takes(path):
    text = path.read_text()
    assert f"trl-ext label-preferences --config configs/label_preferences/{path.name}" in text
    assert "# Memory: " in text and "# Data: " in text
    (args,) = make_parser().parse_args_and_config(["--config", str(path)])
    assert args.output_dir == f"outputs/label_preferences/{path.stem}"
    settings = JudgeSettings.of(**{name: getattr(args, name) for name in JudgeFields.__dataclass_fields__})
    assert settings.chat_template_kwargs == yaml.safe_load(text)["chat_template_kwargs"]


def test_a_run_is_printed_and_continued(tmp_path, capsys):
    judge = save_tiny_model(tmp_path / "judge", tokenizer=tiny_tokenizer("llama"), max_position_embeddings=4096)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(4, chat=True)))
    out = tmp_path / "out"
    command = ["label-preferences", "--judge", str(judge), "--dataset_name", str(rows), "--output_dir", str(out)]
    assert main([*command, "--max_rows", "3", "--criteria", "Is it kind?"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 rows are labelled" in printed and "6 answers asked, 0 reused" in printed
    assert "position_bias" in printed and str(out / "preferences.jsonl") in printed
    assert main([*command, "--criteria", "Is it kind?", "--tie_band", "0.01", "--ties", "drop"]) in (0, 1)
    assert json.loads((out / "report.json").read_text())["answers"] == {"asked": 2, "reused": 6}
    assert main([*command, "--labels", "certainly", "never"]) == 1
    assert "is not a single token" in capsys.readouterr().err
    assert main([*command, "--template", str(tmp_path / "no.jinja")]) == 1
    assert "no.jinja" in capsys.readouterr().err
