"""Token losses: by hand, against torch, what must not change them, extremes, labels out of range, and averaging."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.losses.helpers import softplus, with_gradient
from trl_ext.losses import average, averaging_items, bce, ce, hinge, mse, token_losses


# name, outputs per category, how labels are made
CASES = {
    "bce": ("bce", 1, "binary"),
    "bce-soft": ("bce", 1, "probability"),
    "ce-2": ("ce", 2, "binary"),
    "ce-2-soft": ("ce", 2, "probability"),
    "ce-3": ("ce", 3, "step"),
    "ce-2-distribution": ("ce", 2, "distribution"),
    "ce-3-distribution": ("ce", 3, "distribution"),
    "mse": ("mse", 1, "number"),
    "hinge": ("hinge", 1, "sign"),
    "hinge-binary": ("hinge", 1, "binary"),
}
each_case = pytest.mark.parametrize(("name", "outputs", "kind"), CASES.values(), ids=CASES)
each_average = pytest.mark.parametrize("how", ["token", "sequence"])


def made_up(outputs, kind, size=8, tokens=6, categories=2, seed=0):
    """Logits, labels and a mask with holes anywhere; sequence 0 has no label, the others have unequal numbers."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, tokens, categories, outputs, generator=generator)
    shape = (size, tokens, categories)
    labels = {
        "binary": lambda: torch.randint(0, 2, shape, generator=generator).float(),
        "probability": lambda: torch.rand(shape, generator=generator),
        "step": lambda: torch.randint(-1, 2, shape, generator=generator).float(),
        "number": lambda: 5 * torch.randn(shape, generator=generator),
        "sign": lambda: 2 * torch.randint(0, 2, shape, generator=generator).float() - 1,
        "distribution": lambda: torch.randn(*shape, outputs, generator=generator).softmax(-1),
    }[kind]()
    mask = torch.rand(shape, generator=generator) < torch.linspace(0, 1, size)[:, None, None]
    return logits, labels, mask


def flat(outputs, *rows):
    """Logits (1, T, 1, C) and labels (1, T, 1), all annotated, from pairs (logits, label)."""
    logits = torch.tensor([logits for logits, _ in rows]).view(1, len(rows), 1, outputs)
    labels = torch.tensor([label for _, label in rows]).view(1, len(rows), 1)
    return logits, labels, torch.ones(1, len(rows), 1, dtype=torch.bool)


def fill(tensor, mask, filling):
    return tensor.masked_fill(~(mask if tensor.dim() == 3 else mask[..., None]), filling)


# By hand


def test_bce_by_hand():
    wanted = softplus(-2.0) + softplus(-1.0) + 0.3 * softplus(-0.5) + 0.7 * softplus(0.5)
    rows = ([2.0], 1.0), ([-1.0], 0.0), ([0.5], 0.3)
    assert bce(*flat(1, *rows)).item() == pytest.approx(wanted)
    weighted = 4 * softplus(-2.0) + 0.5 * softplus(-1.0) + 4 * 0.3 * softplus(-0.5) + 0.5 * 0.7 * softplus(0.5)
    assert bce(*flat(1, *rows), class_weights=[0.5, 4.0]).item() == pytest.approx(weighted)


def test_ce_by_hand():
    # e^0, e^0, e^2 for -1, 0, +1
    total = 2 + math.e**2
    rows = [([0.0, 0.0, 2.0], label) for label in (1.0, 0.0, -1.0)]
    assert ce(*flat(3, *rows)).item() == pytest.approx(3 * math.log(total) - 2)
    weighted = 2 * (math.log(total) - 2) + 0.5 * math.log(total) + 3 * math.log(total)
    assert ce(*flat(3, *rows), class_weights=[3.0, 0.5, 2.0]).item() == pytest.approx(weighted)
    rows = ([1.0, 3.0], 1.0), ([1.0, 3.0], 0.0), ([1.0, 3.0], 0.25)
    wanted = softplus(-2.0) + softplus(2.0) + 0.25 * softplus(-2.0) + 0.75 * softplus(2.0)
    assert ce(*flat(2, *rows)).item() == pytest.approx(wanted)


def test_mse_and_hinge_by_hand():
    assert mse(*flat(1, ([2.0], 5.0), ([-1.0], -1.5))).item() == pytest.approx(9.25)
    rows = ([2.0], 1.0), ([0.25], 1.0), ([-0.5], -1.0), ([3.0], -1.0), ([-1.0], -1.0)
    assert hinge(*flat(1, *rows)).item() == pytest.approx(0.0 + 0.75 + 0.5 + 4.0 + 0.0)
    assert hinge(*flat(1, *rows), margin=2.0).item() == pytest.approx(0.0 + 1.75 + 1.5 + 5.0 + 1.0)
    assert hinge(*flat(1, *rows), class_weights=[10.0, 2.0]).item() == pytest.approx(2 * 0.75 + 10 * 4.5)


def test_docstring_values():
    assert bce(*flat(1, ([2.0], 1.0), ([0.0], 0.5))).item() == pytest.approx(0.8201, abs=1e-4)
    assert ce(*flat(3, ([0.0, 0.0, 2.0], 1.0))).item() == pytest.approx(0.2395, abs=1e-4)
    assert mse(*flat(1, ([2.0], 1.0), ([0.0], 0.5))).item() == pytest.approx(1.25)
    assert hinge(*flat(1, ([2.0], 1.0), ([0.5], -1.0))).item() == pytest.approx(1.5)


def test_names():
    assert [name for name, _ in token_losses.available()] == ["bce", "ce", "hinge", "mse"]
    assert token_losses.get("ce") is ce


# Against torch


@pytest.mark.parametrize("kind", ["binary", "probability"])
def test_bce_equals_torch_in_loss_and_gradient(kind):
    logits, labels, mask = made_up(1, kind)
    weight = labels * 3.0 + (1 - labels) * 0.5 if kind == "binary" else None

    def reference(logits):
        terms = F.binary_cross_entropy_with_logits(logits[..., 0], labels, weight, reduction="none")
        return torch.stack([terms[b][mask[b]].sum() for b in range(len(terms))])

    weights = [0.5, 3.0] if kind == "binary" else None
    found = with_gradient(bce, logits, labels, mask, class_weights=weights)
    torch.testing.assert_close(found, with_gradient(reference, logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.5]])
@pytest.mark.parametrize(("outputs", "kind"), [(2, "binary"), (3, "step")])
def test_hard_ce_equals_torch_with_ignore_index(outputs, kind, weights):
    logits, labels, mask = made_up(outputs, kind)
    weights = weights and weights[:outputs]
    classes = (labels + (1 if outputs == 3 else 0)).long().masked_fill(~mask, -100)

    def reference(logits):
        terms = F.cross_entropy(
            logits.flatten(0, 2),
            classes.flatten(),
            weight=weights and torch.tensor(weights),
            ignore_index=-100,
            reduction="none",
        )
        return terms.view(mask.shape).sum((1, 2))

    found = with_gradient(ce, logits, labels, mask, class_weights=weights)
    torch.testing.assert_close(found, with_gradient(reference, logits), rtol=1e-5, atol=1e-5)
    # TRL's former PRMTrainer: the mean over the labelled tokens of a batch
    if weights is None:
        mean = F.cross_entropy(logits.flatten(0, 2), classes.flatten())
        torch.testing.assert_close(average(ce(logits, labels, mask), mask), mean)


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.5]])
@pytest.mark.parametrize("outputs", [2, 3])
def test_soft_ce_equals_torch(outputs, weights):
    logits, labels, mask = made_up(outputs, "distribution")
    weights = weights and weights[:outputs]

    def reference(logits):
        weight = weights and torch.tensor(weights)
        terms = F.cross_entropy(logits.flatten(0, 2), labels.flatten(0, 2), weight=weight, reduction="none")
        return (terms.view(mask.shape) * mask).sum((1, 2))

    found = with_gradient(ce, logits, labels, mask, class_weights=weights)
    torch.testing.assert_close(found, with_gradient(reference, logits), rtol=1e-5, atol=1e-5)


def test_mse_equals_torch():
    logits, labels, mask = made_up(1, "number")
    wanted = (F.mse_loss(logits[..., 0], labels, reduction="none") * mask).sum((1, 2))
    torch.testing.assert_close(mse(logits, labels, mask), wanted)


def test_hinge_equals_torch():
    logits, labels, mask = made_up(1, "sign")
    wanted = F.multi_margin_loss(
        torch.stack([-logits[..., 0], logits[..., 0]], -1).flatten(0, 2) / 2,
        (labels > 0).long().flatten(),
        reduction="none",
    )
    wanted = 2 * wanted.view(mask.shape)  # torch divides by the number of classes
    torch.testing.assert_close(hinge(logits, labels, mask), (wanted * mask).sum((1, 2)))


@pytest.mark.parametrize("kind", ["binary", "probability"])
def test_two_classes_equal_bce_of_the_difference(kind):
    logits, labels, mask = made_up(2, kind)
    difference = logits[..., 1:] - logits[..., :1]
    torch.testing.assert_close(ce(logits, labels, mask), bce(difference, labels, mask), rtol=1e-5, atol=1e-5)


def test_a_hard_label_equals_its_distribution():
    logits, labels, mask = made_up(3, "step")
    wanted = ce(logits, F.one_hot((labels + 1).long(), 3).float(), mask)
    torch.testing.assert_close(ce(logits, labels, mask), wanted, rtol=0, atol=0)


@each_case
def test_gradients_by_finite_differences(name, outputs, kind):
    logits, labels, mask = made_up(outputs, kind, size=4, tokens=3)
    logits = logits.double().requires_grad_()
    loss = token_losses.get(name)
    assert loss(logits, labels, mask).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda logits: loss(logits, labels, mask), logits)


# What must not change a loss


@pytest.mark.parametrize("filling", [0.0, -100.0, 1e30, torch.inf, torch.nan])
@each_case
def test_what_is_not_annotated(name, outputs, kind, filling):
    """Logits and labels there may hold anything: neither the value nor the gradient sees it."""
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    value, grad = with_gradient(loss, logits, labels, mask)
    found = with_gradient(loss, fill(logits, mask, filling), fill(labels, mask, filling), mask)
    assert torch.equal(found[0], value) and torch.equal(found[1], grad)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@each_case
def test_padding_and_batch_composition(name, outputs, kind):
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    value = loss(logits, labels, mask)
    padded = [torch.cat([tensor, tensor[:, :3]], dim=1) for tensor in (logits, labels, mask)]
    padded[2][:, -3:] = False
    torch.testing.assert_close(loss(*padded), value, rtol=1e-6, atol=1e-6)
    alone = torch.cat([loss(logits[b : b + 1], labels[b : b + 1], mask[b : b + 1]) for b in range(len(mask))])
    torch.testing.assert_close(alone, value, rtol=1e-6, atol=1e-6)


@each_case
def test_order_of_tokens_and_categories(name, outputs, kind):
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    value = loss(logits, labels, mask)
    for dim in (1, 2):
        flipped = [tensor.flip(dim) for tensor in (logits, labels, mask)]
        torch.testing.assert_close(loss(*flipped), value, rtol=1e-5, atol=1e-5)
    by_category = sum(loss(logits[:, :, g : g + 1], labels[:, :, g : g + 1], mask[:, :, g : g + 1]) for g in range(2))
    torch.testing.assert_close(by_category, value, rtol=1e-5, atol=1e-5)


def test_a_shift_of_all_logits_of_a_softmax():
    logits, labels, mask = made_up(3, "step")
    torch.testing.assert_close(ce(logits + 8, labels, mask), ce(logits, labels, mask), rtol=1e-5, atol=1e-5)


def test_class_weights_of_one_are_none():
    for name, outputs, kind in CASES.values():
        if name != "mse":
            loss, batch = token_losses.get(name), made_up(outputs, kind)
            ones = torch.ones(max(outputs, 2))
            assert torch.equal(loss(*batch, class_weights=ones), loss(*batch))


def test_the_two_forms_of_hinge_labels():
    logits, labels, mask = made_up(1, "sign")
    assert torch.equal(hinge(logits, labels.clamp(min=0), mask), hinge(logits, labels, mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_types_of_labels(dtype):
    logits, labels, mask = made_up(1, "binary")
    assert torch.equal(bce(logits, labels.to(dtype), mask), bce(logits, labels, mask))


# Extremes


@each_case
def test_without_annotation_exactly_zero(name, outputs, kind):
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    value, grad = with_gradient(loss, logits, labels, mask)
    assert value[0].item() == 0.0 and (grad[0] == 0).all() and (value[1:] > 0).any()
    for tensor in (logits, labels):
        tensor.fill_(torch.nan)
    value, grad = with_gradient(loss, logits, labels, torch.zeros_like(mask))
    assert value.tolist() == [0.0] * len(mask) and (grad == 0).all()
    empty = [tensor[:, :0] for tensor in (logits, labels, mask)]
    assert loss(*empty).tolist() == [0.0] * len(mask)


@each_case
def test_logits_of_ten_thousand(name, outputs, kind):
    logits, labels, mask = made_up(outputs, kind)
    value, grad = with_gradient(token_losses.get(name), logits.sign() * 1e4, labels, mask)
    assert value.isfinite().all() and grad.isfinite().all()
    # a confident mistake costs what it should, and its gradient does not vanish
    value, grad = with_gradient(bce, *flat(1, ([-1e4], 1.0)))
    assert value.item() == 1e4 and grad.item() == -1.0
    value, grad = with_gradient(ce, *flat(3, ([1e4, 0.0, -1e4], 1.0)))
    assert value.item() == 2e4 and grad.flatten().tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_low_precision_logits_are_computed_in_fp32(name, outputs, kind, dtype):
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    low = logits.to(dtype)
    value, grad = with_gradient(loss, low, labels, mask)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, loss(low.float(), labels, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(low, labels, mask), value)


@each_case
def test_nan_is_not_hidden_and_stays_in_its_sequence(name, outputs, kind):
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    clean, clean_grad = with_gradient(loss, logits, labels, mask)
    place = mask[3].nonzero()[0].tolist()
    logits[3, *place] = torch.nan
    value, grad = with_gradient(loss, logits, labels, mask)
    assert value.isnan().tolist() == [b == 3 for b in range(len(mask))]
    others = torch.arange(len(mask)) != 3
    assert torch.equal(value[others], clean[others]) and torch.equal(grad[others], clean_grad[others])


# Labels out of range, shapes, weights


@pytest.mark.parametrize(
    ("loss", "outputs", "label", "complaint"),
    [
        (bce, 1, 1.5, r"labels in \[0, 1\], found 1.5 in sequence 1 of the batch, token 2, category 0"),
        (bce, 1, -1.0, r"labels in \[0, 1\], found -1.0"),
        (bce, 1, torch.nan, "found nan"),
        (ce, 2, 2.0, r"labels in \[0, 1\] for 2 classes, found 2.0"),
        (ce, 2, -1.0, r"for 2 classes, found -1.0"),
        (ce, 3, 2.0, "labels -1, 0 or 1 for 3 classes, found 2.0"),
        (ce, 3, 0.5, "labels -1, 0 or 1 for 3 classes, found 0.5"),
        (ce, 3, torch.nan, "found nan"),
        (mse, 1, torch.inf, "finite labels, found inf"),
        (hinge, 1, 0.5, r"labels \+1 and -1, or 1 and 0, found 0.5"),
        (hinge, 1, torch.nan, "found nan"),
    ],
)
def test_labels_out_of_range(loss, outputs, label, complaint):
    logits, mask = torch.zeros(2, 3, 1, outputs), torch.ones(2, 3, 1, dtype=torch.bool)
    labels = torch.ones(2, 3, 1)
    labels[1, 2, 0] = label
    with pytest.raises(ValueError, match=complaint):
        loss(logits, labels, mask)
    mask[1, 2, 0] = False
    assert loss(logits, labels, mask).isfinite().all()


def test_distributions_out_of_range():
    logits, mask = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, dtype=torch.bool)
    for labels in ([0.5, 0.5, 0.5], [1.5, -0.5, 0.0], [torch.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="3 probabilities of sum 1 a label, found .* token 1"):
            ce(logits, torch.tensor([[0.2, 0.3, 0.5], labels]).view(1, 2, 1, 3), mask)


def test_hinge_refuses_three_kinds_of_labels():
    with pytest.raises(ValueError, match="not -1 beside 0, found 0.0 in sequence 0 of the batch, token 1"):
        hinge(*flat(1, ([0.0], -1.0), ([0.0], 0.0), ([0.0], 1.0)))


def test_wrong_shapes_and_weights():
    logits, labels, mask = made_up(1, "binary")
    with pytest.raises(ValueError, match=r"logits\[:, :, None, :\]"):
        bce(logits[:, :, 0], labels, mask)
    with pytest.raises(ValueError, match=r"needs 2 or 3 output\(s\) per category, found 1"):
        ce(logits, labels, mask)
    with pytest.raises(ValueError, match=r"needs 1 output\(s\) per category, found 2"):
        bce(logits.expand(-1, -1, -1, 2), labels, mask)
    with pytest.raises(ValueError, match="needs labels of the shape"):
        bce(logits, labels[..., None], mask)
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        bce(logits, labels, mask.long())
    for weights in ([1.0], [1.0, -1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="needs 2 finite class weights"):
            bce(logits, labels, mask, class_weights=weights)
    with pytest.raises(ValueError, match="`mse` cannot use class weights"):
        mse(logits, labels, mask, class_weights=[1.0, 1.0])
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin above 0"):
            hinge(logits, labels, mask, margin=margin)


# Averaging


def test_average_by_hand():
    sums = torch.tensor([3.0, 5.0, 0.0])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])[..., None]
    assert averaging_items(mask).tolist() == [3, 1, 0] and averaging_items(mask, "sequence").tolist() == [1, 1, 0]
    assert average(sums, mask).item() == 8 / 4
    assert average(sums, mask, "sequence").item() == (3 / 3 + 5 / 1) / 2
    assert average(sums[2:], mask[2:]).item() == average(sums[2:], mask[2:], "sequence").item() == 0.0


@each_average
@each_case
def test_accumulation_equals_one_batch(name, outputs, kind, how):
    """4 x 2 sequences give the loss and the gradient of 8, though each two have another number of labels."""
    loss = token_losses.get(name)
    logits, labels, mask = made_up(outputs, kind)
    total = averaging_items(mask, how).sum()

    def accumulated(logits):
        parts = [slice(start, start + 2) for start in range(0, len(mask), 2)]
        return sum(average(loss(logits[i], labels[i], mask[i]), mask[i], how, num_items=total) for i in parts)

    wanted = with_gradient(lambda logits: average(loss(logits, labels, mask), mask, how), logits)
    torch.testing.assert_close(with_gradient(accumulated, logits), wanted, rtol=1e-5, atol=1e-5)
    assert len(set(mask.flatten(1).sum(1).tolist())) > 4


def test_sequence_averaging_weighs_completions_alike():
    """Repeating every token of a completion changes its share by token, not by sequence."""
    logits, labels, mask = made_up(1, "binary", size=4)
    sums = bce(logits, labels, mask)
    factor = torch.tensor([1.0, 1.0, 1.0, 5.0])
    longer = torch.cat([mask, *[mask & (factor > 1)[:, None, None]] * 4], dim=1)
    torch.testing.assert_close(average(sums * factor, longer, "sequence"), average(sums, mask, "sequence"))
    assert abs(average(sums * factor, longer) - average(sums, mask)) > 1e-3


def test_average_errors():
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="'token' or by 'sequence', found 'mean'"):
        average(torch.zeros(2), mask, "mean")
    with pytest.raises(ValueError, match=r"shape \(2,\), found \(3,\)"):
        average(torch.zeros(3), mask)
