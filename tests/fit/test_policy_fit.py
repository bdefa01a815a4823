"""`trl-ext bench fit` for policies: each phase takes what real steps take; what cannot be estimated is said."""

import importlib
import json
from pathlib import Path

import pytest
import trl.trainer.utils
from peft import LoraConfig
from transformers import AutoConfig

from trl_ext.cli.main import main
from trl_ext.fit import policy_estimate
from trl_ext.fit.policy_estimate import TILE, estimate_policy
from trl_ext.fit.policy_models import PolicyStep, RewardAdapter


ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
SMALL = ("gradient_accumulation_steps=2", "max_completion_length=12", "num_generations=2")


def shape_config(layers=2):
    return AutoConfig.for_model("qwen3", **SHAPE | {"num_hidden_layers": layers})


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


def test_a_layer_more_needs_its_cache_in_generation():
    sizes = dict(peft_config=adapter(8), prompt=2, completion=62)
    two, three = (estimate_policy(step(config=shape_config(number), **sizes)) for number in (2, 3))
    own = [sum(found.weights.values()) + found.optimizer for found in (two, three)]
    cache = 2 * 16 * 2 * (2 + 62) * 16 * 4  # keys and values, rows, heads, tokens, size of a head, bytes
    grown = three.phases["generation"] - own[1] - (two.phases["generation"] - own[0])
    assert grown == pytest.approx(cache, rel=0.02)  # the last token may be missing


def test_a_policy_with_all_weights_has_a_separate_reference_and_critic():
    found = estimate_policy(step(critic=True, reference=True, passes=3))
    language = found.weights["trained"]
    assert found.weights["reference"] == pytest.approx(language, rel=0.01)
    assert found.weights["critic"] == pytest.approx(language - 4 * 64 * 256, rel=0.01)  # no language-model head
    assert found.optimizer == pytest.approx(2 * (language + found.weights["critic"]), rel=0.01)


def test_the_gradients_of_a_cut_accumulation_are_there_in_generation():
    plain, late = (estimate_policy(step(peft_config=adapter(8), gradients_in_generation=x)) for x in (False, True))
    gradients = 4 * plain.trained_parameters
    assert late.phases["generation"] == plain.phases["generation"] + gradients
    assert late.phases["policy"] == plain.phases["policy"]


def test_the_tile_of_logits_is_that_of_trl():
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    assert TILE == (kernels.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    found = estimate_policy(step(peft_config=adapter(8), bf16=True))
    assert found.logits == 4 * 24 * TILE[1] * 2  # all tokens of the completions of a micro-batch, in bf16


def test_what_vllm_takes_is_added(tmp_path, shape):
    use = ("use_vllm=true", "vllm_gpu_memory_utilization=0.25", "vllm_mode=colocate")
    report = fit(tmp_path, shape, "ppo/qlora_8b.yaml", "--estimate", override=use)
    assert report["estimate"]["gib"]["weights: vLLM"] == pytest.approx(6.0)
    assert "generation" not in report["estimate"]["phases_gib"]
    asleep = estimate_policy(step(peft_config=adapter(8), generates=False, vllm=2**30, vllm_sleeps=True))
    assert asleep.phases["generation"] > 2**30 > asleep.phases["policy"] and "vLLM" not in asleep.weights


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


def test_a_saved_reward_adapter_has_its_own_rank(tmp_path, shape):
    sidecar = {
        "base": {"id": str(shape), "dtype": "float32"},
        "is_adapter": True,
        "head_modules": ["score"],
        "token_policy": {},
    }
    folder = tmp_path / "reward"
    adapter(2).save_pretrained(folder)
    (folder / "reward_model.json").write_text(json.dumps(sidecar))
    override = (f"reward_funcs=[{folder}]", "dtype=float32", f"value_model={folder}")
    gib = fit(tmp_path, shape, "ppo/a2c_lora_0.6b.yaml", "--estimate", override=override)["estimate"]["gib"]
    assert gib["weights: rewards"] == gib["weights: critic"]
    expected = 2 / 16 * gib["weights: trained"] * 2**30 + 4 * 64  # of rank 2, with a head; the policy has rank 16
    assert gib["weights: rewards"] * 2**30 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sizes_of_many_equal_layers_follow_from_few(checkpointing, monkeypatch):
    lora = adapter(8)
    given = dict(peft_config=lora, critic=True, rewards=[RewardAdapter(lora, False, True)], passes=2, bf16=True)
    deep = step(accumulates=True, checkpointing=checkpointing, config=shape_config(8), **given)
    few = estimate_policy(deep)
    monkeypatch.setattr(policy_estimate, "FEW_LAYERS", (8, 9))  # too many for this model
    assert estimate_policy(deep) == few
