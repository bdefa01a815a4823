"""`trunk_cache`: the same training, with each text run through the frozen layers once."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.tiny import save_tiny_model
from tests.trainers.helpers import history, states
from tests.trainers.table import tiny_trainer
from trl_ext import RewardScorer
from trl_ext.models.frozen_trunk import FrozenTrunk, StoredStates


UPPER = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, layers_to_transform=[1])

LORA_GPT2 = LoraConfig(target_modules=["c_attn"], layers_to_transform=[1], fan_in_fan_out=True)


def run(kind: str, base: Path, folder: Path, cache: str | None, **arguments):
    """Three epochs of two batches, and the losses."""
    trainer = tiny_trainer(
        kind,
        base,
        folder,
        rows=arguments.pop("rows", None),
        trainer_kwargs={"peft_config": arguments.pop("peft_config", UPPER)},
        **({"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 12} | arguments),
        trunk_cache=cache,
    )
    trainer.train()
    return trainer, history(trainer, "loss")


def trunk_of(trainer) -> FrozenTrunk:
    return trainer._trunk


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("reward", {}),
        ("reward", {"shared_prefix": False}),
        ("reward", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("prm", {}),
        ("orm", {"group_by_prompt": True}),
        ("reward ensemble", {}),
    ],
)
def test_training_is_the_same_and_later_epochs_skip_the_trunk(base, tmp_path, kind, arguments):
    plain, losses = run(kind, base, tmp_path, None, **arguments)
    kept, kept_losses = run(kind, base, tmp_path, "memory", **arguments)
    assert kept_losses == pytest.approx(losses, abs=1e-6)
    for theirs, ours in zip(states(plain), states(kept), strict=True):
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5)
    trunk = trunk_of(kept)
    assert (trunk.passes, trunk.skipped) == (6, 4)


def test_after_training_the_model_is_the_users_again(base, tmp_path):
    """What runs through it then is not kept, and weights that change below the adapters count."""
    trainer, _ = run("reward", base, tmp_path, "memory", num_train_epochs=1)
    passes, size = trunk_of(trainer).passes, trunk_of(trainer).store.size
    ids = torch.tensor([trainer.train_dataset[0]["candidate_ids"][0]])
    with torch.no_grad():
        before = trainer.model(input_ids=ids).logits
        trainer.model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(2)
        after = trainer.model(input_ids=ids).logits
    assert not torch.equal(before, after)
    assert (trunk_of(trainer).passes, trunk_of(trainer).store.size) == (passes, size) and size > 0


def test_a_scorer_in_the_context_uses_and_keeps_states(base, tmp_path):
    trainer, _ = run("reward", base, tmp_path, "memory", num_train_epochs=1)
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    asked = ["1 + 1 =", "2 + 2 ="], [" 2", " 5"]
    alone = scorer(*asked)
    with trainer.trunk_states():
        first, again = scorer(*asked), scorer(*asked)
    passes = trunk_of(trainer).passes
    assert first == again == pytest.approx(alone, abs=1e-5)
    assert trunk_of(trainer).skipped >= 1
    scorer(*asked)
    assert trunk_of(trainer).passes == passes


def test_a_run_that_fails_takes_the_cache_off_too(base, tmp_path):
    trainer = tiny_trainer("reward", base, tmp_path, trainer_kwargs={"peft_config": UPPER}, trunk_cache="memory")
    layer = trainer.model.get_base_model().model.layers[0]
    plain = layer.forward
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert layer.forward == plain


def test_a_folder_serves_the_next_run_and_another_base_has_its_own(base, tmp_path):
    cache = str(tmp_path / "states")
    first, losses = run("reward", base, tmp_path, cache, num_train_epochs=1)
    second, again = run("reward", base, tmp_path, cache, num_train_epochs=1)
    assert again == losses
    assert trunk_of(first).skipped == 0
    assert trunk_of(second).skipped == trunk_of(second).passes == 2
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    third, _ = run("reward", other, tmp_path, cache, num_train_epochs=1)
    assert trunk_of(third).skipped == 0
    assert len(list(Path(cache).iterdir())) == 2


def test_an_interrupted_write_leaves_whole_entries(tmp_path):
    store = StoredStates(tmp_path)
    values = {bytes([n]) * 16: torch.randn(3, 4).to(torch.bfloat16) for n in range(3)}
    for key, value in values.items():
        store.put(key, value)
    index, data = tmp_path / "0.jsonl", tmp_path / "0.states"
    index.write_text(index.read_text() + index.read_text()[:20])  # a line that was cut
    data.write_bytes(data.read_bytes()[:-1])  # and states that never reached the disk
    again = StoredStates(tmp_path)
    kept = [key for key in values if again.get(key) is not None]
    assert kept == list(values)[:2]
    for key in kept:
        torch.testing.assert_close(again.get(key), values[key], atol=0, rtol=0)


def test_damaged_states_are_computed_again(tmp_path, caplog):
    store = StoredStates(tmp_path)
    keys = [bytes([n]) * 16 for n in range(3)]
    for key in keys:
        store.put(key, torch.ones(3, 4))
    index, data = tmp_path / "0.jsonl", tmp_path / "0.states"
    data.write_bytes(b"\0" * 48 + data.read_bytes()[48:])  # of the right length, and empty
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:2], "nonsense\n"]))
    again = StoredStates(tmp_path)
    assert [again.get(key) is not None for key in keys] == [False, True, False]
    assert "damaged lines" in caplog.text and "damaged at byte 0" in caplog.text
    again.put(keys[0], torch.ones(3, 4))
    torch.testing.assert_close(again.get(keys[0]), torch.ones(3, 4))


def test_a_full_disk_ends_the_keeping_and_not_the_training(tmp_path, caplog):
    store = StoredStates(tmp_path)
    store._states = open("/dev/full", "wb")  # noqa: SIM115 (as long as the store)
    for n in range(2):
        store.put(bytes([n]) * 16, torch.ones(3, 4))
        assert store.get(bytes([n]) * 16) is None
    assert caplog.text.count("No more states are kept") == 1


@pytest.mark.parametrize("change", ["weights", "requires_grad"])
def test_states_of_layers_that_changed_are_refused(base, tmp_path, change):
    trainer, _ = run("reward", base, tmp_path, "memory", num_train_epochs=1)
    layer = trainer.model.get_base_model().model.layers[0]
    if change == "weights":
        with torch.no_grad():
            layer.mlp.up_proj.weight.mul_(2)
    else:
        layer.requires_grad_(True)
    said = "have changed" if change == "weights" else "is to be trained now"
    with pytest.raises(ValueError, match=said), trainer.trunk_states():
        pass


def test_contexts_may_be_nested_and_checkpointing_comes_back(base, tmp_path):
    trainer, _ = run("reward", base, tmp_path, "memory", gradient_checkpointing=True, num_train_epochs=1)
    layers = trainer.model.get_base_model().model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    with trainer.trunk_states():
        trainer.evaluate(trainer.train_dataset)
        with trainer.trunk_states():
            pass
        passes = trunk_of(trainer).passes
        scorer(["1 + 1 ="], [" 2"])
        assert trunk_of(trainer).passes == passes + 1


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("llama", {"peft_config": None}, "is trained or adapted"),
        ("llama", {"peft_config": LoraConfig(target_modules=["q_proj"], r=4)}, "is trained or adapted"),
        ("gpt2", {"peft_config": LORA_GPT2, "disable_dropout": False}, "dropout"),
        ("llama", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ("opt", {}, "other states in training"),  # its dropout is a function, which disable_dropout leaves on
    ],
)
def test_what_changes_between_epochs_is_refused(base, tmp_path, family, more, said):
    model = base if family == "llama" else save_tiny_model(tmp_path / family, family)
    with pytest.raises(ValueError, match=said):
        run("reward", model, tmp_path, "memory", **more)
