"""Adapters on one base: switched without a trace, refused where the base is not theirs."""

import json
import shutil

import pytest
import torch

from tests.models.helpers import scores_of
from tests.scoring.ensemble_helpers import save_members
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


def test_a_second_adapter_that_does_not_score_as_it_did_is_refused(members, tmp_path):
    other = shutil.copytree(members[1], tmp_path / "other")
    shutil.copy2(members[0] / "adapter_model.safetensors", other)
    with pytest.raises(BaseMismatchError, match="other: scores of 8 probes moved"):
        load_adapters([members[0], other])
