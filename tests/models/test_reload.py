"""Every kind of model reloads: encoders, full and LoRA, plain transformers + PEFT, and training goes on."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.models.helpers import (
    fresh_scores,
    make_trainer,
    max_change,
    nf4,
    plain_scores,
    same_ranking,
    scores_of,
    sequences,
    tiny_base,
    train,
)
from tests.tiny import pair_rows, save_tiny_model, tiny_config, tiny_tokenizer
from trl_ext.models import get_sidecar, load_reward_model, merge_reward_model, read_sidecar


LORA = LoraConfig()
BF16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
ATTENTION = {"bert": "query", "roberta": "query", "deberta-v2": "query_proj", "modernbert": "Wqkv"}
# name -> family, arguments of the run
RUNS = {
    "llama full": ("llama", {}),
    "llama full bf16": ("llama", BF16),
    "llama LoRA": ("llama", {"peft_config": LORA}),
    "llama LoRA bf16": ("llama", {"peft_config": LORA} | BF16),
    "llama LoRA NF4": ("llama", {"peft_config": LORA, "quantization_config": nf4()}),
    "llama LoRA NF4 bf16": ("llama", {"peft_config": LORA, "quantization_config": nf4()} | BF16),
    "gemma2 LoRA": ("gemma2", {"peft_config": LORA}),
    "gpt2 LoRA": ("gpt2", {"peft_config": LoraConfig(fan_in_fan_out=True)}),
    "qwen3_moe all-linear": ("qwen3_moe", {"peft_config": LoraConfig(target_modules="all-linear")}),
    **{f"{family} full": (family, {}) for family in ATTENTION},
    **{f"{family} full bf16": (family, BF16) for family in ("bert", "deberta-v2")},
    **{f"{family} LoRA": (family, {"peft_config": LoraConfig(target_modules=[a])}) for family, a in ATTENTION.items()},
    "deberta-v2 LoRA NF4": (
        "deberta-v2",
        {"peft_config": LoraConfig(target_modules=["query_proj"]), "quantization_config": nf4()},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (trainer, folder, path of the base, token ids)"""
    folder = tmp_path_factory.mktemp("runs")
    bases = {
        family: tiny_base(folder / "bases" / family, family) for family in {family for family, _ in RUNS.values()}
    }
    found = {}
    for name, (family, arguments) in RUNS.items():
        trainer = train(bases[family], folder / name, learning_rate=1e-2, **arguments)
        ids = sequences(vocab_size=trainer.model.config.vocab_size)
        found[name] = (trainer, folder / name, bases[family], ids)
    return found


@pytest.fixture(scope="module")
def fresh(runs):
    results = fresh_scores([{"path": str(folder), "ids": ids} for _, folder, _, ids in runs.values()])
    return dict(zip(runs, results, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_fresh_process_gives_the_same_scores(runs, fresh, name):
    trainer, _, _, ids = runs[name]
    assert "error" not in fresh[name], fresh[name]
    before = scores_of(trainer.model, ids)
    assert before.std() > 0.02
    assert same_ranking(before, fresh[name]["scores"])
    assert max_change(before, fresh[name]["scores"]) <= 1e-5


@pytest.fixture(scope="module")
def plain(runs):
    jobs = {}
    for name, (_, folder, base, ids) in runs.items():
        job = {
            "path": str(folder),
            "ids": ids,
            "dtype": "bfloat16" if "bf16" in name else "float32",
            "nf4": "NF4" in name,
        }
        jobs[name] = job | ({"base": base} if "full" not in name else {})
    return dict(zip(jobs, plain_scores(list(jobs.values())), strict=True))


# DeBERTa's pooler is quantized by plain transformers unless the user skips it
@pytest.mark.parametrize("name", [name for name in RUNS if name != "deberta-v2 LoRA NF4"])
def test_plain_transformers_and_peft_give_the_same_scores(runs, plain, name):
    trainer, _, _, ids = runs[name]
    assert "error" not in plain[name], plain[name]
    before = scores_of(trainer.model, ids)
    # meant: 2e-2 where plain PEFT rounds; with NF4 and a bf16 base together 2.2e-2 of the largest score was seen
    limit = 4e-2 if "bf16" in name and "NF4" in name else 2e-2 if "bf16" in name or "NF4" in name else 1e-5
    assert max_change(before, plain[name]["scores"]) <= limit * max(1.0, before.abs().max().item())


# ------------------------------------------------------------------------------------------------------ poolers, heads
def test_a_pretrained_pooler_is_backbone_and_a_fresh_one_is_head(tmp_path):
    with_pooler = save_tiny_model(
        tmp_path / "base", "bert", causal=False
    )  # BertModel: the pooler is in the checkpoint
    assert "pooler.dense.weight" in load_file(with_pooler / "model.safetensors")
    train(str(with_pooler), tmp_path / "path", peft_config=LoraConfig(target_modules=["query"]))
    assert read_sidecar(tmp_path / "path").head_modules == ["classifier"]
    # nobody can tell for an instance: both count, in fp32, and survive on a bf16 base
    model = AutoModelForSequenceClassification.from_pretrained(with_pooler, num_labels=1, dtype=torch.bfloat16)
    config = LoraConfig(target_modules=["query"])
    tokenizer = tiny_tokenizer("bert")
    trainer = train(model, tmp_path / "instance", peft_config=config, processing_class=tokenizer)
    assert read_sidecar(tmp_path / "instance").head_modules == ["classifier", "bert.pooler"]
    ids = sequences(vocab_size=trainer.model.config.vocab_size)
    assert max_change(scores_of(trainer.model, ids), scores_of(load_reward_model(tmp_path / "instance"), ids)) <= 1e-6


def test_full_bf16_instance_with_pooler_reloads_exactly(tmp_path):
    config = tiny_config("bert", 400, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16)
    trainer = train(model, tmp_path, processing_class=tiny_tokenizer("bert"))
    assert trainer.model.bert.pooler.dense.weight.dtype == torch.float32
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_encoder_decoders_that_read_the_score_at_eos_save_and_merge(tmp_path, family):
    tokenizer = tiny_tokenizer("llama")
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    small = dict(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, encoder_layers=1, decoder_layers=1)
    small |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
    config = AutoConfig.for_model(family, **ids, **small, decoder_start_token_id=tokenizer.pad_token_id)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"] if family == "bart" else ["q"])
    trainer = train(str(tmp_path / "base"), tmp_path / "adapter", peft_config=lora, learning_rate=1e-2)
    probes = get_sidecar(trainer.model).probes["input_ids"]
    assert all(probe.count(tokenizer.eos_token_id) == 1 and probe[-1] == tokenizer.eos_token_id for probe in probes)
    assert (
        max_change(scores_of(trainer.model, probes), scores_of(load_reward_model(tmp_path / "adapter"), probes))
        <= 1e-6
    )
    merge_reward_model(tmp_path / "adapter", tmp_path / "merged")
    train(str(tmp_path / "base"), tmp_path / "full")


def test_a_bare_backbone_is_a_base_too(tmp_path):
    model = AutoModel.from_config(tiny_config("llama", 510, hidden_size=64, pad_token_id=3))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = train(str(tmp_path / "base"), tmp_path / "out", peft_config=LORA)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path / "out"))) <= 1e-6


# -------------------------------------------------------------------------------------------------------- added tokens
@pytest.mark.parametrize("quantization", [None, nf4()], ids=["fp32", "nf4"])
def test_tokens_added_by_a_chat_template_survive(tmp_path, quantization):
    base = tiny_base(tmp_path / "base")
    tiny_tokenizer("qwen").save_pretrained(tmp_path / "template")
    trainer = train(
        base,
        tmp_path / "out",
        rows=pair_rows(8, chat=True),
        chat_template_path=str(tmp_path / "template"),
        peft_config=LORA,
        quantization_config=quantization,
        learning_rate=1e-2,
    )
    old, new = AutoConfig.from_pretrained(base).vocab_size, trainer.model.config.vocab_size
    assert new > old and read_sidecar(tmp_path / "out").base.vocab_size == new
    ids = [[*row, len(trainer.processing_class) - 1] for row in sequences()]  # the newest token, too
    assert ids[0][-1] >= old
    loaded = load_reward_model(tmp_path / "out")
    assert max_change(scores_of(trainer.model, ids), scores_of(loaded, ids)) <= 1e-6
    report = merge_reward_model(tmp_path / "out", tmp_path / "merged", calibration_ids=ids)
    assert report["relative_change"] <= 1e-4


def test_an_instance_with_more_tokens_than_its_base_survives(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base(tmp_path / "base"), num_labels=1)
    model.resize_token_embeddings(600)
    trainer = train(model, tmp_path / "out", peft_config=LORA)
    ids = [[*row, 599] for row in sequences()]
    assert max_change(scores_of(trainer.model, ids), scores_of(load_reward_model(tmp_path / "out"), ids)) <= 1e-6


# -------------------------------------------------------------------------------------------------------- training on
@pytest.mark.parametrize("name", ["llama LoRA", "llama LoRA NF4 bf16", "deberta-v2 LoRA"])
def test_an_adapter_path_as_model_trains_on_from_the_saved_scores(runs, tmp_path, name):
    first, folder, base, ids = runs[name]
    trainer = make_trainer(str(folder), tmp_path, learning_rate=1e-2, seed=77)
    start = scores_of(trainer.model, ids)
    assert max_change(scores_of(first.model, ids), start) <= 1e-6
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trainable) == len([p for p in first.model.parameters() if p.requires_grad])
    assert {p.dtype for p in trainable} == {torch.float32}
    trainer.train()
    trainer.save_model()
    assert max_change(start, scores_of(trainer.model, ids)) > 1e-3
    assert max_change(scores_of(trainer.model, ids), scores_of(load_reward_model(tmp_path), ids)) <= 1e-5
    sidecar = read_sidecar(tmp_path)
    assert sidecar.base == read_sidecar(folder).base
    assert sidecar.base.id == base


def test_a_full_reward_model_as_base_keeps_its_head_as_start(runs, tmp_path):
    first, folder, _, ids = runs["llama full"]
    trainer = make_trainer(str(folder), tmp_path, peft_config=LORA, seed=77)
    assert max_change(scores_of(first.model, ids), scores_of(trainer.model, ids)) <= 1e-6
    trainer.train()
    trainer.save_model()
    assert max_change(scores_of(trainer.model, ids), scores_of(load_reward_model(tmp_path), ids)) <= 1e-6


def test_rows_that_training_saw_score_the_same_in_training_and_after(runs):
    trainer, folder, _, _ = runs["llama LoRA"]
    rows = [ids for row in trainer.train_dataset for ids in row["candidate_ids"]]
    assert len(rows) == 16
    assert max_change(scores_of(trainer.model, rows), scores_of(load_reward_model(folder), rows)) <= 1e-6


# ------------------------------------------------------------------------------------------------- what is in the file
def test_sidecar_records_the_base(runs):
    sidecar = read_sidecar(runs["llama LoRA NF4 bf16"][1])
    assert sidecar.base.id == runs["llama LoRA NF4 bf16"][2]
    assert sidecar.base.dtype == "bfloat16"
    assert sidecar.base.quantization["bnb_4bit_quant_type"] == "nf4"
    assert sidecar.base.quantization["llm_int8_skip_modules"] == ["score"]
    assert sidecar.is_adapter and sidecar.head_modules == ["score"] and sidecar.kind == "scalar"
    assert sidecar.token_policy == {"append_eos": True, "adds_special_tokens": True}
    assert len(sidecar.probes["scores"]) == len(sidecar.probes["input_ids"]) == 8
    assert read_sidecar(runs["bert full"][1]).token_policy["append_eos"] is False


def test_the_folder_holds_everything(runs):
    folder = runs["llama LoRA"][1]
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "reward_model.json", "tokenizer.json"} <= names
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS" and "score" in adapter["modules_to_save"]


def test_every_checkpoint_is_a_reward_model(tmp_path):
    base = tiny_base(tmp_path / "base")
    out = tmp_path / "out"
    trainer = make_trainer(base, out, peft_config=LORA, rows=pair_rows(8), save_strategy="steps", save_steps=1)
    trainer.train()
    last = load_reward_model(out / "checkpoint-2")
    assert max_change(scores_of(trainer.model), scores_of(last)) <= 1e-6
    assert max_change(scores_of(load_reward_model(out / "checkpoint-1")), scores_of(last)) > 1e-5
    assert get_sidecar(last).probes is not None
