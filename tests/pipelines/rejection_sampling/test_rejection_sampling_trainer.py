"""Rounds on a tiny model: they improve, the control does not; they resume, keep the best, take GRPO's arguments."""

import inspect
import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import trl
import wandb
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from tests.program import run_offline_wandb
from trl_ext import RejectionSamplingConfig, RejectionSamplingTrainer, RewardEnsemble
from trl_ext.demo.model import tiny_model, tiny_reward_base, tiny_tokenizer
from trl_ext.models.bases import BaseMismatchError
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator
from trl_ext.pipelines.rejection_sampling import round_training
from trl_ext.pipelines.rejection_sampling import trainer as rejection_sampling_trainer
from trl_ext.pipelines.rejection_sampling.diagnostics import log_rounds
from trl_ext.pipelines.rejection_sampling.rounds import Rounds
from trl_ext.pipelines.stages.cache_key import StaleError


ROWS = [{"prompt": f"say {number}:"} for number in range(32)]
LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")


def share_of_vowels(prompts, completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]


def length(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


def has_a_digit(prompts, completions, **kwargs):
    return [float(any(letter.isdigit() for letter in text)) for text in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_reward_base(tmp_path_factory.mktemp("base"), hidden_size=32)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Wide enough for the blocks of 4-bit weights."""
    return tiny_reward_base(tmp_path_factory.mktemp("wide_base"), hidden_size=64)


def config(folder, **kwargs):
    arguments = dict(num_generations=8, max_completion_length=12, generation_batch_size=512)
    arguments |= dict(max_steps=12, learning_rate=5e-3, per_device_train_batch_size=16, save_strategy="no")
    arguments |= dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False)
    return RejectionSamplingConfig(output_dir=str(folder), **(arguments | kwargs))


def trainer(base, folder, rewards=share_of_vowels, **kwargs):
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in inspect.signature(trainer_class).parameters}
    rows = Dataset.from_list(ROWS)
    return trainer_class(
        base, rewards, config(folder, **kwargs), **({"train_dataset": rows, "eval_dataset": rows} | given)
    )


trainer_class = RejectionSamplingTrainer


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of two rounds that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(base, folder, num_rounds=2)
    run.train()
    return run, folder


def weights(folder):
    return load_file(next(Path(folder).glob("*.safetensors")))


def test_it_improves_on_the_reward_and_the_matched_control_does_not(base, whole, tmp_path):
    best, folder = whole
    control = trainer(base, tmp_path, num_rounds=2, selection="random_per_prompt")
    control.train()
    assert [row["round"] for row in best.history] == [row["round"] for row in control.history] == [0, 1, 2]
    assert best.history[0] == control.history[0]
    rows = [row["rows"] for row in best.history[1:]]
    assert rows == [row["rows"] for row in control.history[1:]] == [32, 32]
    start = best.history[0]
    for other in (control.history[-1], start):
        gain = best.history[-1]["eval_reward"] - other["eval_reward"]
        assert gain > 4 * math.hypot(best.history[-1]["eval_reward_error"], other["eval_reward_error"])
    for row in best.history[1:]:
        assert row["selected_reward"] > row["reward"] and row["acceptance"] == 1 / 8
    # what is kept is a plain checkpoint, and is trainer.model
    kept = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(kept.lm_head.weight, best.model.lm_head.weight)
    assert (folder / "rounds.png").is_file()
    assert json.loads((folder / "rounds.json").read_text()) == best.history


def test_more_rounds_later_are_what_an_uninterrupted_run_gives(base, whole, tmp_path):
    trainer(base, tmp_path, num_rounds=1).train()
    again = trainer(base, tmp_path, num_rounds=2)
    assert again.train(resume_from_checkpoint=True).global_step == 12  # of the second round only
    check_same(again, tmp_path, whole)

    done = trainer(base, tmp_path, num_rounds=2)
    assert done.train().global_step == 0 and done.history == again.history
    with pytest.raises(ValueError, match="learning_rate=0.005, now 0.001"):
        trainer(base, tmp_path, num_rounds=2, learning_rate=1e-3).train()
    fresh = trainer(base, tmp_path, learning_rate=1e-3, max_steps=1, eval_dataset=None)
    fresh.train(resume_from_checkpoint=False)
    assert [row["round"] for row in fresh.history] == [0, 1]


def test_other_data_or_another_model_in_the_same_place_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    rows = Dataset.from_list([{"prompt": row["prompt"], "answer": "1"} for row in ROWS])
    arguments = dict(max_steps=1, num_generations=2, eval_dataset=None)
    trainer(folder, tmp_path / "out", train_dataset=rows, **arguments).train()
    others = rows.map(lambda row: {"answer": "2"})
    with pytest.raises(ValueError, match=r"made with other settings \(prompts="):
        trainer(folder, tmp_path / "out", train_dataset=others, **arguments).train()
    tiny_reward_base(folder, hidden_size=32, seed=7)
    with pytest.raises(ValueError, match=r"made with other settings \(model="):
        trainer(folder, tmp_path / "out", train_dataset=rows, **arguments).train()


def test_a_policy_is_evaluated_before_it_is_trained_and_by_a_new_trainer_after(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = dict(processing_class=tiny_tokenizer(), max_steps=1, num_generations=2)
    run = trainer(model, tmp_path, **arguments)
    assert run.model is model
    before = run.evaluate()
    run.train()
    assert before == {name: run.history[0][name] for name in before}
    assert run.model is not model
    after = trainer(model, tmp_path, **arguments).evaluate()
    assert after == {name: run.history[1][name] for name in after} != before


def test_another_chat_template_in_the_same_file_is_another_run(base, tmp_path):
    template = tmp_path / "template.jinja"
    settings = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        settings.append(config(tmp_path, chat_template_path=str(template)).settings_of_a_round())
    assert settings[0] != settings[1]


def check_same(run, folder, whole):
    """The run has the history and the weights of the uninterrupted one."""
    expected, found = weights(whole[1]), weights(folder)
    # after a resume Trainer's mean loss counts only the steps since
    without = [[{**row, "train_loss": 0} for row in item.history] for item in (run, whole[0])]
    assert without[0] == without[1]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


KILLED = """
import os, signal, sys
import tests.pipelines.rejection_sampling.test_rejection_sampling_trainer as here

class Kill(here.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

base, folder = sys.argv[1:]
run = here.trainer(base, folder, num_rounds=2, save_strategy="steps", save_steps=4, callbacks=[Kill()])
run.train()
"""


def test_a_run_that_is_killed_twice_goes_on(base, whole, tmp_path, monkeypatch):
    arguments = [sys.executable, "-c", KILLED, str(base), str(tmp_path)]
    killed = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]

    started = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)

    def stop(self, metrics):
        if metrics["round"] == 1:
            raise KeyboardInterrupt
        return finish(self, metrics)

    finish = RejectionSamplingTrainer._finish
    arguments = dict(num_rounds=2, save_strategy="steps", save_steps=4, callbacks=[Note()])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RejectionSamplingTrainer, "_finish", stop)  # trained and evaluated, and not recorded
        trainer(base, tmp_path, **arguments).train()
    again = trainer(base, tmp_path, **arguments)
    again.train()
    assert started == [8, 0]  # the first round from its checkpoint and only once, the second from its start
    check_same(again, tmp_path, whole)


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters(wide_base, tmp_path, quantized):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
    run = trainer(
        wide_base,
        tmp_path,
        num_rounds=2,
        start_from="initial" if quantized else "current",
        peft_config=LORA,
        quantization_config=quantization,
        max_steps=3,
        num_generations=2,
    )
    run.train()
    assert [row["round"] for row in run.history] == [0, 1, 2]
    assert isinstance(run.model, PeftModel)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "model.safetensors").exists()
    moved = [tensor for name, tensor in weights(tmp_path).items() if "lora_B" in name]
    assert moved and all(tensor.abs().max() > 0 for tensor in moved)
    evaluated = run.evaluate()
    assert evaluated == {name: run.history[run.best_round][name] for name in evaluated}


def test_initial_starts_over_from_the_first_weights(base, whole, tmp_path):
    run = trainer(base, tmp_path, num_rounds=2, start_from="initial", eval_dataset=None)
    run.train()
    assert run.best_round == 2  # without evaluation the last one is kept
    current, initial = whole[0].history, run.history
    assert current[1]["train_loss"] == initial[1]["train_loss"]
    assert current[2]["reward"] == initial[2]["reward"]  # both sample from the first round's policy
    assert current[2]["train_loss"] < initial[2]["train_loss"]  # one goes on, one starts over


def test_a_run_that_is_killed_when_its_last_round_is_recorded_has_reported_it(base, tmp_path, monkeypatch):
    arguments = dict(max_steps=1, num_generations=2, eval_dataset=None)

    def die(self, numbers):
        if 1 in numbers:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rounds, "keep", die)
        trainer(base, tmp_path, **arguments).train()
    again = trainer(base, tmp_path, **arguments)
    assert again.train().global_step == 0
    assert json.loads((tmp_path / "rounds.json").read_text()) == again.history


def test_a_tokenizer_that_was_only_looked_at_changes_no_store(base, tmp_path):
    run = trainer(base, tmp_path, eval_dataset=None)
    stores = [run._sampler(0, ROWS, tmp_path, 0)._generate.store.folder]
    assert run.processing_class is not None
    stores.append(run._sampler(0, ROWS, tmp_path, 0)._generate.store.folder)
    assert stores[0] == stores[1]


def test_another_tokenizer_is_another_run_and_training_leaves_yours_as_it_is(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = dict(processing_class=tokenizer, eval_dataset=None, max_steps=1, num_generations=2)
    arguments |= dict(eos_token=tokenizer.bos_token)  # of fine-tuning
    run = trainer(base, tmp_path, **arguments)
    run.train()
    assert tokenizer.eos_token != tokenizer.bos_token == run.processing_class.eos_token
    assert trainer(base, tmp_path, **arguments).train().global_step == 0
    for name, value in (("chat_template", "{{ messages }}"), ("eos_token", tokenizer.bos_token)):
        other = AutoTokenizer.from_pretrained(base)
        setattr(other, name, value)
        with pytest.raises(StaleError, match=r"made with other settings \(tokenizer="):
            trainer(base, tmp_path, **(arguments | {"processing_class": other})).train()


def test_a_bf16_checkpoint_is_trained_in_float32_and_generates_in_bf16(base, tmp_path, monkeypatch):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    seen = {"trains": [], "generates": []}
    of_policy = round_training.load_policy

    def load(*args):
        model = of_policy(*args)
        seen["trains"].append(model.dtype)
        return model

    run_generator = TransformersGenerator.generate

    def generate(self, *args, **kwargs):
        seen["generates"].append(self.model.dtype)
        return run_generator(self, *args, **kwargs)

    monkeypatch.setattr(round_training, "load_policy", load)
    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    run = trainer(half, tmp_path / "out", num_rounds=2, max_steps=2, num_generations=2, learning_rate=2e-5)
    run.train()
    assert set(seen["trains"]) == {torch.float32} and set(seen["generates"]) == {torch.bfloat16}
    before = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).state_dict()
    moved = [(before[name] != tensor).float().mean() for name, tensor in run.model.state_dict().items()]
    assert torch.stack(moved).mean() > 0.5  # most steps of 2e-5 are too small for bf16


@pytest.mark.parametrize("kind", [trl.SFTConfig, trl.RewardConfig])
def test_another_trainers_arguments_are_refused_when_the_trainer_is_made(base, tmp_path, kind):
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"args is a {kind.__name__}. Needed: a RejectionSamplingConfig"):
        trainer_class(base, share_of_vowels, args, train_dataset=Dataset.from_list(ROWS))


def test_an_adapter_that_would_load_as_another_one_is_refused(base, tmp_path):
    with pytest.warns(UserWarning, match="eva"), pytest.raises(ValueError, match="init_lora_weights='eva'"):
        trainer(base, tmp_path, peft_config=LoraConfig(target_modules="all-linear", init_lora_weights="eva"))
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(1.0)  # as if an adapter had been merged
    with pytest.raises(BaseMismatchError, match="differs from the files"):
        trainer(get_peft_model(changed, LoraConfig(target_modules="all-linear")), tmp_path)


def test_arguments_without_effect_are_warned_about(base, tmp_path, caplog):
    given = {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2, "batch_eval_metrics": True}
    trainer(base, tmp_path, **given)
    warned = {record.getMessage().split("=")[0] for record in caplog.records if "has no effect" in record.getMessage()}
    assert warned == set(given)


def test_a_column_that_is_missing_is_said_when_the_trainer_is_made(base, tmp_path):
    def graded(prompts, completions, answer, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="needs the argument 'answer', and the data has no such column"):
        trainer(base, tmp_path, graded, eval_dataset=None)


def test_rounds_that_go_on_with_what_cannot_be_compared_warn(base, tmp_path, caplog):
    lock = threading.Lock()

    def locked(completions, **kwargs):
        with lock:
            return [0.0] * len(completions)

    arguments = dict(rewards=[RewardEnsemble([length]), locked], max_steps=1, num_generations=2, eval_dataset=None)
    for told in (False, True):
        trainer(base, tmp_path, **arguments).train()
        assert ("go on with RewardEnsemble, an ensemble in memory, whose content cannot" in caplog.text) == told
        assert (
            f"The results of locked in {tmp_path / 'rounds'} are used again. The function reads lock" in caplog.text
        ) == told


@pytest.mark.parametrize("masked", [False, True])
def test_completions_that_were_cut_are_left_out_or_warned_of(base, tmp_path, caplog, masked):
    run = trainer(base, tmp_path, mask_truncated_completions=masked, eval_dataset=None, max_steps=1)
    with caplog.at_level(logging.WARNING):
        run.train()
    rows = [json.loads(line) for line in (tmp_path / "rounds" / "1" / "rows.jsonl").read_text().splitlines()]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    assert (cut == 0) == masked and len(rows) == run.history[1]["rows"]
    assert (f"{cut} of {len(rows)} selected completions were cut" in caplog.text) == (not masked)


def test_accumulation_trains_on_earlier_rounds_once(base, tmp_path):
    run = trainer(base, tmp_path, num_rounds=2, accumulate_rounds=True, eval_dataset=None, max_steps=2)
    run.train()
    assert run.history[1]["rows"] == 32
    assert 32 < run.history[2]["rows"] <= 64


def test_a_model_in_memory_is_not_changed_and_can_be_quantized_or_adapted(wide_base, tmp_path):
    model = tiny_model(hidden_size=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(model, tmp_path / "full", processing_class=tiny_tokenizer(), max_steps=2, eval_dataset=None)
    run.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(run.model.lm_head.weight, model.lm_head.weight)

    four_bit = AutoModelForCausalLM.from_pretrained(
        wide_base, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    run = trainer(four_bit, tmp_path / "four_bit", processing_class=tiny_tokenizer(), peft_config=LORA, max_steps=1)
    run.train()
    assert run.model.is_loaded_in_4bit

    adapted = PeftModel(AutoModelForCausalLM.from_pretrained(wide_base), LORA)
    run = trainer(adapted, tmp_path / "adapted", processing_class=tiny_tokenizer(), max_steps=1)
    run.train()
    assert isinstance(run.model, PeftModel)


SCRIPT = """
from trl import GRPOConfig, GRPOTrainer
args = GRPOConfig(
    output_dir=folder, num_generations=4, max_completion_length=8, per_device_train_batch_size=8, max_steps=2,
    temperature=0.9, beta=0.05, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
)
trainer = GRPOTrainer(model=base, reward_funcs=[reward, long], args=args, train_dataset=rows, callbacks=[])
trainer.train()
trainer.save_model(folder + "/saved")
"""


@pytest.mark.parametrize("swap", ["trainer", "both"])
def test_a_grpo_script_runs_with_the_class_swapped(base, tmp_path, swap, caplog):
    script = SCRIPT.replace("GRPOTrainer", "RejectionSamplingTrainer").replace(
        "from trl import GRPOConfig, RejectionSamplingTrainer",
        "from trl import GRPOConfig\\nfrom trl_ext import RejectionSamplingConfig, RejectionSamplingTrainer",
    )
    script = script.replace("\\n", "\n")
    if swap == "both":
        script = script.replace("GRPOConfig(", "RejectionSamplingConfig(").replace("beta=0.05, ", "")
    names = {"folder": str(tmp_path), "base": base, "rows": Dataset.from_list(ROWS[:8])}
    with caplog.at_level(logging.WARNING):
        exec(script, names | {"reward": share_of_vowels, "long": length})
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert ("have no meaning here: beta" in caplog.text) == (swap == "trainer")


def test_constructor_takes_all_that_grpo_s_takes():
    theirs = list(inspect.signature(trl.GRPOTrainer).parameters)
    ours = list(inspect.signature(RejectionSamplingTrainer).parameters)
    assert ours[: len(theirs)] == theirs


def test_grpo_arguments_become_ours(tmp_path):
    theirs = trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, top_p=0.9, learning_rate=3e-6, use_cpu=True, bf16=False
    )
    ours = RejectionSamplingConfig.from_grpo(theirs)
    assert (ours.num_generations, ours.top_p, ours.learning_rate) == (4, 0.9, 3e-6)
    assert ours.loss_type == "nll" and ours.generation_batch_size == 32
    defaults = RejectionSamplingConfig.from_grpo(trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    assert defaults.learning_rate == trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).learning_rate


def test_chats_with_a_loss_on_the_assistant_only(base, tmp_path):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS[:8]])

    def vowels(prompts, completions, **kwargs):
        return share_of_vowels(prompts, [completion[0]["content"] for completion in completions])

    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.read_text()
    run = trainer(
        base, tmp_path / "out", vowels, train_dataset=rows, eval_dataset=None, max_steps=2, assistant_only_loss=True,
        processing_class=tokenizer,
    )  # fmt: skip
    run.train()
    row = json.loads((tmp_path / "out" / "rounds" / "1" / "rows.jsonl").read_text().splitlines()[0])
    assert row["completion"][0]["role"] == "assistant"


def test_the_verifier_decides_which_round_is_kept_and_warns(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(base, tmp_path, num_rounds=3, verifier=has_a_digit)
        run.train()
    rated = {row["round"]: row["eval_verifier"] for row in run.history if row["round"]}
    assert run.best_round == max(rated, key=rated.get)
    # vowels in place of digits: the reward rises, the verifier falls
    assert run.history[-1]["hacking_suspected"] == 1.0
    assert "may be learning the reward's mistakes" in caplog.text
    policies = {int(path.parent.name) for path in (tmp_path / "rounds").glob("*/policy")}
    assert policies == {run.best_round, 3}


def two_rounds_to_wandb(folder, base):
    """Run in a process of its own (`run_offline_wandb`)."""
    seen = []

    def log(rows, plot):
        seen.append((wandb.run and wandb.run.name, [row["round"] for row in rows], plot is not None))
        log_rounds(rows, plot)

    rejection_sampling_trainer.log_rounds = log
    given = dict(num_rounds=2, max_steps=2, logging_steps=1, report_to="wandb", run_name="test")
    run = trainer(base, str(folder / "out"), **given)
    run.train()
    told = {"seen": seen, "summary": dict(wandb.run.summary), "last": run.history[-1]}
    wandb.run.finish()
    return told


def test_metrics_go_to_one_wandb_run_a_round(base, tmp_path):
    told = run_offline_wandb(two_rounds_to_wandb, tmp_path, base)
    assert told["seen"] == [[None, [0], True], ["test-round-1", [0, 1], True], ["test-round-2", [2], True]]
    assert told["summary"]["train/loss"] > 0
    assert {name: told["summary"][f"round/{name}"] for name in told["last"]} == told["last"]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"selection": "best_worst_pairs"}, "gives pairs, which supervised fine-tuning cannot use"),
        ({"selection": "threshold", "selection_kwargs": {"min_score": 99}}, "kept none of"),
        ({"selection": "top_per_promt"}, "Did you mean 'top_per_prompt'"),
        ({"num_rounds": 0}, "num_rounds=0"),
        ({"start_from": "last"}, "start_from='last'"),
        ({"use_vllm": True, "num_rounds": 2}, "would keep sampling from the weights"),
        ({"tools": [len]}, "cannot use `tools`"),
        ({"optimizers": (object(), None)}, "new optimizer"),
        ({"verifier": has_a_digit, "eval_dataset": None}, "eval_dataset, which is missing"),
        ({"train_dataset": None}, "needs train_dataset"),
        ({"eval_dataset": {"one": Dataset.from_list(ROWS)}}, "eval_dataset is a dict"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"fsdp": "full_shard"}, "FSDP and DeepSpeed"),
        ({"reward_processing_classes": [None, None]}, "2 reward_processing_classes for 1"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers; needed: 1"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(base, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        trainer(base, tmp_path, **kwargs).train()
