"""The public behaviours of `trl.RewardTrainer` (1.16), one test each for both classes, and the differences.

Scripts that only change the import meet these. Equality of losses and metrics is tested in `test_trl_swap`.
"""

import functools
import json
import logging

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl.trainer.reward_trainer import DataCollatorForPreference

from tests.tiny import pair_rows
from tests.trainers.helpers import config, history, lora, trainer_for
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.trainers.ranking import trainer as reward_trainer


LOGGED = {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens", "grad_norm", "epoch"}
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"


@pytest.fixture(params=["trl", "trl_ext"])
def make(request, base, tmp_path):
    """A function that makes a trainer of two steps, of TRL's class or of ours; `make.ours` says which."""
    classes = (trl.RewardTrainer, trl.RewardConfig) if request.param == "trl" else (RewardTrainer, RewardConfig)

    def trainer(rows=None, model=base, given=None, **arguments):
        args = config(tmp_path, classes[1], **({"max_steps": 2} | arguments))
        return trainer_for(model, args, pair_rows(12) if rows is None else rows, classes[0], **(given or {}))

    trainer.ours = request.param == "trl_ext"
    return trainer


def instance(base, **kwargs):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32, **kwargs)


def trains(trainer):
    """Train; the names of the parameters that changed."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(history(trainer, "loss")) == trainer.args.max_steps
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[name].cpu())}


# --------------------------------------------------------------------------------------------------------------- model
def test_a_model_by_its_path_is_trained_in_full(make):
    trainer = make()
    assert trains(trainer) == {name for name, _ in trainer.model.named_parameters()}
    assert {entry for log in trainer.state.log_history for entry in log} >= LOGGED


def test_an_instance_is_trained_in_place(make, base):
    model = instance(base)
    trainer = make(model=model)
    assert trainer.model is model and trains(trainer)


def test_model_init_kwargs_are_used(make):
    trainer = make(model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert trains(trainer)


def test_a_path_is_loaded_in_float32(make, base, tmp_path):
    instance(base).bfloat16().save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in make(model=tmp_path / "bf16").model.parameters()} == {torch.float32}


def test_dropout_is_off_unless_it_is_asked_for(make, base):
    for disabled in (True, False):
        model = instance(base)
        model.dropout = torch.nn.Dropout(0.5)
        make(model=model, disable_dropout=disabled)
        assert model.dropout.p == (0.0 if disabled else 0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing(make, checkpointing):
    assert trains(make(gradient_checkpointing=checkpointing))


def test_a_model_of_two_labels_is_refused(make, base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(ValueError, match="label|outputs"):
        make(model=model)


# ---------------------------------------------------------------------------------------------------------------- data
def implicit(rows):
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


@pytest.mark.parametrize("stream", [False, True], ids=["list", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_every_format_of_pairs(make, prompt, chat, stream):
    rows = pair_rows(12, chat=chat)
    data = Dataset.from_list(implicit(rows) if prompt == "implicit" else rows)
    assert trains(make(data.to_iterable_dataset() if stream else data))


def test_tokenized_pairs(make):
    assert trains(make([{"chosen_ids": [5, 6, 7 + n], "rejected_ids": [5, 8 + n]} for n in range(12)]))


def test_prepared_rows_have_the_columns_of_trl(make):
    row = make().train_dataset[0]
    assert row["chosen_ids"] != row["rejected_ids"] and all(isinstance(token, int) for token in row["chosen_ids"])


def test_text_ends_in_eos_once(make, base):
    eos = AutoTokenizer.from_pretrained(base).eos_token
    rows = [{**row, "chosen": row["chosen"] + eos} for row in pair_rows(4)]
    trainer = make(rows)
    for row in trainer.train_dataset:
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            assert ids[-1] == trainer.processing_class.eos_token_id and ids.count(ids[-1]) == 1


def test_rows_longer_than_max_length_are_left_out(make):
    rows = pair_rows(12)
    rows[3]["rejected"] *= 30
    assert len(make(rows, max_length=64).train_dataset) == 11
    assert len(make(rows, max_length=None).train_dataset) == 12


def test_a_margin_is_used(make):
    rows = [{**row, "margin": 2.0} for row in pair_rows(12)]
    with_margin, without = make(rows), make()
    with_margin.train()
    without.train()
    assert history(with_margin, "loss")[0] > history(without, "loss")[0] + 1


def test_rewards_are_centred(make):
    centred, plain = make(center_rewards_coefficient=1.0), make()
    centred.train()
    plain.train()
    assert history(centred, "loss")[0] > history(plain, "loss")[0]


def test_tools_and_template_arguments_of_a_row(make, base, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% if tools %}{{ tools | length }} tools {% endif %}{{ flag if flag else '' }}" + TEMPLATE)
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    plain = pair_rows(4, chat=True)
    rows = [{**row, "tools": json.dumps(tools), "chat_template_kwargs": {"flag": "yes"}} for row in plain]
    trainer = make(rows, chat_template_path=str(template))
    text = trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"])
    assert text.replace(" ", "").startswith("1toolsyes")


def test_chat_template_from_a_file_or_a_tokenizer(make, base, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    assert make(pair_rows(4, chat=True), chat_template_path=str(file)).processing_class.chat_template == TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    trainer = make(pair_rows(4, chat=True), chat_template_path=str(tmp_path / "tokenizer"))
    assert trainer.processing_class.chat_template == TEMPLATE and trains(trainer)


def test_pad_to_multiple_of(make):
    trainer = make(pad_to_multiple_of=64)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 64 == 0 and trains(trainer)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_a_token_that_the_tokenizer_does_not_have_is_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make(**{name: "<nowhere>"})


def test_unused_columns_may_stay(make):
    assert trains(make([{**row, "note": "x"} for row in pair_rows(12)], remove_unused_columns=False))


# ---------------------------------------------------------------------------------------------------------------- peft
def test_lora_trains_adapter_and_head_only(make):
    trainer = make(given={"peft_config": lora()})
    assert isinstance(trainer.model, PeftModel)
    changed = trains(trainer)
    assert changed and all("lora_" in name or "score.modules_to_save" in name for name in changed)


def test_a_peft_model_is_trained(make, base):
    changed = trains(make(model=get_peft_model(instance(base), lora())))
    assert changed and all("lora_" in name or "score.modules_to_save" in name for name in changed)


def test_lora_with_gradient_checkpointing(make):
    assert trains(make(given={"peft_config": lora()}, gradient_checkpointing=True))


def test_what_peft_cannot_do_is_refused(make, base):
    with pytest.raises(TypeError, match="peft"):
        make(given={"peft_config": {"r": 4}})
    with pytest.raises(ValueError, match="adapter"):
        make(model=get_peft_model(instance(base), lora()), given={"peft_config": lora()})


def test_quantization_is_given_once(make):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="quantization_config"):
        make(model_init_kwargs={"quantization_config": quantization}, given={"quantization_config": quantization})


def test_arguments_about_loading_are_ignored_for_an_instance_with_a_warning(make, base, caplog):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    with caplog.at_level(logging.WARNING):
        make(
            model=instance(base),
            model_init_kwargs={"dtype": "bfloat16"},
            given={"quantization_config": quantization},
        )
    assert "model_init_kwargs" in caplog.text and "quantization_config" in caplog.text


# ---------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("stream", [False, True], ids=["list", "stream"])
def test_evaluation_while_training(make, stream):
    data = Dataset.from_list(pair_rows(6))
    data = data.to_iterable_dataset() if stream else data
    trainer = make(given={"eval_dataset": data}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(history(trainer, "eval_loss")) == 2 and len(history(trainer, "eval_accuracy")) == 2


def test_several_evaluation_sets_by_name(make):
    sets = {name: Dataset.from_list(pair_rows(4, seed=seed)) for seed, name in enumerate(("one", "other"))}
    for given in (sets, DatasetDict(sets)):
        metrics = make(given={"eval_dataset": given}).evaluate()
        assert {"eval_one_loss", "eval_other_loss"} <= metrics.keys()


def test_raw_rows_are_evaluated(make):
    assert make().evaluate(Dataset.from_list(pair_rows(4, chat=True)))["eval_loss"] > 0


def test_compute_metrics(make):
    trainer = make(given={"eval_dataset": Dataset.from_list(pair_rows(8)), "compute_metrics": lambda p: {"mine": 7}})
    assert trainer.evaluate()["eval_mine"] == 7


# ----------------------------------------------------------------------------------------------------- saving and such
def test_a_saved_model_is_a_plain_classifier_with_the_tags(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.score.weight, trainer.model.score.weight)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "reward-trainer" in card and "trl" in card


def test_a_run_resumes(make, tmp_path):
    whole = make(save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)


def test_callbacks_and_optimizers_are_used(make, base):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count, model = Count(), instance(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(model=model, given={"callbacks": [count], "optimizers": (optimizer, None)})
    trainer.train()
    assert count.steps == 2 and trainer.optimizer.optimizer is optimizer


def test_without_arguments_the_defaults_are_used(make, base, tmp_path, monkeypatch):
    """They need a GPU, so the test gives the default configuration a CPU."""
    module, config_class = (reward_trainer, RewardConfig) if make.ours else (trl.trainer.reward_trainer, None)
    on_cpu = functools.partial(config_class or trl.RewardConfig, use_cpu=True, bf16=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "RewardConfig", on_cpu)
    trainer_class = RewardTrainer if make.ours else trl.RewardTrainer
    trainer = trainer_class(str(base), train_dataset=Dataset.from_list(pair_rows(4)))
    assert trainer.args.output_dir == "tiny-llama-Reward" and trainer.args.max_length == 1024


def test_the_default_collator_of_trl_may_be_passed(make, base):
    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    assert trains(make(given={"data_collator": DataCollatorForPreference(pad)}))


def test_there_is_no_argument_for_padding_free_batches(make, tmp_path):
    with pytest.raises(TypeError, match="padding_free"):
        make(padding_free=True)


def test_training_data_are_needed(make, base, tmp_path):
    trainer_class = RewardTrainer if make.ours else trl.RewardTrainer
    args = config(tmp_path, RewardConfig if make.ours else trl.RewardConfig)
    with pytest.raises(ValueError, match="train_dataset"):
        trainer_class(model=str(base), args=args)


# --------------------------------------------------------------------------------------------------------- differences
def test_difference_a_head_that_peft_freezes_is_trained(make):
    """Without `modules_to_save` and task type TRL keeps the random head. Ours trains and saves it."""
    trainer = make(given={"peft_config": LoraConfig(target_modules=["q_proj"], r=4)})
    trained = [name for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad]
    assert bool(trained) == make.ours


def test_difference_a_frozen_head_in_a_peft_model_is_refused(make, base):
    """TRL trains the adapter below a head that stays random. Ours says so before it starts."""
    model = get_peft_model(instance(base), LoraConfig(target_modules=["q_proj"], r=4))
    if make.ours:
        with pytest.raises(ValueError, match="frozen"):
            make(model=model)
    else:
        assert not any("score" in name for name in trains(make(model=model)))


@pytest.mark.parametrize("shared_prefix", ["auto", False])
def test_difference_nan_stops(make, shared_prefix):
    """fp16 weights at a learning rate of 0.1 become NaN. TRL goes on and logs 0.0; ours stops, on padded rows too."""
    arguments = {"model_init_kwargs": {"dtype": "float16"}, "learning_rate": 0.1, "max_steps": 5}
    if make.ours:
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            make(pair_rows(32), shared_prefix=shared_prefix, **arguments).train()
    else:
        trainer = make(pair_rows(32), **arguments)
        trainer.train()
        assert not any(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert history(trainer, "loss")[-1] == 0.0
