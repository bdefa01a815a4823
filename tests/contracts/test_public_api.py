"""The public names: what there is, where it lives, and what it may be called with."""

import dataclasses
import importlib
import inspect
from importlib import metadata
from typing import get_type_hints

import pytest
import trl

import trl_ext


NAMES = sorted(set(trl_ext.__all__) - {"__version__"})


def test_there_are_public_names():
    assert set(NAMES) == set(trl_ext._HOME)
    assert {"RewardConfig", "RewardTrainer", "RewardScorer", "load_reward_model", "merge_reward_model"} <= set(NAMES)
    assert dir(trl_ext) == sorted(trl_ext.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_resolves_is_documented_and_is_its_home_s(name):
    value = getattr(trl_ext, name)
    assert value is getattr(importlib.import_module(trl_ext._HOME[name]), name)
    assert inspect.getdoc(value)


def test_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="RewardTrainer"):
        trl_ext.NoSuchTrainer  # noqa: B018


def test_star_import_gives_every_public_name():
    names: dict = {}
    exec("from trl_ext import *", names)
    assert set(trl_ext.__all__) <= set(names) and names["RewardTrainer"].__module__.startswith("trl_ext.trainers")


def test_losses_are_importable_by_name():
    from trl_ext.losses import bradley_terry, listnet, pairwise, plackett_luce, pointwise

    for loss in (bradley_terry, listnet, pairwise, plackett_luce, pointwise):
        parameters = inspect.signature(loss).parameters
        assert list(parameters)[:3] == ["scores", "ratings", "mask"]
        assert all(item.kind is item.KEYWORD_ONLY for item in list(parameters.values())[3:])


def test_trainer_is_a_drop_in():
    assert issubclass(trl_ext.RewardTrainer, trl.RewardTrainer)
    assert issubclass(trl_ext.RewardConfig, trl.RewardConfig)
    ours = inspect.signature(trl_ext.RewardTrainer).parameters
    theirs = inspect.signature(trl.RewardTrainer).parameters
    takes_any = any(item.kind is item.VAR_KEYWORD for item in ours.values())
    assert takes_any or set(theirs) <= set(ours)


def test_config_keeps_the_defaults_of_trl():
    theirs = {field.name: field for field in dataclasses.fields(trl.RewardConfig)}
    ours = {field.name: field for field in dataclasses.fields(trl_ext.RewardConfig)}
    assert set(theirs) <= set(ours)
    assert {name: ours[name].default for name in theirs} == {name: field.default for name, field in theirs.items()}


def test_new_config_fields_survive_trl_s_parser():
    """`bool | str` loses its bool on the way through `TrlParser`; a `Literal` of both does not."""
    hints = get_type_hints(trl_ext.RewardConfig)
    new = set(hints) & {field.name for field in dataclasses.fields(trl_ext.RewardConfig)}
    new -= {field.name for field in dataclasses.fields(trl.RewardConfig)}
    assert "loss_type" in new
    assert not {name for name in new if {bool, str} <= set(getattr(hints[name], "__args__", ()))}
    parser = trl.TrlParser((trl_ext.RewardConfig,))
    (default,) = parser.parse_args_and_config(["--output_dir", "x", "--use_cpu", "--bf16", "false"])
    direct = trl_ext.RewardConfig(output_dir="x", use_cpu=True, bf16=False)
    assert {name: getattr(default, name) for name in new} == {name: getattr(direct, name) for name in new}


def test_scorer_signature():
    parameters = inspect.signature(trl_ext.RewardScorer).parameters
    assert list(parameters)[0] == "model_or_path"
    for name in ("processing_class", "batch_size", "max_length", "device"):
        assert name in parameters
    call = inspect.signature(trl_ext.RewardScorer.__call__).parameters
    assert list(call)[1:3] == ["prompts", "completions"]
    assert any(item.kind is item.VAR_KEYWORD for item in call.values())


def test_checkpoint_functions():
    assert list(inspect.signature(trl_ext.load_reward_model).parameters)[0] == "path"
    assert list(inspect.signature(trl_ext.merge_reward_model).parameters)[:3] == ["path", "output_dir", "dtype"]


def test_version_is_that_of_the_distribution():
    try:
        installed = metadata.version("trl-ext")
    except metadata.PackageNotFoundError:
        pytest.skip("trl-ext is not installed, only on the path")
    assert installed == trl_ext.__version__
