"""Training on flat rows with a shared prompt: the losses, metrics and files are those of padded rows, and of TRL."""

import json

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, history, largest_difference, lora, trainer_for, weights
from trl_ext import RewardConfig, RewardTrainer, load_reward_model
from trl_ext.models.sidecar import read_sidecar
from trl_ext.trainers.common import head_training
from trl_ext.trainers.ranking import trainer as reward_trainer


STEPS = 10
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
METRICS = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens", "grad_norm")


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes took which route since it was last cleared."""
    counts = {"flat": 0, "padded": 0}
    for name, function in (("flat", "flat_scores"), ("padded", "candidate_scores")):
        route = vars(reward_trainer)[function]

        def counted(*args, _route=route, _name=name, **kwargs):
            counts[_name] += 1
            return _route(*args, **kwargs)

        monkeypatch.setattr(reward_trainer, function, counted)
    return counts


def train(folder, base, rows, trainer_class=RewardTrainer, peft=None, quantization=None, **kwargs):
    config_class = RewardConfig if trainer_class is RewardTrainer else trl.RewardConfig
    args = config(folder, config_class, **({"max_steps": STEPS} | kwargs))
    more = {} if quantization is None else {"quantization_config": quantization}
    evaluation = Dataset.from_list(rows[:7]) if isinstance(rows, list) else None  # 7: the last batch is not full
    peft = None if peft is None else peft()
    trainer = trainer_for(base, args, rows, trainer_class, peft_config=peft, eval_dataset=evaluation, **more)
    trainer.train()
    return trainer


def flat_and_padded(passes, folder, base, rows, **kwargs):
    """The same training on flat and on padded rows; checks that each took its route."""
    trainers = []
    for shared in (True, False):
        passes.update(flat=0, padded=0)
        trainers.append(train(folder / str(shared), base, rows, shared_prefix=shared, **kwargs))
        assert (passes["flat"] > 0, passes["padded"] > 0) == (shared, not shared)
    return trainers


def assert_same_training(one, other, tolerance=1e-5):
    for name in METRICS:
        expected = history(other, name)
        # a gradient's norm is as large as the number of weights makes it
        scale = 10 * max(1.0, *map(abs, expected)) if name == "grad_norm" else 1.0
        assert len(expected) > 1 and history(one, name) == pytest.approx(expected, abs=scale * tolerance), name


def tokenized(base, rows):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        {f"{name}_ids": tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
        for row in rows
    ]


PAIRS = pair_rows(44)
WITHOUT_PROMPT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PAIRS]
CHECKPOINTING = {
    kind: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    for kind in ("reentrant", "non-reentrant")
}
SCRIPTS = {
    "full": {},
    "chat": {"rows": pair_rows(44, chat=True)},
    "no prompt column": {"rows": WITHOUT_PROMPT},
    "lora": {"peft": lora},
    "centred": {"center_rewards_coefficient": 0.1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "last window not full": {"rows": pair_rows(22), "gradient_accumulation_steps": 2, "max_steps": 9},
    "max_length": {"max_length": 48},
    **{f"{kind} checkpointing": values for kind, values in CHECKPOINTING.items()},
    **{f"{kind} checkpointing, lora": {**values, "peft": lora} for kind, values in CHECKPOINTING.items()},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_and_metrics_equal_padded_rows_and_trl(script, base, tmp_path, passes):
    kwargs = {"rows": PAIRS, **SCRIPTS[script]}
    flat, padded = flat_and_padded(passes, tmp_path, base, **kwargs)
    assert_same_training(flat, padded)
    assert largest_difference(weights(flat), weights(padded)) < 1e-3
    # TRL takes a partial accumulation window for micro-batches of one size: equal but for that window
    theirs = train(tmp_path / "trl", base, trainer_class=trl.RewardTrainer, **kwargs)
    expected, found = history(theirs, "loss"), history(flat, "loss")
    steps = 2 if script == "last window not full" else len(expected)
    assert steps > 1 and found[:steps] == pytest.approx(expected[:steps], abs=1e-5)
    assert history(flat, "num_tokens")[:steps] == history(theirs, "num_tokens")[:steps]


def test_tokenized_rows_equal_trl(base, tmp_path, passes):
    rows = tokenized(base, PAIRS)
    flat, padded = flat_and_padded(passes, tmp_path, base, rows)
    assert_same_training(flat, padded)
    theirs = train(tmp_path / "trl", base, rows, trl.RewardTrainer)
    assert history(flat, "loss") == pytest.approx(history(theirs, "loss"), abs=1e-5)


@pytest.mark.parametrize("checkpointing", [None, *CHECKPOINTING])
def test_lora_on_an_nf4_base(tmp_path, passes, checkpointing):
    base = save_tiny_model(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    peft = dict(peft=lambda: LoraConfig(r=4, target_modules="all-linear"), quantization=NF4)
    kwargs = {} if checkpointing is None else CHECKPOINTING[checkpointing]
    assert_same_training(*flat_and_padded(passes, tmp_path, base, PAIRS, **peft, **kwargs))


@pytest.mark.parametrize("loss", ["plackett_luce", "pairwise", "listnet"])
def test_ragged_rankings(loss, base, tmp_path, passes):
    # SGD: Adam's first step is as large for a gradient of 1e-9 as for one of 1, so that rounding decides its sign; of
    # ten such steps the scores were off by 1.1e-5 here (listnet), and by 3e-7 in float64
    rows = ranked_rows(44, k=5, ragged=True)
    flat, padded = flat_and_padded(passes, tmp_path, base, rows, loss_type=loss, optim="sgd", learning_rate=0.1)
    assert_same_training(flat, padded, tolerance=2e-6)
    assert history(flat, "loss")[-1] != pytest.approx(history(flat, "loss")[0], abs=1e-3)
    assert history(flat, "kendall_tau") == pytest.approx(history(padded, "kendall_tau"))
    assert history(flat, "length_accuracy") == pytest.approx(history(padded, "length_accuracy"))


def test_margins_and_soft_preferences(base, tmp_path, passes):
    for column in ("margin", "preference_probability"):
        rows = [{**row, column: 0.25 * (number % 4)} for number, row in enumerate(PAIRS)]
        assert_same_training(*flat_and_padded(passes, tmp_path / column, base, rows))


def test_a_stream(base, tmp_path, passes):
    rows = IterableDataset.from_generator(lambda: iter(ranked_rows(44, k=3)))
    assert_same_training(*flat_and_padded(passes, tmp_path, base, rows, loss_type="pairwise"))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3_moe"])
def test_other_families(family, tmp_path, passes):
    base = save_tiny_model(tmp_path / "base", family)
    assert_same_training(*flat_and_padded(passes, tmp_path, base, PAIRS, max_steps=4), tolerance=2e-5)


def test_flat_and_padded_batches_take_turns(base, tmp_path, passes):
    """Pairs of one length without a common prompt stay padded in the same run, and both are right."""
    apart = [{"chosen_ids": [7, *range(n, n + 15)], "rejected_ids": [8, *range(n, n + 15)]} for n in range(5, 49)]
    rows = [row for both in zip(tokenized(base, PAIRS), apart, strict=True) for row in both]
    kwargs = {"per_device_train_batch_size": 1, "max_steps": 20, "eval_strategy": "no"}
    flat = train(tmp_path / "True", base, rows, shared_prefix=True, **kwargs)
    assert min(passes.values()) > 4 and sum(passes.values()) == 20
    assert_same_training(flat, train(tmp_path / "False", base, rows, shared_prefix=False, **kwargs))


# ---------------------------------------------------------------------------------- evaluation, table, files, modes
@pytest.fixture
def evaluated(base, tmp_path, monkeypatch):
    """For flat and padded rows: metrics of an evaluation, the sample table's groups, all scores, predictions."""
    results = []
    monkeypatch.setattr(head_training, "open_run", lambda trainer: None)
    rows = ranked_rows(11, k=4, ragged=True, seed=5)
    for shared in (True, False):
        tables = []
        monkeypatch.setattr(reward_trainer, "log_evaluation", lambda *args, to=tables: to.append(args[1:]))
        args = config(tmp_path, shared_prefix=shared, loss_type="plackett_luce", log_table_size=6)
        trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(rows))
        trainer.args.report_to = ["wandb"]
        metrics = trainer.evaluate()
        results.append((metrics, *tables[0], trainer.predict(Dataset.from_list(rows)).predictions))
    return results


def test_evaluation_equals_padded_rows(evaluated):
    (flat, groups, scores, _, predictions), (padded, padded_groups, padded_scores, _, padded_predictions) = evaluated
    timing = ("runtime", "per_second", "preparation_time")
    names = [name for name in padded if not name.endswith(timing)]
    assert len(names) > 8
    assert {name: flat[name] for name in names} == pytest.approx({name: padded[name] for name in names}, abs=1e-5)
    assert scores == pytest.approx(padded_scores, abs=1e-5) and len(scores) > 22
    assert predictions == pytest.approx(padded_predictions, abs=1e-5)
    assert len(groups) == len(padded_groups) == 6
    for group, other in zip(groups, padded_groups, strict=True):
        assert (group.prompt, group.completions, group.ratings) == (other.prompt, other.completions, other.ratings)
        assert group.prompt.strip() and all(text.strip() for text in group.completions)
        assert group.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("peft", [None, lora], ids=["full", "lora"])
def test_what_is_saved_does_not_know_of_it(peft, base, tmp_path, passes):
    flat, padded = flat_and_padded(passes, tmp_path, base, PAIRS, peft=peft, save_strategy="steps", save_steps=4)
    sidecars = []
    for trainer, name in ((flat, "True"), (padded, "False")):
        trainer.save_model(str(tmp_path / name / "last"))
        for folder in (tmp_path / name / "checkpoint-4", tmp_path / name / "last"):
            assert "trl_ext_shared_prefix" not in "".join(p.read_text() for p in folder.glob("*config.json"))
            load_reward_model(folder)  # compares the probes' scores
        sidecars.append(read_sidecar(tmp_path / name / "last"))
    assert sidecars[0].probes["input_ids"] == sidecars[1].probes["input_ids"]
    assert sidecars[0].probes["scores"] == pytest.approx(sidecars[1].probes["scores"], abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_keeps_its_attention(attention, base, tmp_path, passes):
    args = config(tmp_path, shared_prefix=True, model_init_kwargs={"attn_implementation": attention})
    trainer = trainer_for(base, args, eval_dataset=Dataset.from_list(PAIRS[:6]))
    seen = []

    class Look(reward_trainer.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(trainer.model.config._attn_implementation)

    trainer.add_callback(Look())
    trainer.train()
    assert passes["flat"] == 4 and seen == [attention] * 4
    trainer.evaluate()
    assert passes["flat"] == 6 and trainer.model.config._attn_implementation == attention


def test_the_attention_comes_back_after_an_error(base, tmp_path, monkeypatch):
    trainer = trainer_for(base, config(tmp_path, shared_prefix=True), eval_dataset=Dataset.from_list(PAIRS[:4]))

    def fails(self, *args, **kwargs):
        raise RuntimeError("out of something")

    monkeypatch.setattr(type(trainer.model.model.norm), "forward", fails)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="out of something"):
            run()
        assert trainer.model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------------------- the wish
def test_true_is_refused_where_it_cannot_be_had(base, tmp_path):
    bert = save_tiny_model(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="shared_prefix=True is not possible: .* no decoder"):
        trainer_for(bert, config(tmp_path, shared_prefix=True))
    with pytest.raises(ValueError, match="does not work with .* pad_to_multiple_of"):
        trainer_for(base, config(tmp_path, shared_prefix=True, pad_to_multiple_of=8))
    with pytest.raises(ValueError, match="does not work with .* neftune_noise_alpha"):
        trainer_for(base, config(tmp_path, shared_prefix=True, neftune_noise_alpha=5.0))
    with pytest.raises(ValueError, match="shared_prefix='yes' is not known"):
        trainer_for(base, config(tmp_path, shared_prefix="yes"))


def test_auto_falls_back_to_padded_rows(base, tmp_path, passes):
    bert = save_tiny_model(tmp_path / "bert", "bert")
    trainer_for(bert, config(tmp_path)).train()
    trainer_for(base, config(tmp_path, pad_to_multiple_of=8)).train()
    trainer_for(base, config(tmp_path, neftune_noise_alpha=5.0)).train()  # scaled by the length of a row
    assert not trainer_for(base, config(tmp_path, include_for_metrics=["inputs"]))._flat_rows
    assert passes == {"flat": 0, "padded": 12}
    trainer_for(base, config(tmp_path)).train()
    assert passes == {"flat": 4, "padded": 12}


@pytest.mark.parametrize("given,wish", [("auto", "auto"), ("True", True), ("False", False)])
def test_the_command_line_knows_it(given, wish, tmp_path):
    parser = trl.TrlParser((RewardConfig,))
    plain = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False"]
    (args,) = parser.parse_args_and_config([*plain, "--shared_prefix", given])
    assert args.shared_prefix == wish and type(args.shared_prefix) is type(wish)
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nshared_prefix: {given.lower()}\n")
    (args,) = parser.parse_args_and_config(["--config", str(file)])
    assert args.shared_prefix == wish and type(args.shared_prefix) is type(wish)
    json.dumps(args.to_dict())


def test_scores_of_a_custom_collator_are_padded(base, tmp_path, passes):
    """A collator of the user's own decides itself."""
    collator = reward_trainer.GroupCollator(0)
    trainer = trainer_for(base, config(tmp_path, shared_prefix="auto"), data_collator=collator)
    trainer.train()
    assert passes == {"flat": 0, "padded": 4} and trainer.data_collator is collator
    assert torch.isfinite(torch.tensor(history(trainer, "loss"))).all()
