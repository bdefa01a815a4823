"""`trl-ext bench fit` for policies: each phase takes what real steps take; what cannot be estimated is said."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoConfig

from tests.fit.shape import SHAPE
from trl_ext.cli.main import main
from trl_ext.fit.policy_estimate import estimate_policy
from trl_ext.fit.policy_models import PolicyStep, RewardAdapter


ROOT = Path(__file__).resolve().parents[2]
SMALL = ("gradient_accumulation_steps=2", "max_completion_length=12", "num_generations=2")


def shape_config(layers=2):
    return AutoConfig.for_model("qwen3", **SHAPE | {"vocab_size": 256, "num_hidden_layers": layers})


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The folder of an architecture: a config and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    shape_config().save_pretrained(folder)
    return folder


def fit(tmp_path, shape, config, *arguments, override=()):
    status = main(
        ["bench", "fit", "--config", str(ROOT / "configs" / config), "--output_dir", str(tmp_path), *arguments]
        + ["--prompt_length", "8", "--no_changes"]
        + ["--override", f"model_name_or_path={shape}", *SMALL, *override]
    )
    assert status == 0
    return json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,override",
    [
        ("ppo/qlora_8b.yaml", ()),
        ("ppo/a2c_lora_0.6b.yaml", ()),
        ("dense_grpo/math_prm_qlora_8b.yaml", ("per_device_train_batch_size=4",)),
        ("dense_grpo/fine_grained_lora_0.6b.yaml", ("gradient_checkpointing=false", "per_device_train_batch_size=4")),
    ],
)
def test_each_phase_takes_what_real_steps_take(config, override, tmp_path, shape, capsys):
    report = fit(tmp_path, shape, config, "--steps", "1", override=override)
    measured, estimate = report["measured"], report["estimate"]
    phases = {"generation", "rewards", "policy", *(["critic"] if config.startswith("ppo") else [])}
    assert set(measured["phases_gib"]) == set(estimate["phases_gib"]) == phases
    assert measured["estimated_phases_gib"] == pytest.approx(measured["phases_gib"], rel=0.1)
    assert abs(measured["error"]) < 0.05
    assert measured["optimizer_gib"] == pytest.approx(estimate["gib"]["optimizer"], rel=0.02)
    assert estimate["total_gib"] == pytest.approx(sum(estimate["gib"].values()))
    assert estimate["total_gib"] == max(estimate["phases_gib"].values())
    printed = capsys.readouterr().out
    assert "while it is in the phase" in printed and "estimated as adapters like the policy's: outputs/" in printed


def step(**kwargs):
    sizes = {"config": shape_config(), "prompt": 8, "completion": 24, "generated": 16, "group": 4, "rows": 4}
    return PolicyStep(**(sizes | kwargs))


def adapter(rank):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def test_weights_and_the_cache_are_those_worked_out_by_hand():
    lora, small = adapter(8), adapter(4)
    found = estimate_policy(
        step(peft_config=lora, critic=True, critic_config=small, rewards=[RewardAdapter(small, False, True)])
    )
    # (outputs, inputs) of a layer: q, k, v, o, gate, up, down
    linear = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    numbers = 2 * sum(rows + columns for rows, columns in linear)  # of both layers, for each rank
    assert found.weights["trained"] == 4 * 8 * numbers
    assert found.weights["critic"] == found.weights["rewards"] == 4 * (4 * numbers + 64)  # with a head
    assert found.trained_parameters == 12 * numbers + 64
    assert found.optimizer == 8 * found.trained_parameters
    assert found.peak == max(found.phases.values()) == sum(found.parts().values())


@pytest.mark.parametrize(
    "override,words",
    [
        (["load_in_4bit=false", "load_in_8bit=true"], "8-bit"),
        (["share_base=false"], "no adapter on the policy's base"),
        (["use_peft=false", "load_in_4bit=false"], "no adapter on the policy's base"),
        (["reward_funcs=[judge.yaml]"], "no adapter on the policy's base"),
        (["reward_funcs=null"], "No reward was named"),
        (["optim=lion_32bit"], "is not known here"),
        (["cache_implementation=static"], "cache_implementation"),
        (["gae_lambda=2"], "gae_lambda=2"),
    ],
)
def test_what_cannot_be_estimated_is_said(override, words, shape, capsys):
    with pytest.raises(SystemExit):
        main(
            ["bench", "fit", "--estimate", "--config", str(ROOT / "configs/ppo/qlora_8b.yaml")]
            + ["--override", f"model_name_or_path={shape}", *override]
        )
    assert words in capsys.readouterr().err
