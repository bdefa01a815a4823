"""`trl-ext bench fit` for rejection sampling and weak-to-strong: a phase's estimate is what the phase really takes."""

import argparse
import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from transformers import AutoConfig

from trl_ext.cli.main import main
from trl_ext.fit.phase_report import phases_table
from trl_ext.fit.pipelines import rejection_phases, weak_to_strong_phases
from trl_ext.models.sidecar import BaseModel, Sidecar


ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=192)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The configs with architectures of a few thousand numbers; a vocabulary that makes logits count."""
    folder = tmp_path_factory.mktemp("configs")
    for name, width in (("weak", 32), ("strong", 64)):
        shape = dict(SHAPE, hidden_size=width, vocab_size=2048, max_position_embeddings=4096)
        AutoConfig.for_model("qwen3", **shape).save_pretrained(folder / name)
    weak, strong = str(folder / "weak"), str(folder / "strong")
    for file in (ROOT / "configs").glob("*/*.yaml"):
        values = yaml.safe_load(file.read_text())
        if "model_name_or_path" in values:
            values["model_name_or_path"] = strong
        if "strong_model_name_or_path" in values:
            values |= {"weak_model_name_or_path": [weak], "strong_model_name_or_path": [strong]}
        if "max_length" in values:
            values["max_length"] = 64
        if "max_completion_length" in values:
            values["max_completion_length"] = 24
        own = folder / file.parent.name / file.name
        own.parent.mkdir(exist_ok=True)
        own.write_text(yaml.safe_dump(values))
    return folder


def fit(tmp_path, config, *arguments):
    assert main(["bench", "fit", "--config", str(config), "--output_dir", str(tmp_path), *arguments]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    return report, {case["phase"]: case for case in report["phases"]}


@pytest.mark.parametrize(
    "config,expected,same",
    [
        (
            "rejection_sampling/in_process_0.6b.yaml",
            ["generation (transformers)", "scoring (rankings_lora_0.6b)", "fine-tuning (SFT)"],
            [],
        ),
        (
            "weak_to_strong/generation_kd_0.6b_to_1.7b.yaml",
            ["weak: training", "weak: writing", "ceiling: training", "ceiling: writing", "student: training"],
            ["student: writing"],
        ),
        pytest.param(
            "weak_to_strong/preference_qlora_0.5b_to_8b.yaml",
            ["weak: training", "weak: judging", "ceiling: training", "ceiling: judging"],
            ["student: training", "student: judging"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "rejection_sampling/multi_gpu_8b.yaml",
            ["generation (transformers)", "scoring (rankings_qlora_8b)"],
            ["scoring (accuracy_reward)", "fine-tuning"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_estimate_of_a_phase_is_what_it_takes(config, expected, same, configs, tmp_path, capsys):
    report, phases = fit(tmp_path, configs / config, "--no_changes", "--steps", "1", "--prompt_length", "40")
    assert sorted(phases) == sorted([*expected, *same])
    for name in expected:
        measured, estimate = phases[name]["measured"], phases[name]["estimate"]
        assert abs(measured["error"]) < 0.1, (name, measured)
        assert measured["text_tokens_per_second"] > 0 and measured["fits"] is None
        assert estimate["total_gib"] == pytest.approx(sum(estimate["gib"].values()))
        if "gradients_gib" in measured:
            assert measured["gradients_gib"] == pytest.approx(estimate["gib"]["gradients"])
            assert measured["optimizer_gib"] == pytest.approx(estimate["gib"]["optimizer"], rel=0.02)
    known = {name: case["estimate"]["total_gib"] for name, case in phases.items() if case["estimate"]}
    assert report["largest"] == max(known, key=known.get)
    printed = capsys.readouterr().out
    assert f"The largest is {report['largest']}" in printed and "take turns" in printed
    assert all(phases[name]["measured"] is None and phases[name]["note"] for name in same)


def test_a_teacher_and_logits_count(configs, tmp_path):
    config = configs / "weak_to_strong/generation_kd_0.6b_to_1.7b.yaml"
    _, kd = fit(tmp_path, config, "--estimate", "--no_changes")
    _, sft = fit(tmp_path, config, "--estimate", "--no_changes", "--override", "student_loss=sft")
    weak = kd["weak: training"]["estimate"]["gib"]["weights: trained"]
    assert kd["student: training"]["estimate"]["gib"]["weights: teacher"] == pytest.approx(weak, rel=0.01)
    assert "weights: teacher" not in kd["ceiling: training"]["estimate"]["gib"]
    # the student's distribution over the vocabulary, and the teacher's beside it, of 4 rows of 24 tokens in fp32
    more = [legs["student: training"]["estimate"]["gib"]["activations"] for legs in (kd, sft)]
    assert more[0] - more[1] > 4 * 24 * 2048 * 4 / 2**30
    # bf16 logits of all 4 x 64 tokens become fp32 at the end of autocast
    assert kd["weak: training"]["estimate"]["gib"]["logits"] == pytest.approx(4 * 64 * 2048 * 4 / 2**30)


@pytest.mark.slow
def test_a_change_of_the_largest_phase_is_advised(configs, tmp_path, capsys):
    config = configs / "weak_to_strong/generation_kd_0.6b_to_1.7b.yaml"
    plain, phases = fit(tmp_path, config, "--estimate")
    assert plain["largest"] == "student: training" and plain["fits"]
    halved = next(case for case in plain["changes"] if case["name"].startswith("half the rows"))
    assert halved["gib"] < 0.7 * phases["student: training"]["estimate"]["total_gib"]
    others = max(
        case["estimate"]["total_gib"] for case in plain["phases"] if not case["phase"].startswith("student: t")
    )
    card = max(others, halved["gib"]) * 1.001
    tight, _ = fit(tmp_path, config, "--estimate", "--gpu_memory", str(card), "--reserve", "0")
    assert not tight["fits"] and "does not fit" in capsys.readouterr().out
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 16" in tight["advice"]


def test_a_change_may_make_several_phases_fit(configs, tmp_path, capsys):
    config = configs / "weak_to_strong/generation_kd_0.6b_to_1.7b.yaml"
    weak = "weak_training={learning_rate: 1.0e-5, per_device_train_batch_size: 1}"
    card = ["--gpu_memory", str(6 / 1024), "--reserve", "0", "--override", weak]
    report, phases = fit(tmp_path, config, "--estimate", *card)
    assert [name for name, case in phases.items() if not case["fits"]] == ["ceiling: training", "student: training"]
    assert "does not fit (ceiling: training, student: training)" in capsys.readouterr().out
    assert report["advice"].startswith("To make it fit: half the rows in a batch, twice the accumulation")


def test_a_phase_that_nothing_can_change_hides_no_advice(configs, tmp_path):
    # judging is the largest and fits in halves, training is smaller and does not
    config = configs / "weak_to_strong/preference_qlora_0.5b_to_8b.yaml"
    gpu = ["--estimate", "--reserve", "0", "--gpu_memory"]
    _, phases = fit(tmp_path, config, *gpu, "24", "--no_changes")
    sizes = {name: case["estimate"]["total_gib"] for name, case in phases.items() if name.endswith(": training")}
    report, phases = fit(tmp_path, config, *gpu, str(0.99 * max(sizes.values())))
    assert report["largest"] == "ceiling: judging" and phases["ceiling: judging"]["fits"] and not report["fits"]
    assert report["changed"] == max(sizes, key=sizes.get)
    assert report["advice"].startswith("To make it fit: half the rows")


def test_changes_of_a_weak_model_are_arguments_of_the_weak_model(configs):
    args = argparse.Namespace(config=str(configs / "weak_to_strong/preference_qlora_0.5b_to_8b.yaml"), override=[])
    args.prompt_length = args.completion_length = args.candidates = None
    weak, *_ = weak_to_strong_phases(args)
    by_name = {change.name: change.values for change in weak.changes}
    assert by_name["LoRA"] == {"weak_use_peft": True}
    assert by_name["no gradient checkpointing"]["weak_training"]["gradient_checkpointing"] is False
    assert by_name["no gradient checkpointing"]["weak_training"]["learning_rate"] == 1.0e-5


def test_a_batch_that_scorers_would_halve_is_no_reason_against(configs, tmp_path):
    config = configs / "rejection_sampling/in_process_0.6b.yaml"
    _, phases = fit(tmp_path, config, "--estimate", "--no_changes", "--prompt_length", "40")
    scoring = phases["scoring (rankings_lora_0.6b)"]["estimate"]
    small = ["--reserve", "0", "--gpu_memory", str(scoring["total_gib"] / 2)]
    _, tight = fit(tmp_path, config, "--estimate", "--no_changes", "--prompt_length", "40", *small)
    found = tight["scoring (rankings_lora_0.6b)"]
    assert found["fits"] and "in halves" in found["note"]


@pytest.mark.parametrize(
    "config,override,words",
    [
        ("rejection_sampling/vllm_8b.yaml", [], "generation (vllm): not estimated: vLLM takes the share"),
        ("rejection_sampling/vllm_8b.yaml", ["reward_funcs=[outputs/none]"], "outputs/none is not there yet"),
        ("rejection_sampling/vllm_8b.yaml", ["reward_funcs=[outputs/ensemble/rankings_lora_0.6b]"], "is an ensemble"),
        ("rejection_sampling/in_process_0.6b.yaml", ["backend=openai"], "another program's server has the model"),
    ],
)
def test_what_is_not_estimated_is_said_in_the_output(config, override, words, configs, tmp_path, capsys):
    overrides = ["--override", *override] if override else []
    report, phases = fit(tmp_path, configs / config, "--estimate", "--no_changes", *overrides)
    assert words in capsys.readouterr().out
    assert report["not_estimated"] and all(phases[name]["estimate"] is None for name in report["not_estimated"])
    assert f"but for {', '.join(report['not_estimated'])}" in phases_table({**report, "machine": ""}) or not any(
        case["estimate"] for case in report["phases"]
    )


def test_the_size_of_a_saved_reward_model_is_read_from_its_folder(configs, tmp_path):
    saved = tmp_path / "saved"
    LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS").save_pretrained(saved)
    base = BaseModel(str(configs / "strong"), "bfloat16", quantization={"load_in_4bit": True})
    Sidecar(base, is_adapter=True, head_modules=["score"], token_policy={}).save(saved)
    config, override = configs / "rejection_sampling/in_process_0.6b.yaml", f"reward_funcs=[{saved}]"
    _, phases = fit(tmp_path, config, "--estimate", "--no_changes", "--override", override)
    found = phases["scoring (saved)"]
    assert found["model"] == base.id and found["note"] == f"reward model by the folder {saved}"
    adapter_and_head = 2 * 4 * (64 + 64) + 64  # the adapter of 2 layers, and the head, in fp32
    assert found["estimate"]["gib"]["weights: base, 4-bit"] > 0
    plain = AutoConfig.from_pretrained(configs / "strong")
    rest = found["estimate"]["gib"]["weights: base"] * 2**30 - 2 * plain.vocab_size * plain.hidden_size
    assert 4 * adapter_and_head < rest < 4 * adapter_and_head + 4096  # norms, positions, the head as it was


def test_selected_rows_may_be_learnt_by_a_config_of_sft(configs, tmp_path):
    own = tmp_path / "sft.yaml"
    own.write_text(yaml.safe_dump({"output_dir": "x", "dataset_name": "rows", "per_device_train_batch_size": 2}))
    config = configs / "rejection_sampling/in_process_0.6b.yaml"
    _, plain = fit(tmp_path, config, "--estimate", "--no_changes")
    _, full = fit(tmp_path, config, "--estimate", "--no_changes", "--sft_config", str(own))
    assert "QLoRA and TRL's defaults" in plain["fine-tuning (SFT)"]["note"]
    assert full["fine-tuning (SFT)"]["note"] == f"by {own}"
    gib = full["fine-tuning (SFT)"]["estimate"]["gib"]
    assert gib["gradients"] == gib["weights: trained"] and full["fine-tuning (SFT)"]["batch"].startswith("2 x")


def test_rows_of_sft_are_as_long_as_they_are(configs, tmp_path):
    """And cut at its max_length, which is 1,024."""
    config = configs / "rejection_sampling/in_process_0.6b.yaml"
    for prompt, completion, expected in (("900", "100", "900 + 100"), ("900", "500", "524 + 500")):
        lengths = ["--prompt_length", prompt, "--completion_length", completion]
        _, phases = fit(tmp_path, config, "--estimate", "--no_changes", *lengths)
        assert phases["fine-tuning (SFT)"]["batch"] == f"8 x ({expected})"


def test_lengths_that_are_given_are_not_halved(configs):
    args = argparse.Namespace(config=str(configs / "rejection_sampling/in_process_0.6b.yaml"), override=[])
    args.prompt_length = args.candidates = args.sft_config = None
    args.seed = 0
    for given, offered in ((None, True), (20, False)):
        args.completion_length = given
        generation, *_ = rejection_phases(args)
        assert any(change.name == "half the max_completion_length" for change in generation.changes) is offered


@pytest.mark.parametrize(
    "config,arguments,words",
    [
        ("rejection_sampling/in_process_0.6b.yaml", ["--candidates", "3"], "num_generations says how many"),
        ("weak_to_strong/generation_kd_0.6b_to_1.7b.yaml", ["--candidates", "3"], "--candidates has no meaning here"),
        ("weak_to_strong/preference_qlora_0.5b_to_8b.yaml", ["--sft_config", "x"], "this is a config of weak_to_str"),
        (
            "weak_to_strong/preference_qlora_0.5b_to_8b.yaml",
            ["--prompt_length", "60", "--completion_length", "9"],
            "are 69 tokens, and the config's max_length is 64",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(config, arguments, words, configs, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "fit", "--estimate", "--no_changes", "--config", str(configs / config), *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "config,override,words",
    [
        ("rejection_sampling/in_process_0.6b.yaml", "temperature=0", "temperature=0 gives 8 times the same"),
        ("rejection_sampling/in_process_0.6b.yaml", "reward_weights=[1.0, 2.0]", "reward_weights has 2 numbers"),
        ("rejection_sampling/in_process_0.6b.yaml", "selection=nope", "Unknown selector 'nope'"),
        (
            "rejection_sampling/in_process_0.6b.yaml",
            "max_completion_length=4000",
            "more than the model's 4096 positions",
        ),
        ("weak_to_strong/preference_qlora_0.5b_to_8b.yaml", "loss_type=nope", "Unknown ranking loss 'nope'"),
        ("weak_to_strong/preference_qlora_0.5b_to_8b.yaml", "weak_training={nope: 1}", "has no argument 'nope'"),
        ("weak_to_strong/preference_qlora_0.5b_to_8b.yaml", "student_loss=kd", "does not go with task='preference'"),
    ],
)
def test_what_the_command_refuses_is_refused(config, override, words, configs, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "fit", "--estimate", "--config", str(configs / config), "--override", override])
    assert words in capsys.readouterr().err
