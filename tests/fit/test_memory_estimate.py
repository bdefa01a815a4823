"""What the estimate says of weights and optimizer states is what arithmetic by hand and real optimizers say."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from trl_ext.fit.memory_estimate import TrainingStep, estimate


SIZES = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def shape():
    return AutoConfig.for_model("qwen3", vocab_size=512, head_dim=16, pad_token_id=0, **SIZES)


def step(**kwargs):
    ids = torch.arange(3, 11).expand(2, 8)
    return TrainingStep(config=shape(), batch={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **kwargs)


def test_weights_of_a_4bit_base_with_lora_are_those_worked_out_by_hand():
    found = estimate(
        step(
            dtype=torch.bfloat16,
            bf16=True,
            four_bit=True,
            nested=True,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            checkpointing=True,
        )
    )
    # (outputs, inputs) of a layer: q, k, v, o, gate, up, down
    linear = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    blocks = [rows * columns // 64 for rows, columns in linear]
    # half a byte a weight, a byte a block, 4 bytes for each 256 blocks, and two tables: of 256 and of 16 numbers
    packed = sum(32 * b + b + 4 * -(-b // 256) + 4 * 256 + 4 * 16 for b in blocks)
    adapters = sum(4 * (rows + columns) for rows, columns in linear)
    trained = 2 * adapters + 64  # both layers, and the head
    assert found.weights["base, 4-bit"] == 2 * packed
    assert found.weights["trained"] == 4 * trained == found.gradients  # fp32
    assert found.optimizer == 8 * trained
    norms = 2 * (2 * 64 + 2 * 16) + 64
    rest = found.weights["base"] - 2 * (512 * 64 + norms)  # bf16: embeddings and norms; no language-model head
    assert 0 <= rest <= 4 * (64 + 2 * 8)  # the head as it was before, and the frequencies of the positions
    # for the backward pass: at least a layer's input each, in bf16; at the peak the inner part of one MLP with it
    assert found.saved >= 2 * 2 * 16 * 64
    assert found.activations >= found.saved + 2 * 2 * 16 * 192


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit", "sgd"])
def test_states_of_an_optimizer_are_those_that_it_makes(optimizer, tmp_path):
    model = AutoModelForSequenceClassification.from_config(shape())
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}] * 2
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, optim=optimizer, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    states = [
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if name not in ("step", "qmap1", "qmap2")
    ]
    # 8 bit: not for embeddings, which Trainer leaves out, and not for tensors below 4,096 numbers
    assert estimate(step(optimizer=optimizer, num_labels=2)).optimizer == pytest.approx(sum(states), rel=0.01)
