"""`trl-ext bench fit`: the estimate agrees with what real steps of each trainer take, and changes are estimated."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoConfig
from transformers.utils import is_flash_attn_2_available

from tests.fit.shape import SHAPE
from trl_ext.cli.main import main
from trl_ext.fit import runs as fit_runs
from trl_ext.fit.changes import advise, changes
from trl_ext.fit.limits import ESTIMATES, Knob, largest, sentence


ROOT = Path(__file__).resolve().parents[2]
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The folder of an architecture: a config and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    AutoConfig.for_model("qwen3", **SHAPE).save_pretrained(folder)
    return folder


def fit(tmp_path, shape, config, *arguments, override=()):
    overrides = [f"model_name_or_path={shape}", "max_length=96", *override]
    status = main(
        ["bench", "fit", "--config", str(ROOT / "configs" / config), "--output_dir", str(tmp_path), *arguments]
        + ["--override", *overrides]
    )
    assert status == 0
    assert (tmp_path / "bench.png").is_file() == HAS_MATPLOTLIB
    return json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.parametrize(
    "config,override,flat",
    [
        ("reward/rankings_qlora_8b.yaml", (), True),
        pytest.param("reward/pairs_full_0.5b.yaml", ("per_device_train_batch_size=2",), True, marks=pytest.mark.slow),
        pytest.param(
            "reward/rankings_lora_0.6b.yaml",
            ("gradient_checkpointing=false", "shared_prefix=false"),
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param("ensemble/rankings_qlora_8b.yaml", (), True, marks=pytest.mark.slow),
        pytest.param("ensemble/rankings_lora_0.6b.yaml", (), True, marks=pytest.mark.slow),
        pytest.param("orm/orm_lora_0.6b.yaml", (), False, marks=pytest.mark.slow),
        ("prm/prm_qlora_8b.yaml", (), False),
        pytest.param("segment/segment_qlora_8b.yaml", (), False, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_real_steps_take(config, override, flat, tmp_path, shape, capsys):
    report = fit(tmp_path, shape, config, "--no_changes", "--steps", "2", override=override)
    measured, estimate = report["measured"], report["estimate"]
    assert measured["flat_batches"] == float(flat)
    assert abs(measured["error"]) < 0.1
    assert measured["gradients_gib"] == pytest.approx(estimate["gib"]["gradients"])
    assert measured["optimizer_gib"] == pytest.approx(estimate["gib"]["optimizer"], rel=0.02)
    assert estimate["total_gib"] == pytest.approx(sum(estimate["gib"].values()))
    printed = capsys.readouterr().out
    assert "The estimate of the activations is" in printed and "the most at one time" in printed
    assert report["fits"] and measured["fits"] is None  # a CPU cannot tell


def test_changes_are_estimated_and_one_is_advised(tmp_path, shape, capsys):
    config = "prm/prm_lora_0.6b.yaml"
    plain = fit(tmp_path, shape, config, "--estimate")
    assert plain["measured"] is None and "Not measured: --estimate" in capsys.readouterr().out
    by_name = {case["name"]: case for case in plain["changes"]}
    faster = by_name["no gradient checkpointing"]
    assert 0.6 < faster["flops_per_row"] / (plain["estimate"]["flops"] / plain["batch"]["rows"]) < 0.75
    assert faster["gib"] > plain["estimate"]["total_gib"]
    assert "no gradient checkpointing (--gradient_checkpointing False)" in plain["advice"]
    limits = {case["name"]: case for case in plain["limits"]}
    assert set(limits) == {"rows in a batch", "tokens of a sequence", "rank of LoRA"}
    assert limits["tokens of a sequence"]["largest"] == 512 and limits["tokens of a sequence"]["bound"] == "limit"
    card = 0.5 * (plain["estimate"]["total_gib"] + by_name["half the max_length"]["gib"])
    tight = fit(tmp_path, shape, config, "--estimate", "--gpu_memory", str(card), "--reserve", "0")
    assert not tight["fits"]
    assert tight["advice"].startswith("To make it fit: ") and "does not fit" in capsys.readouterr().out
    chosen = [case for case in tight["changes"] if case["name"] in tight["advice"]]
    assert chosen and all(case["fits"] and case["gib"] <= card for case in chosen)
    rows = next(case for case in tight["limits"] if case["name"] == "rows in a batch")
    assert rows["largest"] is None or (rows["largest"] < rows["now"] and rows["gib"] <= card)


@pytest.mark.parametrize(
    ("start", "room", "expected"),
    [
        (2, 50.0, (28, "card")),  # 8 + 1.5 v: 28 takes 50
        (64, 50.0, (28, "card")),
        (2, 49.9, (27, "card")),
        (2, 1000.0, (100, "limit")),
        (2, 9.4, (None, "card")),  # not even one fits
    ],
)
def test_the_largest_value_that_fits_is_found(start, room, expected):
    seen = []
    knob = Knob("rows", start, 1, 100, lambda value: None)
    found = largest(lambda value: seen.append(value) or 8.0 + 1.5 * value, knob, room)
    assert (found["largest"], found["bound"]) == expected and found["now"] == start
    assert len(seen) == len(set(seen)) <= ESTIMATES


def test_the_largest_value_keeps_its_step_and_says_when_the_estimates_ran_out():
    found = largest(lambda value: value**2 / 1000, Knob("tokens", 16, 16, 10_000, lambda value: None), 500.0)
    assert found["largest"] % 16 == 0 and found["gib"] == found["largest"] ** 2 / 1000 <= 500.0
    if found["bound"] == "card":
        assert (found["largest"] + 16) ** 2 / 1000 > 500.0
    else:
        assert found["bound"] == "at least" and "at least" in sentence([found], 500.0)
    assert "rows: none" in sentence([dict(name="rows", now=1, largest=None, gib=None, bound="card")], 1.0)


def test_what_learns_the_same_comes_first():
    cases = [
        dict(name="short", values={"a": 1}, same_result=False, gib=1.0, flops_per_row=1.0, fits=True),
        dict(name="slow", values={"b": 2}, same_result=True, gib=2.0, flops_per_row=9.0, fits=True),
        dict(name="big", values={"c": 3}, same_result=True, gib=9.0, flops_per_row=1.0, fits=False),
    ]
    assert advise(cases, dict(fits=False, flops_per_row=8.0)) == "To make it fit: slow (--b 2), 2.0 GiB."
    assert "none of the changes" in advise(cases, dict(fits=True, flops_per_row=8.0))
    assert "No single change" in advise(cases[2:], dict(fits=False, flops_per_row=8.0))


def test_what_learns_the_same_has_as_many_rows_in_a_step():
    model = SimpleNamespace(use_peft=True, load_in_4bit=True, dtype="bfloat16")
    given = dict(
        shared_prefix="auto",
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
        max_length=None,
        gradient_accumulation_steps=2,
    )
    found = set()
    for rows, tokens in ((4, None), (3, None), (1, None), (1, 512)):
        training = SimpleNamespace(per_device_train_batch_size=rows, max_tokens_per_batch=tokens, **given)
        for change in changes("reward", training, model):
            assert change.same_result, change
            new = vars(training) | change.values
            in_a_batch = "per_device_train_batch_size" if tokens is None else "max_tokens_per_batch"
            for values in (vars(training), new):
                values["a step"] = values[in_a_batch] * values["gradient_accumulation_steps"]
            assert new["a step"] == vars(training)["a step"], change
            found.add(change.name)
    assert {
        "one row in a batch, 3 times the accumulation",
        "half the tokens in a batch, twice the accumulation",
    } < found


def test_advice_can_be_pasted_into_a_shell():
    weak = dict(name="weak", values={"weak_training": {"optim": "x"}}, same_result=True, gib=1.0, fits=True)
    said = advise([{**weak, "flops_per_row": 1.0}], dict(fits=False, flops_per_row=1.0))
    assert said == """To make it fit: weak (--weak_training '{"optim": "x"}'), 1.0 GiB."""


def test_a_model_too_large_for_the_cpu_is_only_estimated(tmp_path, shape, monkeypatch):
    monkeypatch.setattr(fit_runs, "MOST_FLOPS_ON_CPU", 1e3)
    report = fit(tmp_path, shape, "reward/rankings_lora_0.6b.yaml", "--no_changes")
    if not torch.cuda.is_available():
        assert report["measured"] is None and "no GPU" in report["not_measured"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--override", "max_length"], "has no value"),
        (["--override", "optim=lion_32bit"], "optim='lion_32bit' is not known here"),
        (["--override", "load_in_4bit=false", "load_in_8bit=true"], "8-bit"),
        (["--override", "model_name_or_path=someone/else"], "whose shape is known"),
        (["--candidates", "0"], "at least 1 token"),
        (["--candidates", "3", "--override", "loss_type=bradley_terry"], "learns from pairs"),
        (["--gpu_memory", "-1"], "must be positive"),
        (["--prompt_length", "1000", "--completion_length", "1000"], "Add --override max_length=2000"),
        (["--override", "attn_implementation=flash_attenton_2"], "flash_attenton_2"),
    ],
)
def test_what_cannot_be_estimated_is_said(arguments, words, shape, capsys):
    config = str(ROOT / "configs/reward/rankings_qlora_8b.yaml")
    if "model_name_or_path" not in "".join(arguments):
        arguments = [*arguments, *([] if "--override" in arguments else ["--override"])]
        arguments.append(f"model_name_or_path={shape}")
    with pytest.raises(SystemExit):
        main(["bench", "fit", "--estimate", "--config", config, *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "config,override,words",
    [
        ("reward/rankings_lora_0.6b.yaml", ["loss_type=nope"], "Unknown ranking loss 'nope'"),
        ("reward/rankings_lora_0.6b.yaml", ["loss_kwargs={x: 1}"], "cannot be called with loss_kwargs={'x': 1}"),
        ("reward/rankings_lora_0.6b.yaml", ["shared_prefix=nope"], "shared_prefix='nope' is not known"),
        ("reward/rankings_lora_0.6b.yaml", ["shared_prefix=true", "pad_to_multiple_of=8"], "shared_prefix=True does"),
        (
            "reward/rankings_lora_0.6b.yaml",
            ["shared_prefix=true", "attn_implementation=flash_attention_2"],
            "shared_prefix=True is not possible",
        ),
        ("reward/rankings_lora_0.6b.yaml", ["max_tokens_per_batch=0"], "max_tokens_per_batch=0 is too small"),
        ("reward/rankings_lora_0.6b.yaml", ["report_to=nope"], "nope is not supported"),
        ("prm/prm_lora_0.6b.yaml", ["loss_type=bce"], "`bce` needs 1 output(s)"),
        ("segment/segment_lora_0.6b.yaml", ["loss_type=nope"], "Unknown token loss 'nope'"),
        ("ensemble/rankings_lora_0.6b.yaml", ["use_peft=false"], "are LoRA adapters"),
        (
            "ensemble/rankings_lora_0.6b.yaml",
            ["max_tokens_per_batch=512"],
            "decides the order of rows",
        ),
    ],
)
def test_what_the_trainer_refuses_is_refused_without_a_run(config, override, words, shape, capsys):
    with pytest.raises(SystemExit):
        main(
            ["bench", "fit", "--estimate", "--config", str(ROOT / "configs" / config)]
            + ["--override", f"model_name_or_path={shape}", *override]
        )
    assert words in capsys.readouterr().err


@pytest.mark.skipif(is_flash_attn_2_available(), reason="the package is installed")
def test_an_attention_that_is_not_installed_is_estimated_and_said(tmp_path, shape, capsys):
    name, config = "attn_implementation=flash_attention_2", "prm/prm_lora_0.6b.yaml"
    flash = fit(tmp_path, shape, config, "--estimate", "--no_changes", override=[name])
    assert "is estimated as 'sdpa'" in flash["note"] and flash["note"] in capsys.readouterr().out
    padded = fit(tmp_path, shape, config, "--estimate", "--no_changes", override=["shared_prefix=false"])
    assert padded["note"] is None and padded["estimate"] == flash["estimate"]
    with pytest.raises(SystemExit):  # a run needs it
        main(
            ["bench", "fit", "--config", str(ROOT / "configs" / config), "--no_changes"]
            + ["--override", f"model_name_or_path={shape}", "max_length=96", name]
        )
    said = capsys.readouterr().err
    assert "attn_implementation='flash_attention_2' cannot be used here" in said and "--estimate needs neither" in said


def test_a_config_that_is_missing_or_empty_is_said(tmp_path, capsys):
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "bad.yaml").write_text("a: [1\n b: 2\n")
    expected = {
        "none.yaml": "none.yaml is no file",
        "empty.yaml": "holds no arguments",
        "bad.yaml": "bad.yaml is no YAML",
    }
    for name, words in expected.items():
        with pytest.raises(SystemExit):
            main(["bench", "fit", "--estimate", "--trainer", "orm", "--config", str(tmp_path / name)])
        assert words in capsys.readouterr().err


def test_a_config_elsewhere_needs_the_trainer(tmp_path, shape, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"model_name_or_path": str(shape), "output_dir": "x", "max_length": 32}))
    with pytest.raises(SystemExit):
        main(["bench", "fit", "--estimate", "--config", str(config)])
    assert "Give --trainer" in capsys.readouterr().err
    arguments = ["--trainer", "orm", "--no_changes", "--output_dir", str(tmp_path)]
    assert main(["bench", "fit", "--estimate", "--config", str(config), *arguments]) == 0


@pytest.mark.parametrize("override", ["sft_coefficient=0.01", "activation_offloading=true"])
def test_what_is_not_estimated_is_refused(override, shape, tmp_path, capsys):
    """The estimate ignored it: of the logits of the SFT loss it knew a fiftieth."""
    arguments = ["bench", "fit", "--config", str(ROOT / "configs/reward/rankings_qlora_8b.yaml")]
    with pytest.raises(SystemExit):
        main([*arguments, "--output_dir", str(tmp_path), "--override", f"model_name_or_path={shape}", override])
    error = capsys.readouterr().err
    assert f"{override.split('=')[0]}=" in error and "is not estimated" in error
