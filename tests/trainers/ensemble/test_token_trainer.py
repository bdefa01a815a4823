"""M token-level members in one run end where M separate runs end; what is saved are M ordinary reward models."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PrinterCallback

from tests.tiny import save_tiny_model
from tests.trainers.helpers import config, history
from tests.trainers.table import TOKEN, outcome_rows, rows_of, segment_rows, step_rows, tiny_trainer
from trl_ext import (
    ORMConfig,
    ORMEnsembleConfig,
    ORMEnsembleTrainer,
    PRMEnsembleConfig,
    PRMEnsembleTrainer,
    RewardEnsemble,
    RewardScorer,
    SegmentEnsembleConfig,
    SegmentEnsembleTrainer,
    load_reward_model,
)
from trl_ext.data.collators import SpanCollator
from trl_ext.losses.distillation import LogConfToken
from trl_ext.models.ensemble.ensemble_files import read_ensemble
from trl_ext.models.ensemble.stacked_model import StackedRewardModel, member_token_scores
from trl_ext.models.heads import token_logits_at_last
from trl_ext.trainers.ensemble.data import MemberCollator


M, SEED = 3, 7
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
ENSEMBLES = {
    "orm": (ORMEnsembleTrainer, ORMEnsembleConfig),
    "prm": (PRMEnsembleTrainer, PRMEnsembleConfig),
    "segment": (SegmentEnsembleTrainer, SegmentEnsembleConfig),
}
ROWS = {"orm": outcome_rows(18), "prm": step_rows(18), "segment": segment_rows(18)}
QUICK = {"per_device_train_batch_size": 3, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama of three layers, wide enough for NF4."""
    size = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "llama", **size)


def adapter(layers=None, targets=("q_proj", "v_proj", "down_proj")):
    return LoraConfig(target_modules=[*targets], r=4, layers_to_transform=layers)


def ensemble(kind, folder, base, rows=None, peft=None, nf4=False, evaluation=None, **kwargs):
    trainer_class, config_class = ENSEMBLES[kind]
    rows = ROWS[kind] if rows is None else rows
    trainer = trainer_class(
        model=str(base),
        args=config(folder, config_class, **(QUICK | {"num_members": M, "seed": SEED} | kwargs)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if evaluation is None else Dataset.from_list(evaluation),
        peft_config=peft or adapter(),
        quantization_config=NF4 if nf4 else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def single(kind, folder, base, rows=None, peft=None, nf4=False, evaluation=None, **kwargs):
    more = {"peft_config": peft or adapter(), "quantization_config": NF4 if nf4 else None}
    rows = ROWS[kind] if rows is None else rows
    return tiny_trainer(kind, base, folder, rows, evaluation, trainer_kwargs=more, **(QUICK | kwargs))


def assert_same_member(together, member, alone):
    named = alone.model.named_parameters()
    weights = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in named if p.requires_grad}
    own = together.model.member_state(member)
    assert own.keys() == weights.keys()
    assert max((own[name] - weights[name]).abs().max().item() for name in own) < 1e-5
    for name in ("loss", "accuracy"):
        assert history(together, f"{name}_member_{member}") == pytest.approx(history(alone, name), abs=2e-5)
    assert len(set(history(alone, "loss"))) > 2


ACCUMULATION = {"gradient_accumulation_steps": 2, "max_steps": 5}
RUNS = {
    "orm": ("orm", "shuffle", ACCUMULATION),
    "orm, shared, branched": ("orm", "shared", {**ACCUMULATION, "peft": adapter([2])}),
    "orm, shared, flat rows": ("orm", "shared", {"per_device_train_batch_size": 6, "shared_prefix": True}),
    "prm": ("prm", "shuffle", {**ACCUMULATION, "averaging": "sequence"}),
    "prm, branched, clipped": ("prm", "shuffle", {"peft": adapter([1, 2]), "max_grad_norm": 0.05}),
    "segment": ("segment", "shuffle", ACCUMULATION),
    "segment, shared, three classes, padded": (
        "segment",
        "shared",
        {**ACCUMULATION, "loss_type": "ce", "num_labels": 3, "shared_prefix": False},
    ),
    "nf4, branched, checkpointing": (
        "prm",
        "shared",
        {"nf4": True, "peft": adapter([2]), "gradient_checkpointing": True},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_members_equal_separate_runs(name, deep, tmp_path):
    """The same seed gives the same head, adapter and order of rows; rows and micro-batches differ in labels."""
    kind, strategy, kwargs = RUNS[name]
    rows = segment_rows(18, binary=True) if "classes" in name else None
    together = ensemble(kind, tmp_path / "together", deep, rows, data_strategy=strategy, **kwargs)
    together.train()
    for member in (0, 2) if name == "orm" else (2,):
        seeds = {"seed": SEED + member, "data_seed": SEED if strategy == "shared" else None}
        alone = single(kind, tmp_path / "alone", deep, rows, **seeds, **kwargs)
        alone.train()
        assert_same_member(together, member, alone)
    if "max_grad_norm" in kwargs:
        assert max(history(together, "grad_norm")) > 5 * kwargs["max_grad_norm"]  # it did clip


def test_members_of_an_encoder_equal_separate_runs(tmp_path):
    base = save_tiny_model(tmp_path / "bert", "bert")
    peft = adapter(targets=("query", "value"))
    together = ensemble("orm", tmp_path / "together", base, peft=peft)
    together.train()
    alone = single("orm", tmp_path / "alone", base, peft=peft, seed=SEED + 1)
    alone.train()
    assert_same_member(together, 1, alone)


def test_the_rows_that_a_member_leaves_out_change_nothing(deep, tmp_path):
    """Each step sees all rows, so that a member's part of it is its own data set."""
    rows = [{**row, "who": "xyz"[number % 3]} for number, row in enumerate(step_rows(12))]
    kwargs = {"max_steps": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    together = ensemble("prm", tmp_path / "together", deep, rows, data_strategy="column:who", **kwargs)
    together.train()
    own = [{name: value for name, value in row.items() if name != "who"} for row in rows if row["who"] == "y"]
    alone = single("prm", tmp_path / "alone", deep, own, seed=SEED + 1, max_steps=4, per_device_train_batch_size=12)
    alone.train()
    assert_same_member(together, 1, alone)


def test_a_flat_row_of_own_batches_keeps_members_apart():
    """Members that drew rows of one prompt do not share it, so that every token is one member's."""
    prompt, common = [5] * 6, {"label_categories": [0], "label_steps": [0], "completion_start": 6, "row_index": 0}
    rows = [
        {"span_input_ids": prompt + [n] * n, "label_positions": [6], "label_values": [1.0], **common}
        for n in (1, 2, 3, 4)
    ]
    batch = MemberCollator(SpanCollator(0, shared_prefix=True))([[rows[0], rows[3]], [rows[1], rows[2]]])
    assert batch["member_shares"] == [6 + 1 + 2, 6 + 4 + 3] and batch["prefix_layout"].num_tokens == 22
    flat = batch["prefix_layout"].input_ids[0][batch["token_index"]]
    real = batch["attention_mask"].bool()
    assert torch.equal(flat[real], batch["input_ids"][real])
    assert batch["token_index"][:2].max() == 8 and batch["token_index"][2:, 0].tolist() == [9, 9]


# ----------------------------------------------------------------------------------------- saving, evaluation, errors
@pytest.mark.parametrize("kind", TOKEN)
def test_members_are_ordinary_reward_models(kind, deep, tmp_path):
    peft = adapter([1, 2])
    trainer = ensemble(kind, tmp_path, deep, peft=peft, data_strategy="bootstrap", max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    described = read_ensemble(tmp_path)
    assert described.members == ["member-0", "member-1", "member-2"] and described.branch_layer == 1
    ids = torch.tensor([[5, 9, 7, 30, 4]])
    with torch.no_grad():
        together = member_token_scores(trainer.model.eval(), ids, torch.ones_like(ids))[:, 0]  # (M, C)
        again = StackedRewardModel.from_folders([tmp_path / name for name in described.members])
        assert torch.equal(member_token_scores(again, ids, torch.ones_like(ids))[:, 0], together)
    scores = []
    prompts, completions = ["Question 1:\n"] * 2, [" good clear.\n", " wrong.\n"]
    for member, name in enumerate(described.members):
        content = json.loads((tmp_path / name / "reward_model.json").read_text())
        assert content["is_adapter"] and content["kind"] == {"orm": "outcome", "prm": "process"}.get(kind, kind)
        loaded = load_reward_model(tmp_path / name)  # compares the probes' scores
        with torch.no_grad():
            alone = token_logits_at_last(loaded, ids, torch.ones_like(ids))[0]
        assert (alone - together[member]).abs().max() < 1e-5
        scores.append(RewardScorer(tmp_path / name, **AGGREGATION[kind])(prompts, completions))
    if kind != "segment":  # which needs weights of its categories, of each member
        of_members = RewardEnsemble(tmp_path, normalize=False).score_members(prompts, completions)
        assert torch.allclose(torch.tensor(of_members).T, torch.tensor(scores), atol=1e-5)


AGGREGATION = {"orm": {}, "prm": {}, "segment": {"aggregation": {"tone": 1.0, "length": 0.5}}}


@pytest.mark.parametrize("kind", TOKEN)
def test_metrics_of_members_and_of_their_mean(kind, deep, tmp_path):
    """Those of a member are those of its own trainer; 7 rows: the last batch is not full."""
    held_out = rows_of(kind, 7, seed=1)
    trainer = ensemble(kind, tmp_path / "together", deep, evaluation=held_out, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    alone = single(kind, tmp_path / "alone", deep, evaluation=held_out, seed=SEED + 2, max_steps=2)
    alone.train()
    of_one = {name: value for name, value in alone.evaluate().items() if f"{name}_member_2" in metrics}
    assert "eval_loss" in of_one and len(of_one) > 3
    assert {name: metrics[f"{name}_member_2"] for name in of_one} == pytest.approx(of_one, abs=1e-4)
    losses = [metrics[f"eval_loss_member_{member}"] for member in range(M)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / M, abs=1e-6) and len(set(losses)) == M
    assert metrics.keys() >= set(of_one)
    output, of_two = (each.predict(Dataset.from_list(held_out)) for each in (trainer, alone))
    assert output.predictions.shape == (*of_two.predictions.shape, M)  # members last
    assert output.predictions[..., 2] == pytest.approx(of_two.predictions, abs=1e-4)
    assert np.array_equal(output.label_ids, of_two.label_ids)
    padding = of_two.predictions == -100
    assert padding.any() and (output.predictions[padding] == -100).all()
    assert not np.allclose(output.predictions[..., 0], output.predictions[..., 2])
    if kind == "orm":  # the metrics are about the mean
        last = (~padding[..., 0]).sum(1) - 1  # (N,), rows are padded on the right
        means = output.predictions.mean(-1)[np.arange(len(last)), last, 0]
        hits = (means > 0) == [row["label"] for row in held_out]
        assert metrics["eval_accuracy"] == pytest.approx(hits.mean())
    entry = next(entry for entry in trainer.state.log_history if "loss_member_0" in entry)
    assert entry["loss"] == pytest.approx(sum(entry[f"loss_member_{member}"] for member in range(M)) / M, abs=1e-4)
    assert ("accuracy_member_0" in entry) == (kind != "segment")


def test_disagreement_is_the_spread_of_the_scores(deep, tmp_path):
    held_out = outcome_rows(5, seed=1)
    trainer = ensemble("orm", tmp_path, deep, evaluation=held_out, max_steps=1)
    metrics = trainer.evaluate()
    scores = []
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["span_input_ids"]])
        with torch.no_grad():
            scores.append(member_token_scores(trainer.model.eval(), ids, torch.ones_like(ids))[:, 0, 0])
    expected = torch.stack(scores).std(1, correction=0).mean().item()
    assert metrics["eval_disagreement"] == pytest.approx(expected, abs=1e-5) and expected > 1e-3


def test_what_cannot_be_trained_together_is_said(deep, tmp_path):
    with pytest.raises(TypeError, match="ORMEnsembleConfig"):
        ORMEnsembleTrainer(str(deep), config(tmp_path, ORMConfig), peft_config=adapter())
    with pytest.raises(ValueError, match="Pass `peft_config=LoraConfig"):
        ORMEnsembleTrainer(str(deep), config(tmp_path, ORMEnsembleConfig))
    with pytest.raises(ValueError, match="LogConfToken would take one threshold from the predictions of all members"):
        ensemble("orm", tmp_path, deep, loss_type=LogConfToken())
    with pytest.raises(ValueError, match="group_by_prompt does not work"):
        ensemble("orm", tmp_path, deep, group_by_prompt=True)
    stream = IterableDataset.from_generator(lambda: iter(ROWS["orm"]))
    with pytest.raises(ValueError, match="'shuffle' needs random access"):
        ensemble("orm", tmp_path, deep, stream)
    with pytest.raises(ValueError, match="is no ensemble"):
        config(tmp_path, PRMEnsembleConfig, num_members=1)
