"""The stacked layers: each member's rows get that member's weights, in whatever shares and shapes they come."""

import pytest
import torch
from torch import nn

from trl_ext.models.ensemble.stacked_lora import MemberRows, StackedLinear, StackedLoRA, clip_by_member


M, R, D, O = 3, 2, 8, 5  # noqa: E741
GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(M, R, D, generator=GENERATOR), torch.randn(M, O, R, generator=GENERATOR)
BASE = nn.Linear(D, O)


def alone(x, member, scaling=0.5):
    return BASE(x) + scaling * (x @ A[member].T) @ B[member].T


@pytest.mark.parametrize("shape", [(4,), (4, 7), (1, 28)], ids=["pooled", "padded", "flat"])
def test_equal_shares(shape):
    rows = MemberRows(M)
    layer = StackedLoRA(BASE, A, B, scaling=0.5, dropout=0.0, rows=rows)
    xs = [torch.randn(*shape, D, generator=GENERATOR) for _ in range(M)]
    flat = shape[0] == 1
    x = torch.cat(xs, dim=1 if flat else 0)
    y = layer(x)
    expected = torch.cat([alone(x, m) for m, x in enumerate(xs)], dim=1 if flat else 0)
    assert torch.allclose(y, expected, atol=1e-6)
    rows.use(alone=1)
    assert torch.allclose(layer(xs[0]), alone(xs[0], 1), atol=1e-6)


@pytest.mark.parametrize("shares", [[2, 5, 1], [4, 4, 4], [0, 3, 3]])
def test_unequal_shares_and_their_gradients(shares):
    """Members with fewer rows see none of the others', and give them no gradient."""
    rows = MemberRows(M)
    layer = StackedLoRA(BASE, A.clone(), B.clone(), scaling=0.5, dropout=0.0, rows=rows)
    rows.use(shares)
    for shape in ((), (7,)):  # one row each, or 7 tokens each
        xs = [torch.randn(n, *shape, D, generator=GENERATOR) for n in shares]
        y = layer(torch.cat(xs))
        assert torch.allclose(y, torch.cat([alone(x, m) for m, x in enumerate(xs)]), atol=1e-6)
        layer.zero_grad()
        y.split(shares)[2].square().sum().backward()
        assert layer.lora_A.grad[:2].count_nonzero() == 0 and layer.lora_A.grad[2].count_nonzero() > 0


def test_rows_that_cannot_be_shared_out_are_refused():
    rows = MemberRows(M)
    rows.use([1, 2, 4])
    with pytest.raises(ValueError, match=r"6 rows cannot be divided among the members in the ratio \[1, 2, 4\]"):
        rows.split(torch.zeros(6, D))


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_fp32_under_autocast(bias):
    weight, offset = torch.randn(M, 2, D, generator=GENERATOR), torch.randn(M, 2, generator=GENERATOR)
    head = StackedLinear(weight, offset if bias else None, MemberRows(M))
    x = torch.randn(M * 2, D, generator=GENERATOR)
    with torch.autocast("cpu", torch.bfloat16):
        y = head(x.bfloat16())
    assert y.dtype == torch.float32
    for member in range(M):
        mine = slice(2 * member, 2 * member + 2)
        expected = x[mine].bfloat16().float() @ weight[member].T + (offset[member] if bias else 0)
        assert torch.allclose(y[mine], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_base(dtype):
    layer = StackedLoRA(nn.Linear(D, O).to(dtype), A, B, 1.0, 0.0, MemberRows(M))
    assert layer(torch.ones(M, D, dtype=dtype)).dtype == dtype


def test_clipping_is_that_of_separate_runs():
    stacked = [nn.Parameter(A.clone()), nn.Parameter(B.clone())]
    for p, size in zip(stacked, (3.0, 0.2), strict=True):
        p.grad = size * torch.randn(p.shape, generator=GENERATOR)
    stacked[1].grad[1] *= 1e-4
    stacked[0].grad[1] *= 1e-4  # this member's norm is small: it is not scaled
    before = [p.grad.clone() for p in stacked]
    norms = clip_by_member(stacked, 1.0)
    for member in range(M):
        single = [nn.Parameter(p.data[member].clone()) for p in stacked]
        for p, gradient in zip(single, before, strict=True):
            p.grad = gradient[member].clone()
        norm = nn.utils.clip_grad_norm_(single, 1.0)
        assert norms[member].item() == pytest.approx(norm.item(), rel=1e-6)
        for p, own in zip(stacked, single, strict=True):
            assert torch.allclose(p.grad[member], own.grad, rtol=1e-6, atol=0)
    assert torch.equal(stacked[0].grad[1], before[0][1])


def test_clipping_leaves_out_what_has_no_gradient_and_infinity_only_measures():
    p, unused = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    p.grad = torch.ones_like(p)
    assert clip_by_member([p, unused], float("inf")).tolist() == pytest.approx([4.0] * M)
    assert torch.equal(p.grad, torch.ones_like(p))
