"""`sft_coefficient`: the cross-entropy of the best completions under the frozen output layer of the language model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, lora, trainer_for
from trl_ext import RewardEnsembleConfig
from trl_ext.models import bases
from trl_ext.models.language_head import frozen_language_head


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return str(save_tiny_model(folder, "llama", tie_word_embeddings=request.param))


def parts(trainer, batch):
    """The training loss with and without the added loss."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    coefficient, head = trainer.args.sft_coefficient, trainer._language_head
    trainer._language_head = None
    try:
        return loss, trainer.compute_loss(trainer.model, batch)
    finally:
        trainer._language_head, trainer.args.sft_coefficient = head, coefficient


def of_language_model(path, rows):
    """The mean over groups of the mean cross-entropy of the best candidate's own tokens, by the language model."""
    model, losses = AutoModelForCausalLM.from_pretrained(path), []
    for row in rows:
        best = max(range(len(row["candidate_ids"])), key=lambda place: row["candidate_ratings"][place])
        ids = torch.tensor([row["candidate_ids"][best]])
        others = [ids for place, ids in enumerate(row["candidate_ids"]) if place != best]
        shared = min(
            next(n for n, pair in enumerate(zip(ids[0].tolist(), o, strict=False)) if pair[0] != pair[1])
            for o in others
        )
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        losses.append(-log_probs[torch.arange(shared - 1, ids.shape[1] - 1), ids[0, shared:]].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_the_added_loss_is_that_of_the_language_model(base, tmp_path, shared_prefix, peft):
    options = dict(loss_type="plackett_luce", shared_prefix=shared_prefix, sft_coefficient=0.5)
    more = {"peft_config": lora()} if peft else {}  # fresh adapters change nothing
    trainer = trainer_for(base, config(tmp_path, **options), ranked_rows(4, k=3), **more)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    assert ("prefix_layout" in batch) == shared_prefix
    loss, plain = parts(trainer, batch)
    assert (loss - plain).item() == pytest.approx(0.5 * of_language_model(base, rows).item(), rel=1e-5)
    loss.backward()
    assert trainer.model.score.weight.grad is not None or peft
    assert trainer._language_head.grad is None and not trainer._language_head.requires_grad
    trainer.model.eval()
    with torch.no_grad():  # evaluation leaves it out
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(plain.item(), abs=1e-6)


def test_flat_and_padded_rows_have_the_same_gradient(tmp_path, tmp_path_factory):
    base = str(save_tiny_model(tmp_path_factory.mktemp("base"), "qwen3", tie_word_embeddings=True))
    gradients = []
    for shared_prefix in (False, True):
        args = config(tmp_path, sft_coefficient=1.0, shared_prefix=shared_prefix, gradient_checkpointing=shared_prefix)
        trainer = trainer_for(base, args, pair_rows(4), peft_config=lora())
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    padded, flat = gradients
    assert padded.keys() == flat.keys() and any("lora_B" in name for name in padded)
    for name, gradient in padded.items():
        torch.testing.assert_close(flat[name], gradient, rtol=1e-3, atol=1e-6)


def test_four_batches_of_one_are_one_batch_of_four(base, tmp_path):
    rows = pair_rows(3) + [{**pair_rows(4)[3], "preference_probability": 0.5}]
    rows = [{"preference_probability": 1.0, **row} for row in rows]
    trainer = trainer_for(base, config(tmp_path, sft_coefficient=0.3), rows)
    data, groups = list(trainer.train_dataset), torch.tensor(4)
    trainer.model.train()
    whole = trainer.compute_loss(trainer.model, trainer.data_collator(data), num_items_in_batch=groups)
    single = [
        trainer.compute_loss(trainer.model, trainer.data_collator([row]), num_items_in_batch=groups) for row in data
    ]
    assert sum(single).item() == pytest.approx(whole.item(), abs=1e-5)
    _, undecided = parts(trainer, trainer.data_collator(data[3:]))  # neither is better: nothing to learn to write
    assert parts(trainer, trainer.data_collator(data[3:]))[0].item() == undecided.item()


def test_hidden_states_stay_able_to_write(base, tmp_path):
    """Full training: with the loss, the language model below forgets less."""
    after = []
    for coefficient in (0.0, 1.0):
        args = config(tmp_path, sft_coefficient=coefficient, learning_rate=3e-3, max_steps=6)
        trainer = trainer_for(base, args, pair_rows(16))
        trainer.args.sft_coefficient = 1.0
        frozen = trainer._language_head
        head = frozen_language_head(trainer.model) if frozen is None else frozen.clone()
        trainer._language_head = frozen if coefficient else None
        trainer.train()
        trainer._language_head = head
        loss, plain = parts(trainer, trainer.data_collator(list(trainer.train_dataset)))
        after.append((loss - plain).item())
        assert frozen is None or torch.equal(frozen, head)  # trained embeddings do not move the frozen layer
    assert after[1] < after[0] - 0.1


@pytest.mark.slow
def test_qlora(base, tmp_path):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = config(tmp_path, sft_coefficient=0.01, max_steps=2)
    trainer = trainer_for(base, args, pair_rows(8), quantization_config=four_bit, peft_config=lora())
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def test_without_an_output_layer_it_is_refused(base, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    encoder = str(save_tiny_model(folder / "bert", "bert"))
    capped = str(save_tiny_model(folder / "gemma", "gemma2"))
    reward = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with pytest.raises(ValueError, match="cannot be used: .*no decoder"):
        trainer_for(encoder, config(tmp_path, sft_coefficient=0.01))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        trainer_for(capped, config(tmp_path, sft_coefficient=0.01))
    if not reward.config.tie_word_embeddings:
        reward.config._name_or_path = str(tmp_path)
        with pytest.raises(ValueError, match="not tied to its embeddings"):
            frozen_language_head(reward)
    with pytest.raises(ValueError, match="sft_coefficient=-1"):
        config(tmp_path, sft_coefficient=-1.0)
    with pytest.raises(ValueError, match="not supported for ensembles"):
        config(tmp_path, RewardEnsembleConfig, sft_coefficient=0.01)


def test_the_layer_of_a_model_from_the_hub_is_found(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward.config._name_or_path = "organisation/untied"
    asked = []
    monkeypatch.setattr(bases, "snapshot_download", lambda name, **options: asked.append(name) or str(folder))
    wanted = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(frozen_language_head(reward), wanted) and asked == ["organisation/untied"]


def test_a_bias_and_added_tokens_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward.resize_token_embeddings(reward.config.vocab_size + 8)
    with pytest.raises(ValueError, match="tokens were added"):
        frozen_language_head(reward)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"] = torch.ones(len(weights["lm_head.weight"]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has a bias"):
        frozen_language_head(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1))


def test_a_loss_at_chance_is_seen_beside_the_added_loss(tmp_path, caplog):
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    args = config(tmp_path, sft_coefficient=0.5, learning_rate=0.0)
    trainer = trainer_for(base, args, pair_rows(8))
    given = []
    trainer._monitor.update = lambda *arguments, **options: given.append(arguments[3])
    loss, plain = parts(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert loss > plain + 0.5
    assert [losses.mean().item() for losses in given] == pytest.approx([plain.item()] * 2, abs=1e-6)
