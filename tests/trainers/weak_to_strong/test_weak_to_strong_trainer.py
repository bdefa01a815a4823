"""The weak-to-strong trainer: its loss beside TRL's and by hand, accumulation, LoRA and NF4, what it refuses."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback

from tests.tiny import save_tiny_model
from tests.trainers.helpers import config as trainer_config
from trl_ext import WeakToStrongConfig, WeakToStrongTrainer
from trl_ext.trainers.weak_to_strong.trainer import check_same_vocabulary


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A second Llama with the same tokenizer and other weights."""
    folder = save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def texts(number: int = 16) -> Dataset:
    words = [" cat", " a dog ran far", " of", " we saw it all again"]
    return Dataset.from_list([{"prompt": f"number {n}:", "completion": words[n % 4]} for n in range(number)])


def make(tmp_path, base, teacher=None, trainer=WeakToStrongTrainer, config_class=WeakToStrongConfig, **kwargs):
    more = {name: kwargs.pop(name) for name in ("peft_config", "processing_class", "eval_dataset") if name in kwargs}
    if trainer is WeakToStrongTrainer:
        more["teacher_model"] = teacher
    args = trainer_config(tmp_path, config_class, **kwargs)
    made = trainer(model=base if not isinstance(base, str) else str(base), args=args, train_dataset=texts(), **more)
    made.remove_callback(PrinterCallback)
    return made


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_without_a_teacher_it_is_trl_s_trainer(base, tmp_path):
    """The losses, and every metric that TRL logs, of five steps."""
    ours = make(tmp_path / "a", str(base), kd_weight=0.0, max_steps=5)
    theirs = make(tmp_path / "b", str(base), trainer=trl.SFTTrainer, config_class=trl.SFTConfig, max_steps=5)
    for trainer in (ours, theirs):
        trainer.train()
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), name
        assert len(logged(ours, name)) == 5


def test_loss_is_the_cross_entropy_plus_the_weighted_divergence(base, teacher, tmp_path):
    """The first step's loss against both models called by hand, a row at a time."""
    trainer = make(tmp_path, str(base), teacher, kd_weight=0.7, max_steps=1, per_device_train_batch_size=16)
    student, weak = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, teacher))
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for row in texts():
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            logs, weak_logs = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (student, weak))
        for place in range(len(prompt), len(ids)):
            own, other = logs[place - 1], weak_logs[place - 1]
            total += float(-own[ids[place]] + 0.7 * (other.exp() * (other - own)).sum())
            count += 1
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-4)
    parts = logged(trainer, "ce_loss")[0] + logged(trainer, "kd_loss")[0]
    assert parts == pytest.approx(total / count, rel=1e-4) and logged(trainer, "kd_weight") == [0.7]


def test_accumulation_gives_the_same_step(base, teacher, tmp_path):
    """Rows of unequal length: 16 x 1, 4 x 4 and 1 x 16 end in the same weights."""
    ends = []
    for size in (16, 4, 1):
        trainer = make(
            tmp_path / str(size),
            str(base),
            teacher,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            optim="sgd",
        )
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5 and (ends[0] - ends[2]).abs().max() < 1e-5


def test_teacher_draws_the_student_and_does_not_move(base, teacher, tmp_path):
    weak = AutoModelForCausalLM.from_pretrained(teacher)
    before = {name: value.clone() for name, value in weak.state_dict().items()}
    trainer = make(tmp_path, str(base), weak, kd_weight=20.0, max_steps=12, learning_rate=3e-3)
    trainer.train()
    divergences = logged(trainer, "kd_loss")
    assert divergences[-1] < 0.7 * divergences[0]
    assert all(torch.equal(value, before[name]) for name, value in weak.state_dict().items())
    assert not any("teacher" in name for name, _ in trainer.model.named_parameters())


def test_schedule_falls_to_zero(base, teacher, tmp_path):
    trainer = make(tmp_path, str(base), teacher, kd_weight=1.0, kd_schedule="linear", max_steps=4)
    trainer.train()
    assert logged(trainer, "kd_weight") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_evaluation_has_both_parts(base, teacher, tmp_path):
    args = trainer_config(tmp_path, WeakToStrongConfig, max_steps=1)
    trainer = WeakToStrongTrainer(str(base), teacher, args, train_dataset=texts(), eval_dataset=texts(8))
    metrics = trainer.evaluate()
    assert metrics["eval_ce_loss"] > 0 and metrics["eval_kd_loss"] > 0


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_adapters(quantized, base, teacher, tmp_path):
    init = {}
    if quantized:
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        init = {"model_init_kwargs": {"quantization_config": four_bit}}
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(tmp_path, str(base), teacher, max_steps=3, peft_config=peft_config, **init)
    trainer.train()
    assert logged(trainer, "kd_loss")[0] > 0 and all(map(torch.isfinite, map(torch.tensor, logged(trainer, "loss"))))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_another_vocabulary_is_refused(base, tmp_path_factory, tmp_path):
    other = str(save_tiny_model(tmp_path_factory.mktemp("other") / "gpt2", "gpt2"))
    with pytest.raises(ValueError, match="vocabularies of student and teacher"):
        make(tmp_path, str(base), other)
    with pytest.raises(ValueError, match="vocabularies of student and teacher"):
        make(tmp_path, str(base), AutoModelForCausalLM.from_pretrained(other))
    one = AutoTokenizer.from_pretrained(base)
    check_same_vocabulary(one, AutoTokenizer.from_pretrained(base))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kd_weight": -1.0}, "negative"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"kd_schedule": "cubic"}, "cubic"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_arguments_that_cannot_work(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_config(tmp_path, WeakToStrongConfig, **kwargs)


def test_no_teacher_is_an_error(base, tmp_path):
    with pytest.raises(ValueError, match="No teacher_model"):
        make(tmp_path, str(base), None)
    with pytest.raises(ValueError, match="compute_loss_func"):
        WeakToStrongTrainer(
            str(base),
            str(base),
            trainer_config(tmp_path, WeakToStrongConfig),
            train_dataset=texts(),
            compute_loss_func=lambda *given, **more: 0.0,
        )
    with pytest.raises(TypeError, match="WeakToStrongConfig"):
        WeakToStrongTrainer(str(base), args=trainer_config(tmp_path, trl.SFTConfig), train_dataset=texts())


def test_the_loss_of_an_evaluation_does_not_move_with_the_schedule(base, teacher, tmp_path):
    trainer = make(
        tmp_path,
        str(base),
        teacher,
        kd_schedule="linear",
        learning_rate=0.0,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=texts(9),
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert logged(trainer, "eval_kd_weight") == [trainer.args.kd_weight] * 3


def test_evaluation_metrics_do_not_depend_on_the_batch_size(base, teacher, tmp_path):
    found = []
    for size in (1, 2, 8):
        trainer = make(tmp_path, str(base), teacher, per_device_eval_batch_size=size, eval_dataset=texts(9))
        found.append(trainer.evaluate())
    for name in ("eval_ce_loss", "eval_kd_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert [metrics[name] for metrics in found] == pytest.approx([found[0][name]] * 3, rel=1e-5), name


def test_prompt_tuning_trains_as_with_trl(base, tmp_path):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    losses = []
    for kwargs in (dict(kd_weight=0.0), dict(trainer=trl.SFTTrainer, config_class=trl.SFTConfig)):
        torch.manual_seed(0)
        trainer = make(tmp_path, str(base), peft_config=tuning, max_steps=2, **kwargs)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_images_are_refused(base, tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "images": ["x.png"]}])
    args = trainer_config(tmp_path, WeakToStrongConfig, kd_weight=0.0)
    with pytest.raises(ValueError, match="reads only text. Remove the image columns"):
        WeakToStrongTrainer(model=str(base), args=args, train_dataset=rows)
