"""Flat rows with a shared prompt: the layout is exact, and scores and gradients equal those of padded rows."""

import random

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.tiny import DECODER_FAMILIES, save_tiny_model
from trl_ext.data import prefix_layout
from trl_ext.data.prefix_layout import BLOCK_COST, AttentionBlock, Segment, block_segments, build_layout, split_prefix
from trl_ext.models.adapters import add_adapter
from trl_ext.models.building import build_reward_model
from trl_ext.models.heads import candidate_scores, run_with_head_output
from trl_ext.models.shared_prefix import (
    ATTENTION_NAME,
    flat_scores,
    flat_token_logits,
    select_attention,
    shared_prefix_attention,
    supports_shared_prefix,
)


SIZES = {"gpt2": {"n_embd": 64}, "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}}
WINDOWED = ("mistral", "gemma2", "gemma3_text", "phi3")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def ids(generator: random.Random, length: int) -> list[int]:
    return [generator.randint(5, 60) for _ in range(length)]


def ragged_groups(seed: int = 0):
    """Ragged K and lengths, K = 1, an empty prompt, a prompt of one token, completions of one token."""
    g = random.Random(seed)
    return [
        (ids(g, 20), [ids(g, 5), ids(g, 1), ids(g, 9)]),
        (ids(g, 3), [ids(g, 12), ids(g, 4)]),
        ([], [ids(g, 7), ids(g, 2)]),
        (ids(g, 1), [ids(g, 3)]),
    ]


def padded(groups):
    rows = [[*prompt, *own] for prompt, candidates in groups for own in candidates]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return input_ids, mask


def tiny_lora(path, family: str, quantization=None, checkpointing: bool | None = None, dtype="float32", **config):
    config = {**SIZES.get(family, {"hidden_size": 64, "intermediate_size": 128}), **config}
    if family in WINDOWED:
        config["sliding_window"] = 8
    save_tiny_model(path, family=family, **config)
    model, head = build_reward_model(str(path), quantization_config=quantization, dtype=dtype)
    torch.manual_seed(0)
    model = add_adapter(model, LoraConfig(target_modules="all-linear", lora_dropout=0.0), head)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model, scores):
    model.zero_grad()
    (scores * torch.arange(1, len(scores) + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, groups, tolerance=1e-5):
    attention = model.config.get_text_config()._attn_implementation
    expected = candidate_scores(model, *padded(groups))
    expected_gradients = gradients(model, expected)
    actual = flat_scores(model, build_layout(groups))[:, 0]
    actual_gradients = gradients(model, actual)
    select_attention(model, attention)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert actual_gradients.keys() == expected_gradients.keys() and len(actual_gradients) > 2
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, atol=float(tolerance * scale), rtol=0, msg=name)


def test_layout_by_hand():
    layout = build_layout([([7, 8], [[1], [2, 3]]), ([], [[4, 5]])])
    assert layout.input_ids.tolist() == [[7, 8, 1, 2, 3, 4, 5]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert layout.last.tolist() == [2, 4, 6]
    assert layout.num_tokens == 7 and layout.padded_tokens == 12
    assert layout.sequences() == [[7, 8, 1], [7, 8, 2, 3], [4, 5]]
    causal, completions = sorted(layout.blocks, key=lambda block: not block.causal)
    assert causal.key_index.tolist() == causal.query_index.tolist() == [[0, 1], [5, 6]]  # a prompt, a row without one
    assert causal.mask() is None
    assert causal.mask(1).long()[:, 0].tolist() == [[[1, 0], [0, 1]]] * 2
    assert completions.query_index.tolist() == [[3, 4], [2, 2]]
    assert completions.key_index.tolist() == [[0, 1, 3, 4], [0, 1, 2, 2]]
    # (A, 1, Q, T): the padded query stands where the real one does
    assert completions.mask().long()[:, 0].tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 0]]]
    assert completions.mask(2).long()[0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert completions.mask(9) is completions.mask()


def test_layout_moves_with_its_blocks():
    layout = build_layout(ragged_groups())
    here = [block.mask(3) for block in layout.blocks]
    moved = layout.to("meta")
    tensors = [moved.input_ids, moved.position_ids, moved.last, moved.inverse]
    tensors += [tensor for block in moved.blocks for tensor in (block.query_index, block.mask(3))]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert all(mask.device.type == "cpu" for mask in here) and moved.completions == layout.completions


def test_layout_refuses_an_empty_completion():
    with pytest.raises(ValueError, match="completion of group 1 is empty"):
        build_layout([([1], [[2]]), ([1], [[]])])


def test_every_token_is_found_again():
    layout = build_layout(ragged_groups())
    rows = torch.cat([block.query_index.flatten() for block in layout.blocks])
    assert rows[layout.inverse].tolist() == list(range(layout.num_tokens))


def test_blocks_hold_every_segment_once_and_pad_little():
    g = random.Random(0)
    for _ in range(200):
        prefixes = [g.choice([0, g.randint(1, 400)]) for _ in range(g.randint(1, 6))]
        segments = [Segment(0, g.randint(1, 300), 0, g.choice(prefixes)) for _ in range(g.randint(1, 40))]
        blocks = block_segments(segments)
        assert sorted(own for block in blocks for own in block) == sorted(segments)
        assert all(len({own.prefix_length == 0 for own in block}) == 1 for block in blocks)
        padded = [len(b) * max(own.length for own in b) * max(own.keys for own in b) for b in blocks]
        assert sum(padded) <= sum(own.length * own.keys for own in segments) + BLOCK_COST * len(segments)


def test_groups_of_one_shape_take_two_blocks():
    layout = build_layout([(range(50), [range(20)] * 4)] * 3)
    assert sorted(tuple(block.query_index.shape) for block in layout.blocks) == [(3, 50), (12, 20)]


def test_split_prefix_against_a_loop():
    g = random.Random(1)
    for _ in range(300):
        prompt = [g.choice("ab") for _ in range(g.randint(1, 8))]
        rows = [
            prompt[: g.randint(0, len(prompt))] + [g.choice("abc") for _ in range(g.randint(1, 4))]
            for _ in range(g.randint(1, 4))
        ]
        expected = 0
        while expected < min(map(len, rows)) - 1 and len({row[expected] for row in rows}) == 1:
            expected += 1
        prefix, own = split_prefix(rows)
        assert len(prefix) == expected and all(prefix + o == row and o for o, row in zip(own, rows, strict=True))


@pytest.mark.parametrize("cost", [0, BLOCK_COST], ids=["block each", "few blocks"])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_equals_a_dense_mask(cost, key_heads, window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(prefix_layout, "BLOCK_COST", cost)
    layout = build_layout(ragged_groups())
    n = layout.num_tokens
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 8) for heads in (4, key_heads, key_heads))
    sink = torch.randn(4) if sinks else None
    output, _ = shared_prefix_attention(
        None, query, key, value, None, prefix_layout=layout, sliding_window=window, softcap=softcap, s_aux=sink
    )
    sees = torch.zeros(n, n, dtype=torch.bool)
    for own in layout.completions:
        prompt = range(own.prefix_start, own.prefix_start + own.prefix_length)
        rows = [*prompt, *range(own.start, own.end)]
        for place, row in enumerate(rows):
            sees[row, rows[0 if window is None else max(0, place - window + 1) : place + 1]] = True
    key, value = (states.repeat_interleave(4 // key_heads, dim=1) for states in (key, value))
    logits = query @ key.transpose(2, 3) / 8**0.5
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(~sees, -torch.inf)
    if sinks:
        logits = torch.cat([logits, sink.view(1, 4, 1, 1).expand(-1, -1, n, -1)], dim=-1)
    expected = logits.softmax(-1)[..., :n] @ value
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_scores_and_gradients_equal_padded_rows(family, tmp_path):
    # OPT drops out by a function, not by a module
    model = tiny_lora(tmp_path, family, **({"dropout": 0.0} if family == "opt" else {}))
    support = supports_shared_prefix(model)
    assert support.supported, support.reason
    model.train()
    assert_same(model, ragged_groups())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_equal_whatever_the_blocks(family, tmp_path, monkeypatch):
    """A block for every segment, and one block for all, give the same."""
    model = tiny_lora(tmp_path, family)
    model.train()
    counts = []
    for cost in (0, 10**9):
        monkeypatch.setattr(prefix_layout, "BLOCK_COST", cost)
        counts.append(len(build_layout(ragged_groups()).blocks))
        assert_same(model, ragged_groups())
    assert counts == [11, 2]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equal_with_checkpointing_and_on_nf4(family, quantization, checkpointing, tmp_path):
    model = tiny_lora(tmp_path, family, quantization, checkpointing)
    assert supports_shared_prefix(model).supported
    model.train()
    assert_same(model, ragged_groups(1))


@pytest.mark.parametrize("heads", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=["mha", "mqa"])
def test_equal_for_other_head_layouts(heads, tmp_path):
    model = tiny_lora(tmp_path, "llama", num_attention_heads=4, **heads)
    model.train()
    assert_same(model, ragged_groups(2))


def test_eager_attention_and_bf16_autocast(tmp_path):
    model = tiny_lora(tmp_path, "qwen3")
    select_attention(model, "eager")
    assert supports_shared_prefix(model).supported
    model.train()
    assert_same(model, ragged_groups())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = candidate_scores(model, *padded(ragged_groups()))
        actual = flat_scores(model, build_layout(ragged_groups()))[:, 0]
    assert (actual - expected).abs().max() < 3e-2 * expected.abs().max().clamp_min(1)


def test_full_bf16_model(tmp_path):
    model = tiny_lora(tmp_path, "llama", dtype="bfloat16")
    assert supports_shared_prefix(model).supported
    with torch.no_grad():
        expected = candidate_scores(model, *padded(ragged_groups()))
        actual = flat_scores(model, build_layout(ragged_groups()))[:, 0]
    assert (actual - expected).abs().max() < 3e-2 * expected.abs().max().clamp_min(1)


def test_token_logits_equal_one_sequence_at_a_time(tmp_path):
    save_tiny_model(tmp_path, family="llama")
    model, _ = build_reward_model(str(tmp_path), num_labels=3)
    groups = ragged_groups()
    layout = build_layout(groups)
    with torch.no_grad():
        flat = flat_token_logits(model, layout)
    select_attention(model, "sdpa")
    assert flat.shape == (layout.num_tokens, 3)
    start = 0
    for prompt, candidates in groups:
        start += len(prompt)
        for own in candidates:
            row = torch.tensor([[*prompt, *own]])
            with torch.no_grad():
                raw = run_with_head_output(model, row, torch.ones_like(row))[1][0]
            torch.testing.assert_close(flat[start : start + len(own)], raw[len(prompt) :], atol=1e-5, rtol=1e-5)
            start += len(own)


def test_the_check_finds_a_wrong_window(tmp_path, monkeypatch):
    """A family passes by number: drop the window and the check must fail."""
    model = tiny_lora(tmp_path, "mistral")
    right = AttentionBlock.mask
    monkeypatch.setattr(AttentionBlock, "mask", lambda self, window=None: right(self, None))
    support = supports_shared_prefix(model)
    assert not support.supported and "differ by" in support.reason and support.max_difference > 1e-3


def test_unsupported_models_say_why_and_stay_as_they_were(tmp_path):
    save_tiny_model(tmp_path / "bert", family="bert", causal=False)
    bert, _ = build_reward_model(str(tmp_path / "bert"))
    assert "no decoder" in supports_shared_prefix(bert).reason
    llama = tiny_lora(tmp_path / "llama", "llama")
    llama.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in supports_shared_prefix(llama).reason
    llama.config._attn_implementation = "sdpa"
    llama.train()
    assert supports_shared_prefix(llama).supported
    assert llama.training and llama.config._attn_implementation == "sdpa"


def test_attention_is_switched_only_on_change(tmp_path):
    model = tiny_lora(tmp_path, "llama")
    flat_scores(model, build_layout(ragged_groups()))
    assert model.config._attn_implementation == ATTENTION_NAME
    select_attention(model, "sdpa")
    assert model.config._attn_implementation == "sdpa"
