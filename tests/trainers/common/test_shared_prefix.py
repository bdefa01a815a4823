"""Training on flat rows with a shared prompt: the losses, metrics and files are those of padded rows, and of TRL."""

import json
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForTokenClassification, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, history, largest_difference, lora, trainer_for, weights, without_time
from tests.trainers.table import SINGLE, TABLE, TOKEN, tiny_trainer
from trl_ext import RewardConfig, load_reward_model
from trl_ext.data.collators import GroupCollator, SpanCollator
from trl_ext.models.sidecar import read_sidecar
from trl_ext.trainers.common import head_training
from trl_ext.trainers.ranking import trainer as reward_trainer
from trl_ext.trainers.token import model as token_model
from trl_ext.trainers.token import trainer as token_trainer
from trl_ext.trainers.token.collator import TokenRewardCollator


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
LOGGED = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens", "grad_norm")
ROUTES = {  # the functions that a forward pass of a trainer takes for its rows
    reward_trainer: {"flat": "flat_scores", "padded": "candidate_scores"},
    token_model: {"flat": "flat_token_logits", "padded": "run_with_head_output"},
}
TABLES = {"reward": (reward_trainer, "log_evaluation"), **dict.fromkeys(TOKEN, (token_trainer, "log_table"))}


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes took which route since it was last cleared."""
    counts = {"flat": 0, "padded": 0}

    def counted(name, route, *args, **kwargs):
        counts[name] += 1
        return route(*args, **kwargs)

    for module, functions in ROUTES.items():
        for name, function in functions.items():
            monkeypatch.setattr(module, function, partial(counted, name, getattr(module, function)))
    return counts


def with_prompts(kind, n=24, seed=0):
    """Rows of a token-level trainer: four rows with the same long prompt follow each other."""
    rows = TABLE[kind].rows(n, seed=seed)
    return [{**row, "prompt": f"Question {i // 4}: tell me about the city {i // 4}.\n"} for i, row in enumerate(rows)]


def tokenized(base, rows):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        {f"{name}_ids": tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
        for row in rows
    ]


PAIRS = pair_rows(44)
OF_KIND = {  # what a run of a kind is here, unless it says otherwise
    "reward": {"rows": PAIRS, "max_steps": 10, "loss_type": "bradley_terry"},
    **{kind: {"rows": with_prompts(kind), "optim": "sgd", "learning_rate": 1e-2} for kind in TOKEN},
}


def train(kind, base, folder, peft=None, given=None, **arguments):
    """A run; `peft` makes the adapter, `given` goes to the trainer."""
    arguments = OF_KIND[kind] | arguments
    given = {**(given or {}), "peft_config": peft and peft()}
    trainer = tiny_trainer(kind, base, folder, arguments.pop("rows"), None, given, **arguments)
    trainer.train()
    return trainer


def flat_and_padded(passes, kind, base, folder, **arguments):
    """The same training on flat and on padded rows; checks that each took its route."""
    trainers = []
    for shared in (True, False):
        passes.update(flat=0, padded=0)
        trainers.append(train(kind, base, folder / str(shared), shared_prefix=shared, **arguments))
        used, other = ("flat", "padded") if shared else ("padded", "flat")
        assert passes[used] > passes[other]
        if kind == "reward" or not shared:  # batches of token-level rows in which no prompt comes twice stay padded
            assert passes[other] == 0
    return trainers


def assert_same_training(kind, one, other, tolerance=1e-5):
    for name in LOGGED:
        expected = history(other, name)
        if kind != "reward" and not expected:
            continue  # numbers are not right or wrong, and scores of tokens have no margin
        # a gradient's norm is as large as the number of weights makes it
        scale = 10 * max(1.0, *map(abs, expected)) if name == "grad_norm" else 1.0
        limits = {"abs": scale * tolerance} if kind == "reward" else {"abs": tolerance, "rel": 1e-4 * (scale != 1)}
        assert len(expected) > 1 and history(one, name) == pytest.approx(expected, **limits), name
    # Adam divides tiny gradients by their own size, so that weights are looser than losses
    assert largest_difference(weights(one), weights(other)) < (1e-3 if kind == "reward" else tolerance)


CHECKPOINTING = {
    kind: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    for kind in ("reentrant", "non-reentrant")
}
WITHOUT_PROMPT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PAIRS]
OF_TRL = {
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
SCRIPTS = {
    **{
        f"{column}s": ("reward", {"rows": [{**row, column: 0.25 * (n % 4)} for n, row in enumerate(PAIRS)]})
        for column in ("margin", "preference_probability")
    },
    "orm": ("orm", {}),
    "orm, rows together": ("orm", {"group_by_prompt": True}),
    **{f"orm, lora, {kind}": ("orm", {"peft": lora, **values}) for kind, values in CHECKPOINTING.items()},
    "prm, accumulation": ("prm", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    "prm, by sequence": ("prm", {"averaging": "sequence"}),
    "prm, labels before": ("prm", {"label_placement": "before"}),
    "segment, lora": ("segment", {"peft": lora}),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_and_metrics_equal_padded_rows(script, base, tmp_path, passes):
    kind, arguments = SCRIPTS[script]
    assert_same_training(kind, *flat_and_padded(passes, kind, base, tmp_path, **arguments))


def trl_trainer(base, folder, rows, peft=None, **arguments):
    args = config(folder, trl.RewardConfig, **({"max_steps": 10} | arguments))
    trainer = trainer_for(base, args, rows, trl.RewardTrainer, peft_config=peft and peft())
    trainer.train()
    return trainer


@pytest.mark.parametrize("script", [*OF_TRL, "tokenized"])
def test_losses_and_metrics_equal_padded_rows_and_trl(script, base, tmp_path, passes):
    arguments = {"rows": PAIRS, **OF_TRL.get(script, {"rows": tokenized(base, PAIRS)})}
    flat, padded = flat_and_padded(passes, "reward", base, tmp_path, **arguments)
    assert_same_training("reward", flat, padded)
    # TRL takes a partial accumulation window for micro-batches of one size: equal but for that window
    theirs = trl_trainer(base, tmp_path / "trl", **arguments)
    expected, found = history(theirs, "loss"), history(flat, "loss")
    steps = 2 if script == "last window not full" else len(expected)
    assert steps > 1 and found[:steps] == pytest.approx(expected[:steps], abs=1e-5)
    assert history(flat, "num_tokens")[:steps] == history(theirs, "num_tokens")[:steps]


@pytest.mark.parametrize("averaging", ["token", "sequence"])
@pytest.mark.parametrize("kind", TOKEN)
def test_losses_and_gradients_of_a_batch_equal_padded_rows(kind, averaging, base, tmp_path):
    trainer = tiny_trainer(kind, base, tmp_path, with_prompts(kind), averaging=averaging, shared_prefix=True)
    prepared = [trainer.train_dataset[n] for n in (3, 0, 1, 9, 2, 11)]  # rows of a prompt do not stand together
    found = []
    for shared in (True, False):
        trainer.data_collator.spans.shared_prefix = shared
        batch = trainer.data_collator(prepared)
        assert ("prefix_layout" in batch) == shared
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model.train(), batch, torch.tensor(5))
        found.append((loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
    (flat, flat_gradients), (padded, gradients) = found
    assert flat == pytest.approx(padded, abs=1e-5) and padded > 1e-3
    assert max(value.abs().max() for value in gradients.values()) > 1e-2
    assert largest_difference(flat_gradients, gradients) < 1e-5


@pytest.mark.parametrize(
    "kind, checkpointing", [*(("reward", name) for name in (None, *CHECKPOINTING)), ("orm", None)]
)
def test_lora_on_an_nf4_base(kind, checkpointing, tmp_path, passes):
    base = save_tiny_model(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    peft = partial(LoraConfig, r=4, target_modules="all-linear") if kind == "reward" else lora
    arguments = {"peft": peft, "given": {"quantization_config": NF4}, **CHECKPOINTING.get(checkpointing, {})}
    assert_same_training(kind, *flat_and_padded(passes, kind, base, tmp_path, **arguments))


@pytest.mark.parametrize("loss", ["plackett_luce", "pairwise", "listnet"])
def test_ragged_rankings(loss, base, tmp_path, passes):
    # SGD: Adam's first step is as large for a gradient of 1e-9 as for one of 1, so that rounding decides its sign; of
    # ten such steps the scores were off by 1.1e-5 here (listnet), and by 3e-7 in float64
    arguments = {"rows": ranked_rows(44, k=5, ragged=True), "loss_type": loss, "optim": "sgd", "learning_rate": 0.1}
    flat, padded = flat_and_padded(passes, "reward", base, tmp_path, **arguments)
    assert_same_training("reward", flat, padded, tolerance=2e-6)
    assert history(flat, "loss")[-1] != pytest.approx(history(flat, "loss")[0], abs=1e-3)
    assert history(flat, "kendall_tau") == pytest.approx(history(padded, "kendall_tau"))
    assert history(flat, "length_accuracy") == pytest.approx(history(padded, "length_accuracy"))


def test_a_stream(base, tmp_path, passes):
    rows = IterableDataset.from_generator(lambda: iter(ranked_rows(44, k=3)))
    both = flat_and_padded(passes, "reward", base, tmp_path, rows=rows, loss_type="pairwise")
    assert_same_training("reward", *both)


@pytest.mark.parametrize(
    "kind, family",
    [("reward", "gemma2"), ("reward", "gpt2"), ("reward", "qwen3_moe"), ("prm", "gemma2"), ("prm", "gpt2")],
)
def test_other_families(kind, family, tmp_path, passes):
    base = save_tiny_model(tmp_path / "base", family)
    both = flat_and_padded(passes, kind, base, tmp_path, max_steps=4)
    assert_same_training(kind, *both, tolerance=2e-5)


def test_a_token_classification_decoder(base, tmp_path, passes):
    """An instance of the user's own, whose head is not pooled."""
    trainers = []
    for shared in (True, False):
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(base, num_labels=2)
        model.dropout.p = 0.0
        trainers.append(train("prm", model, tmp_path / str(shared), shared_prefix=shared))
    assert passes["flat"] == passes["padded"] == 4
    assert_same_training("prm", *trainers)


def test_flat_and_padded_batches_take_turns(base, tmp_path, passes):
    """Pairs of one length without a common prompt stay padded in the same run, and both are right."""
    apart = [{"chosen_ids": [7, *range(n, n + 15)], "rejected_ids": [8, *range(n, n + 15)]} for n in range(5, 49)]
    rows = [row for both in zip(tokenized(base, PAIRS), apart, strict=True) for row in both]
    arguments = {"rows": rows, "per_device_train_batch_size": 1, "max_steps": 20}
    flat = train("reward", base, tmp_path / "True", shared_prefix=True, **arguments)
    assert min(passes.values()) > 4 and sum(passes.values()) == 20
    padded = train("reward", base, tmp_path / "False", shared_prefix=False, **arguments)
    assert_same_training("reward", flat, padded)


# ---------------------------------------------------------------------------------- evaluation, table, files, modes
@pytest.mark.parametrize("kind", SINGLE)
def test_evaluation_table_and_predictions_equal_padded_rows(kind, base, tmp_path, passes, monkeypatch):
    """For the table, what the trainer hands to W&B is kept."""
    found, seen = [], []
    monkeypatch.setattr(head_training, "open_run", lambda trainer: None)
    monkeypatch.setattr(*TABLES[kind], lambda *args: seen.append(args[1:]))
    rows = ranked_rows(11, k=4, ragged=True, seed=5) if kind == "reward" else with_prompts(kind, 11, seed=5)
    for shared in (True, False):
        trainer = tiny_trainer(kind, base, tmp_path, rows, rows, shared_prefix=shared, log_table_size=16)
        trainer.args.report_to = ["wandb"]
        found.append((without_time(trainer.evaluate()), seen[-1], trainer.predict(Dataset.from_list(rows))))
        assert trainer.model.config._attn_implementation == "sdpa"
    assert min(passes.values()) > 2
    (flat, table, predicted), (padded, other_table, other) = found
    assert len(padded) >= (9 if kind == "reward" else 5) and flat == pytest.approx(padded, abs=1e-5)
    assert predicted.predictions == pytest.approx(other.predictions, abs=1e-5)
    assert kind == "reward" or (predicted.label_ids == other.label_ids).all()
    if kind == "reward":
        (groups, scores, _), (other_groups, other_scores, _) = table, other_table
        assert scores == pytest.approx(other_scores, abs=1e-5) and len(scores) > 22
        assert len(groups) == len(other_groups) == 11
        for group, given in zip(groups, other_groups, strict=True):
            assert (group.prompt, group.completions, group.ratings) == (given.prompt, given.completions, given.ratings)
            assert group.prompt.strip() and all(text.strip() for text in group.completions)
            assert group.scores == pytest.approx(given.scores, abs=1e-5)
        return
    (_, lines, scores, _), (_, other_lines, other_scores, _) = table, other_table
    assert scores == pytest.approx(other_scores, abs=1e-5) and len(scores) > 11
    assert len(lines) == len(other_lines) == 11
    for (*line, values, labels), (*given, other_values, other_labels) in zip(lines, other_lines, strict=True):
        assert (line, labels) == (given, other_labels)  # the text has the scores with two digits
        assert json.loads(values) == pytest.approx(json.loads(other_values), abs=1e-5)


@pytest.mark.parametrize("kind, peft", [("reward", None), ("reward", lora), ("orm", None)], ids=["all", "lora", "orm"])
def test_what_is_saved_does_not_know_of_it(kind, peft, base, tmp_path, passes):
    """The model has its attention between steps, and the files are those of a run on padded rows."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.config._attn_implementation)

    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "given": {"callbacks": [Look()]}}
    sidecars = []
    for trainer in flat_and_padded(passes, kind, base, tmp_path, peft=peft, **arguments):
        folder = tmp_path / str(trainer.args.shared_prefix)
        trainer.save_model(str(folder / "last"))
        for saved in (folder / "checkpoint-2", folder / "last"):
            assert "trl_ext_shared_prefix" not in "".join(path.read_text() for path in saved.glob("*config.json"))
            load_reward_model(saved)  # compares the probes' scores
        sidecars.append(read_sidecar(folder / "last"))
    assert seen == ["sdpa"] * 8
    assert sidecars[0].probes["input_ids"] == sidecars[1].probes["input_ids"]
    assert sidecars[0].probes["scores"] == pytest.approx(sidecars[1].probes["scores"], abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_keeps_its_attention(attention, base, tmp_path, passes):
    args = config(tmp_path, shared_prefix=True, model_init_kwargs={"attn_implementation": attention})
    trainer = trainer_for(base, args, eval_dataset=Dataset.from_list(PAIRS[:6]))
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(trainer.model.config._attn_implementation)

    trainer.add_callback(Look())
    trainer.train()
    assert passes["flat"] == 4 and seen == [attention] * 4
    trainer.evaluate()
    assert passes["flat"] == 6 and trainer.model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", SINGLE)
def test_the_attention_comes_back_after_an_error(kind, base, tmp_path):
    rows = PAIRS if kind == "reward" else with_prompts(kind)
    loss = {"loss_type": "bradley_terry"} if kind == "reward" else {}
    trainer = tiny_trainer(kind, base, tmp_path, rows, rows[:4], shared_prefix=True, **loss)

    def fails(*args):
        assert trainer.model.config._attn_implementation == "trl_ext_shared_prefix"
        raise RuntimeError("out of something")

    trainer.model.model.norm.register_forward_pre_hook(fails)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="out of something"):
            run()
        assert trainer.model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------- shared_prefix
@pytest.mark.parametrize("kind", ["reward", "prm"])
def test_true_is_refused_where_it_cannot_be_had(kind, base, tmp_path):
    bert = save_tiny_model(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="shared_prefix=True is not possible: .* no decoder"):
        tiny_trainer(kind, bert, tmp_path, shared_prefix=True)
    with pytest.raises(ValueError, match="does not work with .* pad_to_multiple_of"):
        tiny_trainer(kind, base, tmp_path, shared_prefix=True, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="does not work with .* neftune_noise_alpha"):
        tiny_trainer(kind, base, tmp_path, shared_prefix=True, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="shared_prefix='yes' is not known"):
        tiny_trainer(kind, base, tmp_path, shared_prefix="yes")


@pytest.mark.parametrize("kind", ["reward", "prm"])
def test_auto_falls_back_to_padded_rows(kind, base, tmp_path, passes):
    rows = {"rows": OF_KIND[kind]["rows"], "max_steps": 4, "learning_rate": 1e-3}
    train(kind, save_tiny_model(tmp_path / "bert", "bert"), tmp_path, **rows)
    train(kind, base, tmp_path, pad_to_multiple_of=8, **rows)
    train(kind, base, tmp_path, neftune_noise_alpha=5.0, **rows)  # scaled by the length of a row
    assert passes == {"flat": 0, "padded": 12}
    train(kind, base, tmp_path, **rows)
    assert passes == {"flat": 4, "padded": 12}


def test_inputs_for_metrics_are_padded(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path, include_for_metrics=["inputs"]))
    assert "prefix_layout" not in next(iter(trainer.get_train_dataloader()))
    assert "prefix_layout" in next(iter(trainer_for(base, config(tmp_path)).get_train_dataloader()))


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


@pytest.mark.parametrize("kind", ["reward", "orm"])
def test_a_collator_of_the_users_own_decides_itself(kind, base, tmp_path, passes):
    collator = GroupCollator(0) if kind == "reward" else TokenRewardCollator(SpanCollator(0), "outcome")
    given = {"data_collator": collator}
    trainer = train(kind, base, tmp_path, given=given, max_steps=4, shared_prefix="auto")
    assert passes == {"flat": 0, "padded": 4} and trainer.data_collator is collator
    assert torch.isfinite(torch.tensor(history(trainer, "loss"))).all()
