"""The average of reward models: exact deltas of adapters, weights of full models, and members that do not fit."""

import json
import shutil

import pytest
from peft import LoraConfig

from tests.models.helpers import tiny_base, train
from tests.tiny import save_tiny_model
from trl_ext import RewardScorer, merge_reward_model, merge_reward_models
from trl_ext.models import AveragingError, load_reward_model, read_sidecar


TEXTS = ["2 + 2 = 4", "a good answer", "another one that is longer and clear", "no"]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three adapters of other ranks, alphas, scalings and targets on one base, and two full models."""
    folder = tmp_path_factory.mktemp("members")
    base = tiny_base(folder / "base")
    configs = {
        "a": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "b": LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
        "c": LoraConfig(
            r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 2}
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        train(base, folder / name, peft_config=config, learning_rate=3e-2, max_steps=3, seed=seed)
    for seed in (0, 1):
        train(base, folder / f"full-{seed}", learning_rate=1e-2, seed=seed)
    return folder


def averaged_by_hand(members, names, weights):
    """A full model whose weights are the weighted mean of the members' merged ones."""
    models = [
        load_reward_model(members / name).merge_and_unload() if len(name) == 1 else load_reward_model(members / name)
        for name in names
    ]
    states = [model.state_dict() for model in models]
    mean = {key: sum(w * state[key].double() for w, state in zip(weights, states, strict=True)) for key in states[0]}
    models[0].load_state_dict({key: value.to(states[0][key].dtype) for key, value in mean.items()})
    tokenizer = RewardScorer(members / names[0]).processing_class
    return RewardScorer(models[0], processing_class=tokenizer)


@pytest.mark.parametrize("weights", [None, [0.5, 0.75, -0.25]])
def test_an_adapter_holds_the_exact_mean_of_the_deltas(members, tmp_path, weights):
    names = ["a", "b", "c"]
    report = merge_reward_models([members / name for name in names], tmp_path / "out", weights)
    wanted = averaged_by_hand(members, names, weights or [1 / 3] * 3)(None, TEXTS)
    assert RewardScorer(tmp_path / "out")(None, TEXTS) == pytest.approx(wanted, abs=1e-5)
    assert report["rank"] == 9 and report["weights"] == (weights or [1 / 3] * 3) and -1 <= report["agreement"] <= 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9 and not config["use_rslora"]
    ranks = {name.split(".")[-1]: rank for name, rank in config["rank_pattern"].items()}
    assert ranks == {"v_proj": 3, "down_proj": 4} and config["rank_pattern"] == config["alpha_pattern"]
    if weights is None:  # one more step to a full model
        merge_reward_model(tmp_path / "out", tmp_path / "merged")
        assert RewardScorer(tmp_path / "merged")(None, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_full_models_are_averaged_tensor_by_tensor(members, tmp_path):
    names = ["full-0", "full-1"]
    report = merge_reward_models([members / name for name in names], tmp_path / "out", [0.25, 0.75])
    wanted = averaged_by_hand(members, names, [0.25, 0.75])(None, TEXTS)
    assert RewardScorer(tmp_path / "out")(None, TEXTS) == pytest.approx(wanted, abs=1e-5)
    assert "rank" not in report and not read_sidecar(tmp_path / "out").is_adapter


def test_a_model_with_itself_is_itself_without_its_normaliser(members, tmp_path, caplog):
    copy = shutil.copytree(members / "a", tmp_path / "copy")
    scorer = RewardScorer(copy)
    before = scorer(None, TEXTS)
    scorer.fit_normalizer(None, TEXTS)
    report = merge_reward_models([copy, copy], tmp_path / "out")
    assert "Normalisers" in caplog.text and read_sidecar(tmp_path / "out").normalizer is None
    assert RewardScorer(tmp_path / "out")(None, TEXTS) == pytest.approx(before, abs=1e-5)
    assert report["agreement"] == pytest.approx(1.0)


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(members, tmp_path):
    out = tmp_path / "out"

    def refused(message, *names, **options):
        with pytest.raises(AveragingError, match=message):
            merge_reward_models([members / name for name in names], out, **options)
        assert list(tmp_path.glob(".out*")) == [] and not out.exists()

    refused("two or more", "a")
    refused("sum to 1", "a", "b", weights=[0.5, 0.6])
    refused("one for each", "a", "b", weights=[1.0])
    refused("is adapter", "a", "full-0")
    other = shutil.copytree(members / "b", members / "other")
    sidecar = read_sidecar(other)
    sidecar.base.id = "elsewhere"
    sidecar.save(other)
    refused("The base of", "a", "other")
    sidecar = read_sidecar(members / "b")
    sidecar.kind = "outcome"
    sidecar.save(other)
    refused("kind", "a", "other")
    (other / "reward_model.json").unlink()
    refused("no reward_model.json", "a", "other")
    read_sidecar(members / "b").save(other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    refused("DoRA", "a", "other")
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LN_TUNING", "target_modules": ["norm"]}))
    refused("LN_TUNING", "a", "other")
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(ValueError, match="already holds files"):
        merge_reward_models([members / "a", members / "b"], out)


def test_a_bias_of_one_member_counts(tmp_path):
    base = str(save_tiny_model(tmp_path / "base", "llama", attention_bias=True))
    names = ["a", "b"]
    for name, bias in zip(names, (False, True), strict=True):
        adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=bias)
        train(base, tmp_path / name, peft_config=adapter, learning_rate=3e-2, max_steps=3)
    wanted = averaged_by_hand(tmp_path, names, [0.5, 0.5])(None, TEXTS)
    merge_reward_models([tmp_path / name for name in names], tmp_path / "out")
    assert RewardScorer(tmp_path / "out")(None, TEXTS) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("field", "value"), [("bias", "all"), ("trainable_token_indices", [1, 2])])
def test_members_trained_in_other_ways_are_refused(members, tmp_path, field, value):
    other = shutil.copytree(members / "a", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(AveragingError, match=f"with {field}="):
        merge_reward_models([members / "a", other], tmp_path / "out")


def test_the_command_averages_several_models(members, tmp_path, capsys):
    from trl_ext.cli import main as cli

    paths = [str(members / name) for name in ("a", "c")]
    assert cli.main(["merge", *paths, str(tmp_path / "out"), "--weights", "0.25", "0.75"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.25, 0.75]
    with pytest.raises(SystemExit):
        cli.main(["merge", "--weights", "0.5", "0.5", *paths, str(tmp_path / "other")])
    assert "put --weights behind the folders" in capsys.readouterr().err
    assert cli.main(["merge", *paths, str(tmp_path / "other"), "--dtype", "float32"]) == 1
    assert "--dtype" in capsys.readouterr().err
