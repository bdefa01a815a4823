"""fp32 where it counts: LoRA and head on a quantized base, checkpointing, evaluation in between."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, TrainerCallback

from tests.models.helpers import int8, make_trainer, max_change, nf4, sequences, tiny_base, train
from tests.tiny import pair_rows
from trl_ext.models import build_reward_model, candidate_scores
from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.heads import head_parameters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"))


QUANTIZATION = {"fp32": None, "nf4": nf4(), "int8": int8()}


# ------------------------------------------------------------------------------------------------------- LoRA and head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_trainables_of_a_quantized_base_stay_fp32(base, tmp_path, quantization, dtype):
    trainer = make_trainer(
        base,
        tmp_path,
        peft_config=LoraConfig(),
        quantization_config=QUANTIZATION[quantization],
        model_init_kwargs={"dtype": dtype},
    )
    trainable = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trainable) and any("score" in name for name in trainable)
    assert set(trainable.values()) == {torch.float32}
    assert trainer.args.model_init_kwargs == {"dtype": dtype}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_whole_head_moves_at_a_small_learning_rate(base, tmp_path, bf16):
    trainer = make_trainer(
        base,
        tmp_path,
        rows=pair_rows(64),
        peft_config=LoraConfig(),
        quantization_config=nf4(),
        max_steps=100,
        learning_rate=2e-5,
        per_device_train_batch_size=2,
        bf16=bf16,
        logging_steps=100,
    )
    before = {name: p.detach().clone() for name, p in head_parameters(trainer.model, ["score"]).items()}
    trainer.train()
    after = head_parameters(trainer.model, ["score"])
    moved = torch.cat([(before[name] != after[name]).flatten() for name in before]).float().mean().item()
    assert moved >= 0.99
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


def test_scores_are_fp32_under_autocast_and_on_a_bf16_base(base):
    torch.manual_seed(0)
    model = build_reward_model(base, dtype="bfloat16")[0].eval()
    ids = torch.tensor([sequences()[4]] * 2)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = candidate_scores(model, ids, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = candidate_scores(model, ids, mask)
    for scores in (plain, inside):
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float()), "rounded to bf16 on the way"
    assert max_change(plain, inside) <= 2e-2


def test_bf16_base_trains_without_autocast(base, tmp_path):
    trainer = train(base, tmp_path, peft_config=LoraConfig(), model_init_kwargs={"dtype": "bfloat16"})
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
    kinds = {p.dtype for name, p in trainer.model.named_parameters() if not p.requires_grad and "score" not in name}
    assert kinds == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------- checkpointing
class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def _first_step(base, folder, quantization, checkpointing):
    arguments = {"gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    watch = _Gradients()
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)  # B is not zero, so A has a gradient
    trainer = make_trainer(
        base,
        folder,
        peft_config=config,
        quantization_config=QUANTIZATION[quantization],
        callbacks=[watch],
        max_steps=1,
        max_grad_norm=1e9,
        **arguments,
    )
    trainer.train()
    assert trainer.model.get_base_model().is_gradient_checkpointing == (checkpointing is not None)
    return trainer.state.log_history[0]["loss"], watch.found


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_gradient_checkpointing_changes_nothing(base, tmp_path, quantization):
    loss, gradients = _first_step(base, tmp_path, quantization, None)
    lora = [name for name in gradients if "lora_" in name]
    assert len(lora) == 28  # A and B of 7 weights in 2 layers
    for checkpointing in ("non-reentrant", "reentrant"):
        other_loss, other = _first_step(base, tmp_path, quantization, checkpointing)
        assert abs(loss - other_loss) <= 1e-4, checkpointing
        assert set(other) == set(gradients), checkpointing
        for name, gradient in gradients.items():
            assert gradient.any() and other[name].any(), f"{name} has no gradient ({checkpointing})"
            assert max_change(gradient, other[name]) <= 1e-4 * max(1.0, gradient.abs().max().item()), name


# ------------------------------------------------------------------------------------------ evaluation during training
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_evaluation_in_between_does_not_change_training(base, tmp_path, quantization):
    runs = []
    for evaluate in (False, True):
        arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": pair_rows(4, seed=9)} if evaluate else {}
        trainer = train(
            base,
            tmp_path / str(evaluate),
            peft_config=LoraConfig(),
            quantization_config=QUANTIZATION[quantization],
            max_steps=4,
            learning_rate=1e-2,
            **arguments,
        )
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == (4 if evaluate else 0)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)
    for name, parameter in runs[0][1].items():
        assert max_change(parameter, runs[1][1][name]) <= 1e-6, name


def test_bitsandbytes_still_has_the_switch_that_we_turn_off(base):
    fresh = bnb.nn.Linear4bit(64, 32)
    assert "support_avx512bf16_for_cpu" in fresh.__dict__, "renamed: keep_4bit_exact_on_cpu does nothing"
    model, _ = build_reward_model(base, quantization_config=nf4())
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_repacked_4bit_weights_are_refused(base):
    config = nf4(llm_int8_skip_modules=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, quantization_config=config).eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes does on CPUs with AVX512-BF16
    with pytest.raises(ValueError, match=r"repacked the 4-bit weights of `model\.layers\.0\.self_attn\.q_proj`"):
        keep_4bit_exact_on_cpu(model)
