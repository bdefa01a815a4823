"""M members in one run end where M separate runs end; what is saved are M ordinary reward models."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, history, largest_difference, trainer_for, weights
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer, RewardScorer, RewardTrainer, load_reward_model
from trl_ext.data.validation import DataError
from trl_ext.models.ensemble.ensemble_files import read_ensemble
from trl_ext.models.ensemble.stacked_lora import StackedLoRA
from trl_ext.models.ensemble.stacked_model import StackedRewardModel, member_scores
from trl_ext.models.heads import candidate_scores


M, SEED = 3, 7
ROWS = ranked_rows(24, k=4, ragged=True, ties=True)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
RANKED = {"loss_type": "plackett_luce"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama of three layers, wide enough for NF4."""
    size = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "llama", **size)


def adapter(layers=None):
    return LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, layers_to_transform=layers)


def ensemble(folder, base, rows=ROWS, layers=None, nf4=False, evaluation=None, callbacks=None, **kwargs):
    args = config(folder, RewardEnsembleConfig, **({"num_members": M, "seed": SEED} | RANKED | kwargs))
    evaluation = None if evaluation is None else Dataset.from_list(evaluation)
    more = {"quantization_config": NF4 if nf4 else None, "eval_dataset": evaluation, "callbacks": callbacks}
    return trainer_for(base, args, rows, RewardEnsembleTrainer, peft_config=adapter(layers), **more)


def single(folder, base, rows=ROWS, layers=None, nf4=False, **kwargs):
    args = config(folder, **(RANKED | kwargs))
    quantization = {"quantization_config": NF4 if nf4 else None}
    trainer = trainer_for(base, args, rows, RewardTrainer, peft_config=adapter(layers), **quantization)
    trainer.train()
    named = trainer.model.named_parameters()
    names = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in named if p.requires_grad}
    return trainer, names


def assert_same_member(together, member, alone, weights, tolerance=1e-5):
    own = together.model.member_state(member)
    assert own.keys() == weights.keys()
    assert max((own[name] - weights[name]).abs().max().item() for name in own) < tolerance
    losses = history(together, f"loss_member_{member}")
    assert losses == pytest.approx(history(alone, "loss"), abs=1e-4) and len(losses) > 2


CHECKPOINTING = {"gradient_checkpointing": True}
RUNS = {
    "all layers": {},
    "padded rows": {"shared_prefix": False},
    "branched": {"layers": [1, 2], "shared_prefix": True},
    "branched, accumulation": {
        "layers": [2],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "shared_prefix": False,
    },
    "branched, checkpointing": {"layers": [1, 2], **CHECKPOINTING},
    "branched, reentrant checkpointing": {
        "layers": [1, 2],
        **CHECKPOINTING,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "clipped": {"max_grad_norm": 0.05, "layers": [1, 2]},
    "centred": {"center_rewards_coefficient": 0.1, "loss_type": "pairwise"},
    "nf4": {"nf4": True, "layers": [2], **CHECKPOINTING},
}
CASES = [
    *((run, "shuffle") for run in RUNS if "reentrant" not in run),
    *((run, "shared") for run in ("all layers", "branched", "branched, accumulation", "nf4")),
    ("branched, reentrant checkpointing", "shared"),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_kwargs.*:FutureWarning")
@pytest.mark.parametrize("run,strategy", CASES)
def test_members_equal_separate_runs(run, strategy, deep, tmp_path):
    """The same seed gives the same head, adapter and order of rows; 7 steps are more than an epoch of 24 rows."""
    kwargs = {"max_steps": 7, **RUNS[run]}
    together = ensemble(tmp_path / "together", deep, data_strategy=strategy, **kwargs)
    together.train()
    for member in (0, 2) if run == "all layers" else (2,):
        seeds = {"seed": SEED + member, "data_seed": SEED if strategy == "shared" else None}
        alone, weights = single(tmp_path / "alone", deep, **seeds, **kwargs)
        assert_same_member(together, member, alone, weights)
    if "max_grad_norm" in kwargs:
        assert together.args.max_grad_norm == 0.05
        assert max(history(together, "grad_norm")) > 5 * 0.05  # it did clip


def test_the_rows_that_a_member_leaves_out_change_nothing(deep, tmp_path):
    """Each step sees all 12 rows, so that a member's part of it is its own data set."""
    rows = [{**row, "aspect": "xyz"[number % 3]} for number, row in enumerate(ROWS[:12])]
    kwargs = {"max_steps": 4, "per_device_train_batch_size": 12, "layers": [2]}
    together = ensemble(tmp_path / "together", deep, rows, data_strategy="column:aspect", **kwargs)
    together.train()
    for member, aspect in enumerate("xyz"):
        own = [row for row in rows if row["aspect"] == aspect]
        alone, weights = single(tmp_path / "alone", deep, own, seed=SEED + member, **kwargs)
        assert_same_member(together, member, alone, weights)


def test_a_transform_may_say_who_trains_on_a_row(deep, tmp_path):
    shown = Dataset.from_dict({"number": list(range(12))}).with_transform(
        lambda batch: {
            **{name: [ROWS[number][name] for number in batch["number"]] for name in ROWS[0]},
            "who": ["xyz"[number % 3] for number in batch["number"]],
        }
    )
    args = config(tmp_path, RewardEnsembleConfig, num_members=M, seed=SEED, data_strategy="column:who", **RANKED)
    trainer = RewardEnsembleTrainer(model=str(deep), args=args, train_dataset=shown, peft_config=adapter([2]))
    assert trainer._weights(torch.arange(4)).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("strategy", ["bootstrap", "kfold"])
def test_members_that_see_other_rows_end_elsewhere(strategy, deep, tmp_path):
    plain = ensemble(tmp_path / "a", deep, data_strategy="shared", layers=[2])
    other = ensemble(tmp_path / "b", deep, data_strategy=strategy, layers=[2])
    plain.train()
    other.train()
    head = "base_model.model.score.weight"
    for member in range(M):
        difference = (plain.model.member_state(member)[head] - other.model.member_state(member)[head]).abs().max()
        assert 1e-5 < difference < 0.1


def test_training_a_member_leaves_the_others_alone(deep, tmp_path):
    """What member 1 learns from has no influence on the others, bit for bit."""

    class Poison(RewardEnsembleTrainer):
        def _candidate_scores(self, model, inputs):
            scores = super()._candidate_scores(model, inputs).view(M, -1)
            return (scores * torch.tensor([[1.0], [1000.0], [1.0]])).flatten()

    states = []
    for trainer_class in (RewardEnsembleTrainer, Poison):
        args = config(tmp_path, RewardEnsembleConfig, num_members=M, data_strategy="shared", **RANKED)
        trainer = trainer_for(deep, args, ROWS, trainer_class, peft_config=adapter([2]))
        trainer.train()
        states.append([trainer.model.member_state(member) for member in range(M)])
    for member in range(M):
        same = all(torch.equal(states[0][member][name], states[1][member][name]) for name in states[0][member])
        assert same == (member != 1)


def test_the_trunk_runs_once_and_without_a_gradient(deep, tmp_path):
    trainer = ensemble(tmp_path, deep, data_strategy="shared", layers=[2], shared_prefix=False, **CHECKPOINTING)
    seen = {}
    for number, layer in enumerate(trainer.model.get_base_model().model.layers):
        layer.register_forward_hook(
            lambda m, args, output, n=number: seen.setdefault(n, []).append((len(output), output.requires_grad))
        )
    trainer.train()
    assert all(not tracked for number in (0, 1) for _, tracked in seen[number])
    assert [rows * M for rows, _ in seen[0]] == [rows for rows, _ in seen[2]]
    assert all(tracked for _, tracked in seen[2]) and len(seen[0]) == 4  # no recomputation


def test_no_loop_over_members(deep, tmp_path):
    """Each layer is called once a pass, whatever the number of members."""
    calls = []
    for members in (2, 5):
        trainer = ensemble(tmp_path, deep, num_members=members, data_strategy="shared", max_steps=1)
        layers = [m for m in trainer.model.modules() if isinstance(m, StackedLoRA)]
        count = [0]
        for layer in layers:
            layer.base_layer.register_forward_hook(lambda *_, to=count: to.__setitem__(0, to[0] + 1))
        trainer.train()
        calls.append(count[0])
    assert calls[0] == calls[1] == len(layers)


# -------------------------------------------------------------------------------------------------------- saving
def test_checkpoints_are_ensembles_of_ordinary_reward_models(deep, tmp_path):
    trainer = ensemble(
        tmp_path, deep, layers=[1, 2], data_strategy="bootstrap", save_strategy="steps", save_steps=2, max_length=200
    )
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 9, 7, 30, 4]])
    with torch.no_grad():
        together = member_scores(trainer.model.eval(), ids, torch.ones_like(ids))[:, 0]
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        described = read_ensemble(folder)
        assert described.members == ["member-0", "member-1", "member-2"] and described.branch_layer == 1
        for member, name in enumerate(described.members):
            content = json.loads((folder / name / "reward_model.json").read_text())
            assert content["is_adapter"] and content["max_length"] == 200 and content["head_modules"] == ["score"]
            loaded = load_reward_model(folder / name)  # compares the probes' scores
            with torch.no_grad():
                score = candidate_scores(loaded, ids, torch.ones_like(ids))[0]
            assert abs(score - together[member]) < 1e-5
    assert math.isfinite(RewardScorer(tmp_path / "member-1")(["Question: 1?"], [" good."])[0])
    again = StackedRewardModel.from_folders([tmp_path / name for name in described.members])
    with torch.no_grad():
        assert torch.equal(member_scores(again, ids, torch.ones_like(ids))[:, 0], together)
    arguments = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.max_grad_norm == trainer.args.max_grad_norm == 1.0


# ----------------------------------------------------------------------------------------------------- evaluation
def test_metrics_of_members_and_of_their_mean(deep, tmp_path):
    trainer = ensemble(tmp_path, deep, evaluation=ROWS[:7], max_steps=3)  # 7: the last batch is not full
    trainer.train()
    metrics = trainer.evaluate()
    scores = torch.from_numpy(trainer.predict(Dataset.from_list(ROWS[:7])).predictions)  # (rows, K, M)
    assert scores.shape == (7, 4, M)
    real = scores[:, :, 0] > -99
    centred = [row[mask] - row[mask].mean(0) for row, mask in zip(scores, real, strict=True)]
    expected = sum(row.std(1, correction=0).mean().item() for row in centred) / 7
    assert metrics["eval_disagreement"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_mean_reward"] == pytest.approx(scores[real].mean().item(), abs=1e-5)
    losses = [metrics[f"eval_loss_member_{member}"] for member in range(M)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / M, abs=1e-6) and len(set(losses)) == M
    assert all(0 <= metrics[f"eval_accuracy_member_{member}"] <= 1 for member in range(M))
    entry = next(entry for entry in trainer.state.log_history if "loss_member_0" in entry)
    assert entry["loss"] == pytest.approx(sum(entry[f"loss_member_{member}"] for member in range(M)) / M, abs=1e-4)
    assert entry["accuracy"] == pytest.approx(sum(entry[f"accuracy_member_{m}"] for m in range(M)) / M, abs=1e-5)


def test_a_stream_is_weighted_as_the_data_set_is(deep, tmp_path):
    kwargs = {"data_strategy": "bootstrap", "train_sampling_strategy": "sequential", "max_steps": 4}
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    one, other = ensemble(tmp_path / "a", deep, **kwargs), ensemble(tmp_path / "b", deep, stream, **kwargs)
    one.train()
    other.train()
    assert history(one, "loss") == pytest.approx(history(other, "loss"), abs=1e-6)


def test_a_stream_that_ends_begins_again(deep, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS[:8]))
    kwargs = {"data_strategy": "bootstrap", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    trainer = ensemble(tmp_path, deep, stream, max_steps=5, **kwargs)
    trainer.train()
    assert len(history(trainer, "loss")) == 5


@pytest.mark.parametrize("strategy", ["shuffle", "shared"])
def test_training_begins_again_with_smaller_batches_and_still_clips_members(strategy, deep, tmp_path, monkeypatch):
    kwargs = {"max_grad_norm": 1e-3, "max_steps": 2, "optim": "sgd", "learning_rate": 1.0}
    trainer = ensemble(tmp_path, deep, data_strategy=strategy, auto_find_batch_size=True, **kwargs)
    step, sizes = trainer.training_step, []

    def runs_out_of_memory_above_2(model, inputs, *args):
        sizes.append(len(inputs["row_index"]) // (M if strategy == "shuffle" else 1))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(model, inputs, *args)

    monkeypatch.setattr(trainer, "training_step", runs_out_of_memory_above_2)
    before = weights(trainer)
    trainer.train()
    assert sizes[0] == 4 and sizes[-2:] == [2, 2]
    assert 0 < largest_difference(before, weights(trainer)) < 2e-3
    assert trainer.args.max_grad_norm == 1e-3


# --------------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_trained_together_is_said(deep, tmp_path):
    args = config(tmp_path, RewardEnsembleConfig, num_members=M)
    rows = Dataset.from_list(pair_rows(8))
    with pytest.raises(ValueError, match="Pass `peft_config=LoraConfig"):
        RewardEnsembleTrainer(str(deep), args, train_dataset=rows)
    stream = IterableDataset.from_generator(lambda: iter(pair_rows(8)))
    with pytest.raises(ValueError, match="'shuffle' needs random access"):
        RewardEnsembleTrainer(str(deep), args, train_dataset=stream, peft_config=adapter())
    with pytest.raises(ValueError, match="max_tokens_per_batch do not work"):
        ensemble(tmp_path, deep, max_tokens_per_batch=100)
    with pytest.raises(ValueError, match="may add tokens"):
        ensemble(tmp_path, deep, chat_template_path=str(deep))
    activated = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(ValueError, match="the variant .*ALora.* cannot be stacked"):
        RewardEnsembleTrainer(str(deep), args, train_dataset=rows, peft_config=activated)
    single(tmp_path / "one", deep, max_steps=1)[0].save_model()
    with pytest.raises(ValueError, match="has an adapter already"):
        ensemble(tmp_path, tmp_path / "one")
    for rows, needed in ((ROWS, "no such column"), ([{**row, "who": 1} for row in ROWS], "1 distinct values")):
        with pytest.raises(DataError, match=f"column 'who': found {needed}"):
            ensemble(tmp_path, deep, rows, data_strategy="column:who")


@pytest.mark.parametrize(
    "wrong,match",
    [
        ({"num_members": 1}, "is no ensemble"),
        ({"member_seeds": [1, 1, 2, 3]}, "different seed"),
        ({"data_strategy": "folds"}, "'kfold'"),
        ({"data_strategy": "column:"}, "column:<name>"),
        ({"branch_at": 1.0}, "below 1"),
    ],
)
def test_wrong_arguments(wrong, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, RewardEnsembleConfig, **wrong)


def test_a_share_of_the_layers(deep, tmp_path):
    """ "all-linear" and layers go together here, as they do not in PEFT."""
    args = config(tmp_path, RewardEnsembleConfig, branch_at=0.7, num_members=2, data_strategy="shared", max_steps=1)
    peft = LoraConfig(target_modules="all-linear", r=2)
    trainer = trainer_for(deep, args, pair_rows(8), RewardEnsembleTrainer, peft_config=peft)
    assert trainer.model.branch_layer == 2
    adapted = [name for name, module in trainer.model.named_modules() if isinstance(module, StackedLoRA)]
    assert len(adapted) == 7 and all(".layers.2." in name for name in adapted)
    assert peft.layers_to_transform is None
    trainer.train()
