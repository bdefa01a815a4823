"""Adapters on one base: switched without a trace, refused where the base is not theirs."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.models.helpers import scores_of
from tests.scoring.ensemble_helpers import largest_difference, rows, save_members
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.models import SidecarError, load_reward_model
from trl_ext.models.ensemble.shared_base import base_key, load_adapters, use_adapter
from trl_ext.models.loading import BaseMismatchError
from trl_ext.models.sidecar import get_sidecar, read_sidecar


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return save_members(tmp_path_factory.mktemp("members"), number=2)


def test_each_adapter_scores_as_it_does_alone_and_nothing_stays(members):
    model, names = load_adapters(members)
    alone = [scores_of(load_reward_model(path)) for path in members]
    before = get_sidecar(model), model.active_adapter, [p.requires_grad for p in model.parameters()]
    for place in (1, 0, 1):
        sidecar = read_sidecar(members[place])
        with use_adapter(model, names[place], sidecar):
            assert get_sidecar(model) is sidecar
            assert torch.equal(scores_of(model), alone[place])
    assert before[1:] == (model.active_adapter, [p.requires_grad for p in model.parameters()])
    assert torch.equal(scores_of(model), alone[0])


def test_an_error_inside_puts_everything_back(members):
    model, names = load_adapters(members)
    want = scores_of(model)
    with pytest.raises(KeyError), use_adapter(model, names[1]):
        raise KeyError
    assert torch.equal(scores_of(model), want)


def test_what_two_adapters_must_share(members, tmp_path):
    assert base_key(members[0]) == base_key(members[1])
    other = shutil.copytree(members[1], tmp_path / "other")
    content = json.loads((other / "reward_model.json").read_text())
    for change in ({"base": content["base"] | {"dtype": "bfloat16"}}, {"num_labels": 2}, {"is_adapter": False}):
        (other / "reward_model.json").write_text(json.dumps(content | change))
        assert base_key(other) != base_key(members[0])
        with pytest.raises(SidecarError, match="cannot share a base"):
            load_adapters([members[0], other])
    (other / "reward_model.json").unlink()
    assert base_key(other) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=str,
)
def test_an_adapter_that_changes_the_base_is_not_put_on_a_policy(members, tmp_path, settings):
    other = shutil.copytree(members[1], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | settings))
    policy = AutoModelForCausalLM.from_pretrained(members[0].parent / "base").requires_grad_(False)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    for load in (
        lambda: load_adapters([members[0], other], policy),
        lambda: RewardEnsemble([other], base_model=policy),
    ):
        with pytest.raises(ValueError, match=f"sets {next(iter(settings))}=.*Leave `base_model` out"):
            load()
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())


def test_arguments_of_loading_are_not_for_a_base_in_memory(members):
    policy = AutoModelForCausalLM.from_pretrained(members[0].parent / "base").requires_grad_(False)
    with pytest.raises(TypeError, match="dtype"):
        load_adapters(members, policy, dtype="bfloat16")


def test_a_policy_that_loading_changes_is_noticed(members, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(members[0].parent / "base").requires_grad_(False)
    monkeypatch.setattr("trl_ext.models.ensemble.shared_base.changes_of", lambda folder: [])  # as if PEFT hid it
    load = PeftModel.from_pretrained

    def spoil(model, *args, **kwargs):
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
        return load(model, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "from_pretrained", spoil)
    with pytest.raises(BaseMismatchError, match="changed 1 weights of the model in memory .*q_proj.weight"):
        load_adapters(members, policy)


def test_a_base_that_moved(members, tmp_path):
    moved = shutil.copytree(members[0].parent / "base", tmp_path / "moved")
    copies = [shutil.copytree(path, tmp_path / path.name) for path in members]
    for copy in copies:
        sidecar = read_sidecar(copy)
        sidecar.base.id = str(tmp_path / "gone")
        sidecar.save(copy)
    want = RewardEnsemble(members).score_members(*rows())
    for paths in (copies, copies[:1]):
        found = RewardEnsemble(paths, base_model=moved).score_members(*rows())
        assert largest_difference(found, [row[: len(paths)] for row in want]) < 1e-6
    policy = AutoModelForCausalLM.from_pretrained(moved).requires_grad_(False)  # the same weights from another place
    assert largest_difference(RewardEnsemble(copies, base_model=policy).score_members(*rows()), want) < 1e-5
    assert RewardScorer(copies[0], base_model=moved)(*rows()) == RewardScorer(members[0])(*rows())
    with pytest.raises(BaseMismatchError, match="gone, which does not exist here"):
        RewardEnsemble(copies)


def test_a_second_adapter_that_does_not_score_as_it_did_is_refused(members, tmp_path):
    other = shutil.copytree(members[1], tmp_path / "other")
    shutil.copy2(members[0] / "adapter_model.safetensors", other)
    with pytest.raises(BaseMismatchError, match="other: scores of 8 probes moved"):
        load_adapters([members[0], other])
