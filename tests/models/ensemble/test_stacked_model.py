"""Members of one base in one pass: ordinary adapters on disk, the same scores alone and together, family by family."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.tiny import DECODER_FAMILIES, save_tiny_model
from trl_ext import load_reward_model
from trl_ext.data.prefix_layout import build_layout
from trl_ext.models.building import build_reward_model
from trl_ext.models.ensemble.member_config import branch_at
from trl_ext.models.ensemble.stacked_lora import StackedLoRA
from trl_ext.models.ensemble.stacked_model import (
    MEMBER,
    StackedRewardModel,
    member_scores,
    member_token_logits,
)
from trl_ext.models.heads import HeadError, candidate_scores
from trl_ext.models.shared_prefix import current_attention, flat_scores, select_attention, supports_shared_prefix


M = 3
LAYERS = {"gpt2": "n_layer"}
IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12) < torch.tensor([[12], [5], [9], [1]])).long()


def stacked(folder, family="llama", share=None, seeds=range(M), quantization=None, targets="all-linear", **lora):
    base = folder / "base"
    if not base.is_dir():
        save_tiny_model(base, family, **{LAYERS.get(family, "num_hidden_layers"): 3})
    model, head = build_reward_model(str(base), quantization_config=quantization)
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=12, **lora)
    config = config if share is None else branch_at(model, config, share)
    model = StackedRewardModel(model, config, head, M, seeds)
    generator = torch.Generator().manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, StackedLoRA):  # as if it were trained
            layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def scores_of(model):
    return member_scores(model, IDS, MASK)


@pytest.fixture
def llama(tmp_path):
    return stacked(tmp_path, share=0.5)


@torch.no_grad()
def test_each_member_is_an_ordinary_adapter(llama, tmp_path):
    """Load_reward_model and plain PEFT read a member's folder, and it scores as it did among the others."""
    llama.save_pretrained(str(tmp_path / "out"))
    together = scores_of(llama)
    assert together.std(0).min() > 1e-3
    for member in range(M):
        folder = tmp_path / "out" / MEMBER.format(member)
        ours = load_reward_model(folder)
        assert (candidate_scores(ours, IDS, MASK) - together[member]).abs().max() < 1e-6
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        plain = PeftModel.from_pretrained(plain, folder).eval()
        output = plain(input_ids=IDS[:1], attention_mask=MASK[:1]).logits[0, 0]
        assert abs(output - together[member, 0]) < 1e-6
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["layers_to_transform"] == [1, 2] and config["inference_mode"]


def test_conversion_is_exact(llama, tmp_path):
    llama.save_pretrained(str(tmp_path / "out"))
    folders = [tmp_path / "out" / MEMBER.format(member) for member in (2, 0, 1)]  # any order
    again = StackedRewardModel.from_folders(folders)
    for member, source in enumerate((2, 0, 1)):
        mine, theirs = again.member_state(member), llama.member_state(source)
        assert mine.keys() == theirs.keys() and len(mine) == 2 * 14 + 1
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(scores_of(again), scores_of(llama)[[2, 0, 1]])
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    assert again.branch_layer == llama.branch_layer == 1


@pytest.mark.parametrize("share", [None, 0.7])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_families(family, share, tmp_path):
    """Padded and flat rows, all members and each alone; routers and fused experts are no linear layers."""
    targets = ["q_proj", "v_proj"] if family in ("mixtral", "qwen3_moe") else "all-linear"
    model = stacked(tmp_path, family, share, targets=targets)
    assert model.branch_layer == (0 if share is None else 2)
    together = scores_of(model)
    for member in range(M):
        model.use_rows(alone=member)
        assert (scores_of(model)[0] - together[member]).abs().max() < 1e-5
    model.use_rows()
    if not supports_shared_prefix(model).supported:
        assert family == "opt"
        return
    groups = [([7, 8, 9], [[10, 11], [12]]), ([], [[4, 5, 6]]), ([20] * 5, [[21], [22, 23], [24]])]
    with torch.no_grad():
        plain = current_attention(model)
        flat = flat_scores(model, build_layout(groups))[:, 0].view(M, -1)
        select_attention(model, plain)
        rows = [torch.tensor([prompt + own]) for prompt, candidates in groups for own in candidates]
        padded = torch.cat([member_scores(model, row, torch.ones_like(row)) for row in rows], dim=1)
    assert flat.shape == padded.shape == (M, 6)
    assert (flat - padded).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders(family, tmp_path):
    model = stacked(tmp_path, family, 0.5)
    together = scores_of(model)
    model.use_rows(alone=2)
    assert (scores_of(model)[0] - together[2]).abs().max() < 1e-6


@pytest.mark.parametrize("family,reason", [("deberta-v2", "cannot run all members"), ("modernbert", "LayerNorm")])
def test_families_that_cannot_be_stacked_are_refused(family, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        stacked(tmp_path, family)


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "int8"],
)
def test_one_quantized_base(quantization, tmp_path):
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    model = stacked(tmp_path, share=0.5, quantization=quantization)
    together = scores_of(model)
    model.save_pretrained(str(tmp_path / "out"))
    for member in range(M):
        model.use_rows(alone=member)
        # int8 chooses its scales by the rows of the batch
        assert (scores_of(model)[0] - together[member]).abs().max() < (1e-5 if quantization.load_in_4bit else 3e-2)
    model.use_rows()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_memory_is_one_base_and_the_adapters(llama):
    """Nothing of the base is there twice."""
    trained = sum(p.numel() for p in llama.parameters() if p.requires_grad)
    single, _ = build_reward_model(llama.config.name_or_path)
    own_head = single.score.weight.numel()
    assert (
        sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in single.parameters()) - own_head + trained
    )
    assert trained == M * sum(tensor.numel() for tensor in llama.member_state(0).values())


def test_token_logits(llama):
    with torch.no_grad():
        logits = member_token_logits(llama, IDS, torch.ones_like(IDS))
    assert logits.shape == (M, 4, 12, 1)
    assert torch.equal(logits[:, 0, -1, 0], scores_of(llama)[:, 0])


def test_heads_are_drawn_by_the_members_seeds_or_kept(tmp_path):
    """Whatever their order; a checkpoint's own head is kept."""
    one, two = stacked(tmp_path, seeds=[3, 4, 5]), stacked(tmp_path, seeds=[5, 3, 6])
    head = "base_model.model.score.weight"
    assert torch.equal(one.member_state(0)[head], two.member_state(1)[head])
    assert torch.equal(one.member_state(2)[head], two.member_state(0)[head])
    assert not torch.equal(one.member_state(0)[head], one.member_state(1)[head])
    plain, _ = build_reward_model(str(tmp_path / "base"))
    plain.save_pretrained(tmp_path / "classifier")
    model, names = build_reward_model(str(tmp_path / "classifier"))
    kept = StackedRewardModel(model, LoraConfig(target_modules=["q_proj"]), names, M, range(M))
    assert all(torch.equal(kept.member_state(member)[head], plain.score.weight) for member in range(M))


# ----------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "lora,found",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_cannot_be_stacked(lora, found, tmp_path):
    with pytest.raises(ValueError, match=found):
        stacked(tmp_path, **lora)


def test_embeddings_and_patterns_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model.embed_tokens`, a Embedding, cannot be stacked"):
        stacked(tmp_path, targets=["embed_tokens"])
    with pytest.raises(ValueError, match="Put the layers into the pattern"):
        stacked(tmp_path, share=0.5, targets=r".*q_proj")
    with pytest.raises(ValueError, match="Give one"):
        stacked(tmp_path, share=0.5, targets=["q_proj"], layers_to_transform=[1])


def test_folders_that_do_not_go_together(tmp_path):
    for name, kwargs in (("a", {}), ("b", {"share": 0.5})):
        stacked(tmp_path, **kwargs).save_pretrained(str(tmp_path / name))
    one, other = tmp_path / "a" / "member-0", tmp_path / "b" / "member-0"
    with pytest.raises(ValueError, match="differ in layers_to_transform"):
        StackedRewardModel.from_folders([one, other])
    with pytest.raises(ValueError, match="holds no adapter"):
        StackedRewardModel.from_folders([one, tmp_path])


def test_a_damaged_member_is_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    llama.save_pretrained(str(tmp_path / "out"))
    path = tmp_path / "out" / "member-1" / "adapter_model.safetensors"
    tensors = load_file(path)
    head, first = "base_model.model.score.weight", next(name for name in tensors if "lora_A" in name)
    for broken, error, match in (
        ({k: v for k, v in tensors.items() if k != head}, HeadError, "lacks `base_model.model.score.weight`"),
        ({k: v for k, v in tensors.items() if k != first}, ValueError, "lacks `.*lora_A.weight`"),
        ({**tensors, "extra": tensors[head].clone()}, ValueError, "holds `extra`"),
        ({**tensors, head: torch.zeros(2, 32)}, ValueError, r"has shape \(2, 32\), needed \(1, 32\)"),
    ):
        save_file(broken, path)
        with pytest.raises(error, match=match):
            llama.load_member(1, path.parent)
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        llama.load_member(1, tmp_path)
    with pytest.raises(ValueError, match="no member 'member-9'"):
        llama.load_adapter(str(path.parent), "member-9")


def test_inputs_come_by_name(llama):
    with pytest.raises(TypeError, match="by name"):
        llama(IDS)
