"""Live bytes are counted once, for real tensors and for those without numbers; shapes of models are found by name."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trl_ext.fit.known_shapes import KNOWN_SHAPES, config_of
from trl_ext.fit.live_bytes import LiveBytes


def some_work():
    a = torch.ones(1024)
    b = a.view(32, 32)[:16]  # no storage of its own
    c = (a + 1).sum()
    return a, b, c


def test_peak_and_live_bytes_are_counted():
    with LiveBytes() as count:
        kept = some_work()
    assert (count.peak, count.live) == (8192 + 4, 4096 + 4) or (count.peak, count.live) == (8192, 4100)
    del kept
    assert count.live == 0


def test_tensors_without_numbers_count_the_same():
    with LiveBytes() as real:
        some_work()
    with FakeTensorMode(), LiveBytes() as fake:
        some_work()
    assert (real.peak, real.live) == (fake.peak, fake.live)


def test_known_tensors_and_what_backward_frees():
    weight = torch.ones(64, 64, requires_grad=True)
    with LiveBytes([weight]) as count:
        x = torch.ones(8, 64)
        loss = (x @ weight).relu().sum()
        before = count.live
        loss.backward()
    assert weight.grad is not None
    assert count.live - before < weight.numel() * 4 + 1  # the gradient came, what was saved went


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_shapes_have_the_parameters_that_their_names_say(name):
    from transformers import AutoModelForCausalLM

    config, source = config_of(name)
    assert name in source
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    said = float(name.rsplit("-", 1)[1].removesuffix("B"))
    assert billions == pytest.approx(said, rel=0.3)


def test_variants_share_a_shape_and_unknown_names_are_refused(tmp_path):
    assert config_of("Qwen/Qwen2.5-0.5B-Instruct")[0].hidden_size == 896
    assert config_of("meta-llama/Meta-Llama-3.1-8B-Instruct")[0].num_hidden_layers == 32
    config_of("Qwen/Qwen3-8B")[0].save_pretrained(tmp_path)
    assert config_of(str(tmp_path))[0].num_hidden_layers == 36
    with pytest.raises(ValueError, match="whose shape is known here"):
        config_of("someone/else")
