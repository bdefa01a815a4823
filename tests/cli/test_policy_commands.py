"""`trl-ext dense-grpo` and `trl-ext ppo`: recipes are parsed, and a run leaves what it should."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, lora, trainer_for
from trl_ext import RewardScorer
from trl_ext.cli.main import main
from trl_ext.scoring import SharedBaseScorer


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for kind in ("dense_grpo", "ppo", "ranked_dpo") for path in (ROOT / "configs" / kind).glob("*.yaml")
)


def test_there_are_recipes():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_parsed_and_says_where_its_numbers_are_from(path):
    text = path.read_text()
    header, name = text.split("\n\n")[0], path.relative_to(ROOT).as_posix()
    assert f"trl-ext {path.parent.name.replace('_', '-')} --config {name}" in header
    assert f"accelerate launch -m trl_ext.cli.{path.parent.name} --config {name}" in header
    assert "Memory: " in header and json.loads(re.search(r"\{.*\}", header)[0])["prompt"]
    for line in text.splitlines():
        if re.match(r"(?!model_name|dataset_name|output_dir|reward_funcs|dense_reward_funcs)\w+: .*\d", line):
            assert "#" in line or line.startswith("value_model"), f"no source beside: {line}"
    module = importlib.import_module(f"trl_ext.cli.{path.parent.name}")
    parsed = module.make_parser().parse_args_and_config(["--config", str(path), "--bf16", "false", "--use_cpu"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    wanted = yaml.safe_load(text)
    assert {name: values[name] for name in wanted} == wanted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2")


def test_ppo_puts_reward_and_critic_on_the_policy_s_base(base, tmp_path, capsys):
    reward = tmp_path / "reward"
    trainer = trainer_for(str(base), config(reward, max_steps=1), pair_rows(8), peft_config=lora(r=2))
    trainer.train()
    trainer.save_model()
    wanted = RewardScorer(reward)(["one"], ["two"])
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two")))
    (tmp_path / "own.py").write_text(
        "def halves(completion_texts, **columns):\n"
        "    return [[(0, len(t) // 2, 1.0)] if len(t) > 1 else None for t in completion_texts]\n"
    )
    out = tmp_path / "out"
    status = main(
        ["ppo", "--config", str(ROOT / "configs/ppo/a2c_lora_0.6b.yaml"), "--use_cpu", "--bf16", "false"]
        + ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows"), "--output_dir", str(out)]
        + [
            "--reward_funcs",
            str(reward),
            "--dense_reward_funcs",
            f"{tmp_path / 'own.py'}:halves",
            "--dtype",
            "float32",
        ]
        + ["--value_model", str(reward), "--max_steps", "1", "--per_device_train_batch_size", "2"]
        + ["--gradient_accumulation_steps", "1", "--max_completion_length", "4"]
    )
    assert status == 0
    assert "Report: " in capsys.readouterr().out and (out / "policy.html").is_file()
    assert (out / "adapter_config.json").is_file()
    assert (out / "critic" / "value" / "reward_model.json").is_file()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/reward/mean", "rewards/dense/mean", "critic/value_loss"} <= set(history[0])
    scorer = SharedBaseScorer(reward)
    with pytest.raises(RuntimeError, match="no base yet"):
        scorer(["one"], ["two"])
    scorer.use_base(RewardScorer(reward).model)
    assert scorer(["one"], ["two"]) == pytest.approx(wanted, abs=1e-5)


def test_ranked_dpo_saves_a_policy(base, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked_rows(4, k=3)))
    out = tmp_path / "out"
    recipe = [
        "ranked-dpo",
        "--config",
        str(ROOT / "configs/ranked_dpo/lora_0.6b.yaml"),
        "--use_cpu",
        "--bf16",
        "false",
    ]
    recipe += ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path), "--output_dir", str(out)]
    assert main([*recipe, "--dtype", "float32", "--max_steps", "1", "--eval_steps", "1"]) == 0
    assert "Saved the model to" in capsys.readouterr().out and (out / "adapter_config.json").is_file()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_rewards/accuracies" in entry for entry in history)


def test_what_is_missing_is_one_line(tmp_path, capsys):
    common = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    assert main(["dense-grpo", *common]) == 1
    assert "No model was named" in capsys.readouterr().err
    assert main(["ppo", *common, "--model_name_or_path", "x"]) == 1
    assert "No reward was named" in capsys.readouterr().err
