"""What the estimate says of a language model's weights, cache and logits is what arithmetic by hand says."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, DynamicCache

from trl_ext.fit.policy_estimate import (
    Policy,
    TextStep,
    Writing,
    cache_bytes,
    estimate_text_step,
    estimate_writing,
    weight_bytes,
)


LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 16, 512


def shape(**more):
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4)
    return AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, head_dim=WIDTH, num_key_value_heads=HEADS, pad_token_id=0, **sizes, **more
    )


def test_the_cache_has_keys_and_values_of_every_layer_and_token_but_the_last():
    job = Writing(Policy(shape(), torch.bfloat16), rows=3, prompt=10, completion=6, temperature=0.7, top_p=0.9)
    found = estimate_writing(job)
    each = 2 * LAYERS * HEADS * WIDTH * 2  # bytes of a token
    assert found.cache == 3 * (10 + 6 - 1) * each
    assert cache_bytes(job) == (10 + 6) * each
    assert found.weights["base"] >= weight_bytes(job.policy) and found.gradients == found.optimizer == 0
    assert found.logits == 3 * VOCABULARY * (2 + 4)  # of one token a row: bf16, and fp32 to draw from
    assert found.peak == sum(found.weights.values()) + found.activations
    greedy = estimate_writing(Writing(job.policy, 3, 10, 6))
    assert greedy.cache == found.cache and greedy.peak <= found.peak


def test_layers_with_a_window_keep_no_more_than_it():
    config = shape(sliding_window=4, use_sliding_window=True, max_window_layers=0)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    assert kinds == {"DynamicSlidingWindowLayer"}
    found = estimate_writing(Writing(Policy(config, torch.bfloat16), 3, 10, 6))
    assert found.cache <= 3 * 4 * 2 * LAYERS * HEADS * WIDTH * 2


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapters_of_a_4_bit_base_are_bf16_as_trls_trainer_casts_them(four_bit):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = Policy(shape(), torch.bfloat16, four_bit, peft_config=adapter)
    found = estimate_text_step(TextStep(policy, 2, 6, 6, plain=True, bf16=True))
    numbers = LAYERS * 4 * (64 + 4 * WIDTH)
    assert found.trained_parameters == numbers
    assert found.gradients == numbers * (2 if four_bit else 4)
    assert ("base, 4-bit" in {name for name, size in found.weights.items() if size}) == four_bit


def test_trls_trainer_holds_no_logits_and_a_teacher_adds_its_weights():
    policy, rows = Policy(shape(), torch.float32), dict(rows=2, prompt=20, completion=20)
    plain = estimate_text_step(TextStep(policy, **rows, plain=True))
    full = estimate_text_step(TextStep(policy, **rows))
    taught = estimate_text_step(TextStep(policy, **rows, teacher=policy))
    assert plain.logits == 0 and full.logits == taught.logits == 2 * 40 * VOCABULARY * 4
    assert taught.weights["teacher"] == full.weights["trained"] + full.weights["base"]
    assert taught.peak - full.peak > taught.weights["teacher"] + 2 * 20 * VOCABULARY * 4
    assert taught.flops == pytest.approx(full.flops * 4 / 3, rel=0.1)  # a forward pass beside forward and backward


def test_an_optimizer_of_unknown_size_is_refused():
    with pytest.raises(ValueError, match="lion_32bit"):
        estimate_text_step(TextStep(Policy(shape()), 1, 4, 4, optimizer="lion_32bit"))
