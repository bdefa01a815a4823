"""A TRL script after changing the import does what it did."""

import copy
import functools
import inspect
from dataclasses import dataclass, fields, replace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import pair_rows, save_tiny_model, tiny_tokenizer
from tests.trainers.helpers import config, head_of, history, largest_difference, lora, trainer_for, weights
from trl_ext import ORMConfig, RewardConfig, RewardEnsembleTrainer, RewardTrainer, load_reward_model
from trl_ext.models.heads import candidate_scores
from trl_ext.trainers.ranking import trainer as reward_trainer


def both(folder, model, rows=None, peft=None, **kwargs):
    """The same script with TRL's names and with ours."""
    trainers = []
    for trainer_class, config_class in ((trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig)):
        args = config(folder / trainer_class.__module__, config_class, **({"max_steps": 20} | kwargs))
        trainer = trainer_for(model, args, rows, trainer_class, peft_config=None if peft is None else peft())
        trainer.train()
        trainers.append(trainer)
    return trainers


def assert_same_losses(theirs, ours, steps=20):
    expected, found = history(theirs, "loss"), history(ours, "loss")
    assert len(expected) == len(found) == steps
    assert found == pytest.approx(expected, abs=1e-5)
    for name in ("accuracy", "margin", "mean_reward", "num_tokens", "learning_rate", "grad_norm"):
        assert history(ours, name) == pytest.approx(history(theirs, name), abs=1e-4), name


def with_margins(rows):
    return [{**row, "margin": 0.25 * (number % 4)} for number, row in enumerate(rows)]


def implicit_prompts(rows):
    return [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows]


def some_long(rows):
    return [{**row, "chosen": row["chosen"] * (1 if number % 4 else 6)} for number, row in enumerate(rows)]


SCRIPTS = {
    "text": {},
    "chat": {"rows": pair_rows(48, chat=True)},
    "implicit prompt": {"rows": implicit_prompts(pair_rows(48))},
    "lora": {"peft": lora},
    "lora, chat": {"peft": lora, "rows": pair_rows(48, chat=True)},
    "margins": {"rows": with_margins(pair_rows(48))},
    "centred": {"center_rewards_coefficient": 0.1},
    "accumulation": {"rows": pair_rows(96), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, lora": {"gradient_checkpointing": True, "peft": lora},
    "two epochs": {"rows": pair_rows(40), "max_steps": -1, "num_train_epochs": 2},
    "max_length": {"rows": some_long(pair_rows(64)), "max_length": 48, "max_steps": 12},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_equal_those_of_trl(script, base, tmp_path):
    kwargs = {"rows": pair_rows(48), **SCRIPTS[script]}
    theirs, ours = both(tmp_path, base, **kwargs)
    assert_same_losses(theirs, ours, steps=12 if script == "max_length" else 20)
    if script == "max_length":  # and the same rows were dropped
        assert len(ours.train_dataset) == len(theirs.train_dataset) == 48


def test_an_instance_and_tokenized_rows_equal_trl(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [
        {f"{name}_ids": tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
        for row in pair_rows(48)
    ]

    def instance():
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)

    histories = []
    for trainer_class, config_class in ((trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig)):
        args = config(tmp_path, config_class, max_steps=20)
        trainer = trainer_for(instance(), args, rows, trainer_class, processing_class=tokenizer)
        trainer.train()
        histories.append(trainer)
    assert_same_losses(*histories)


def test_with_pad_as_eos_it_differs_on_purpose(tmp_path):
    """TRL then scores the text without its EOS. Our scores do not depend on the pad token."""
    base = save_tiny_model(tmp_path / "eos", "llama", tokenizer=tiny_tokenizer("llama", pad="eos"))
    theirs, ours = both(tmp_path, base, rows=pair_rows(32), max_steps=4)
    difference = max(abs(a - b) for a, b in zip(history(theirs, "loss"), history(ours, "loss"), strict=True))
    assert difference > 1e-3

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<|end_of_text|>"  # any other one
    again = trainer_for(base, config(tmp_path), pair_rows(32), processing_class=tokenizer)
    again.train()
    assert history(again, "loss") == pytest.approx(history(ours, "loss"), abs=1e-6)


def test_a_plain_trl_config_is_accepted_and_keeps_every_field(base, tmp_path):
    @dataclass
    class Mine(trl.RewardConfig):
        my_note: str = "kept"

    args = config(tmp_path, Mine, model_init_kwargs={"dtype": "float32"}, lr_scheduler_type="cosine", warmup_steps=2)
    before = copy.deepcopy(args.to_dict())
    trainer = trainer_for(base, args, eval_dataset=Dataset.from_list(pair_rows(4)))
    assert isinstance(trainer.args, RewardConfig)
    assert trainer.args.loss_type == "bradley_terry"
    for item in fields(args):
        assert trainer.args.__dict__[item.name] == args.__dict__[item.name], item.name
    after = args.to_dict()
    assert {name: value for name, value in after.items() if name != "accelerator_config"} == {
        name: value for name, value in before.items() if name != "accelerator_config"
    }
    trainer.train()
    assert len(history(trainer, "loss")) == 4


@pytest.mark.parametrize("config_class", [trl.DPOConfig, ORMConfig])
@pytest.mark.parametrize("trainer_class", [RewardTrainer, RewardEnsembleTrainer])
def test_another_trainers_arguments_are_refused(trainer_class, config_class, base, tmp_path):
    args = config_class(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=f"args is a {config_class.__name__}. Needed: a Reward"):
        trainer_class(str(base), args, train_dataset=Dataset.from_list(pair_rows(4)), peft_config=lora())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="offloading works with an accelerator")
def test_offloading_on_a_cpu_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="there is no GPU here"):
        trainer_for(base, config(tmp_path, activation_offloading=True))


def test_positional_arguments_are_those_of_trl(base, tmp_path):
    names = list(inspect.signature(trl.RewardTrainer.__init__).parameters)
    assert list(inspect.signature(RewardTrainer.__init__).parameters) == names
    rows = Dataset.from_list(pair_rows(8))
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = RewardTrainer(str(base), config(tmp_path), None, rows, rows, tokenizer)
    assert trainer.processing_class is tokenizer
    assert len(trainer.eval_dataset) == 8


def test_the_default_output_folder_is_that_of_trl(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_cpu = functools.partial(RewardConfig, use_cpu=True, bf16=False)  # the defaults need a GPU, as TRL's do
    monkeypatch.setattr(reward_trainer, "RewardConfig", on_cpu)
    trainer = RewardTrainer(str(base), train_dataset=Dataset.from_list(pair_rows(4)))
    assert trainer.args.output_dir == "tiny-llama-Reward"


def test_arguments_are_given_back_as_they_were(base, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(tiny_tokenizer("qwen").chat_template.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    given = dict(model_init_kwargs={"dtype": "float32"}, chat_template_path=str(template), eos_token="<|end_of_text|>")
    args = config(tmp_path, **given)
    trainer = trainer_for(base, args, pair_rows(8, chat=True))
    assert trainer.args is args
    assert {name: args.__dict__[name] for name in given} == given
    assert trainer.processing_class.eos_token == "<|end_of_text|>"
    assert trainer.processing_class.chat_template == template.read_text()

    args = config(tmp_path, **given)
    with pytest.raises(ValueError, match="column 'chosen'"):
        trainer_for(base, args, [{"text": "no pair"}])
    assert {name: args.__dict__[name] for name in given} == given


def test_model_init_kwargs_reach_the_model(base, tmp_path):
    wanted = {"dtype": "bfloat16", "attn_implementation": "eager", "num_labels": 3}
    trainer = trainer_for(base, config(tmp_path, model_init_kwargs=wanted))
    assert trainer.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.config.num_labels == 1  # a reward is one number, as in TRL
    assert {p.dtype for p in head_of(trainer).values()} == {torch.float32}
    trainer.train()
    assert all(value == value for value in history(trainer, "loss"))


def test_a_template_from_a_tokenizer_with_new_tokens_trains_them_and_reloads(base, tmp_path):
    """`chat_template_path` of a tokenizer adds tokens; with LoRA their embeddings are trained, saved and loaded."""
    source = tmp_path / "source"
    tiny_tokenizer("qwen").save_pretrained(source)
    args = config(tmp_path / "out", chat_template_path=str(source), max_steps=6, learning_rate=1e-2)
    peft = LoraConfig(r=4)
    trainer = trainer_for(base, args, pair_rows(16, chat=True), peft_config=peft)
    assert peft.trainable_token_indices is None  # the user's config is not changed
    added = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    tokenizer = trainer.processing_class
    assert set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])) <= set(added)
    assert tokenizer.eos_token == "<|im_end|>"
    trainer.train()
    trainer.save_model()

    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello there"}], return_dict=True)["input_ids"]
    assert set(ids) & set(added)
    batch = torch.tensor([ids])
    trainer.model.eval()
    with torch.no_grad():
        expected = candidate_scores(trainer.model, batch, torch.ones_like(batch))
        found = candidate_scores(load_reward_model(tmp_path / "out"), batch, torch.ones_like(batch))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_new_tokens_are_trained_beside_those_that_the_user_lists(base, tmp_path):
    tiny_tokenizer("qwen").save_pretrained(tmp_path / "source")
    args = config(tmp_path / "out", chat_template_path=str(tmp_path / "source"))
    peft = LoraConfig(r=4, trainable_token_indices=[3, 5])
    trainer = trainer_for(base, args, pair_rows(8, chat=True), peft_config=peft)
    trained = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert trained[:2] == [3, 5] and len(trained) > 2


def test_peft_arguments_that_cannot_work_are_refused_as_in_trl(base, tmp_path):
    with pytest.raises(TypeError, match="`peft_config` is a dict"):
        trainer_for(base, config(tmp_path), peft_config={"r": 4})
    trained = trainer_for(base, config(tmp_path), peft_config=LoraConfig(r=4))
    assert isinstance(trained.model, PeftModel)
    with pytest.raises(ValueError, match="has an adapter already"):
        trainer_for(trained.model, config(tmp_path), peft_config=LoraConfig(r=4))


def test_the_head_is_that_of_trl_for_the_same_seed(base, tmp_path):
    heads = [
        head_of(trainer_for(base, config(tmp_path, config_class, seed=7), None, trainer_class))
        for trainer_class, config_class in ((trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig))
    ]
    assert largest_difference(*heads) == 0


def test_under_bf16_autocast_it_stays_near_trl_and_its_scores_are_fp32(base, tmp_path):
    """TRL's head then computes in bf16, ours in fp32: 8 bits of mantissa are 0.03 at a score of 4."""
    theirs, ours = both(tmp_path, base, rows=pair_rows(32), bf16=True, max_steps=8, learning_rate=1e-4)
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), abs=2e-2)
    batch = replace(ours.data_collator, shared_prefix=False)([ours.train_dataset[0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = candidate_scores(ours.model, batch["input_ids"], batch["attention_mask"])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("peft", [None, lora], ids=["full", "lora"])
def test_a_compiled_model_trains_as_the_plain_one(peft, base, tmp_path):
    rows = Dataset.from_list(pair_rows(5, seed=1))
    found = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = config(tmp_path, max_steps=2, **compiled)
        trainer = trainer_for(base, args, eval_dataset=rows, peft_config=None if peft is None else peft())
        trainer.train()
        trainer.save_model()
        found.append([*history(trainer, "loss"), trainer.evaluate()["eval_loss"]])
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    """Off, reentrant, non-reentrant, with an adapter on frozen embeddings."""
    runs = []
    for kwargs in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs} if kwargs else {}
        trainer = trainer_for(base, config(tmp_path, max_steps=5, **more), pair_rows(24), peft_config=lora())
        trainer.train()
        runs.append(trainer)
    plain, *others = runs
    for other in others:
        assert history(other, "loss") == pytest.approx(history(plain, "loss"), abs=1e-5)
        assert largest_difference(weights(other), weights(plain)) < 1e-4
    assert all(p.abs().max() > 0 for name, p in weights(plain).items() if "lora_B" in name)
