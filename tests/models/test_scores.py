"""A text has one score: alone, padded on either side, with any pad token, and in plain transformers."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.models.helpers import (
    make_trainer,
    max_change,
    nf4,
    plain_scores,
    scores_of,
    sequences,
    tiny_base,
    train,
)
from tests.tiny import DECODER_FAMILIES, ENCODER_FAMILIES, tiny_tokenizer
from trl_ext.models import build_reward_model, candidate_scores, load_reward_model, read_sidecar
from trl_ext.models.heads import token_logits_at_last


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def _padded(ids, pad, side="right"):
    width = max(map(len, ids))
    fill = [[pad] * (width - len(row)) for row in ids]
    ones = [[1] * len(row) for row in ids]
    zeros = [[0] * len(f) for f in fill]
    if side == "right":
        rows, masks = zip(ids, fill, strict=True), zip(ones, zeros, strict=True)
    else:
        rows, masks = zip(fill, ids, strict=True), zip(zeros, ones, strict=True)
    return torch.tensor([a + b for a, b in rows]), torch.tensor([a + b for a, b in masks])


@torch.no_grad()
def _batch_scores(model, ids, pad, side="right"):
    return candidate_scores(model, *_padded(ids, pad, side))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in (*DECODER_FAMILIES, *ENCODER_FAMILIES)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", [*DECODER_FAMILIES, *ENCODER_FAMILIES])
def test_alone_right_padded_left_padded(bases, family, dtype):
    torch.manual_seed(0)
    model = build_reward_model(bases[family], dtype=dtype)[0].eval()
    ids = sequences(vocab_size=model.config.vocab_size)
    alone = scores_of(model, ids)
    assert alone.std() > 0.02
    for side in ("right", "left"):
        together = _batch_scores(model, ids, pad=1, side=side)
        assert together.dtype == torch.float32
        assert max_change(alone, together) <= TOLERANCE[dtype], side


def test_alone_and_padded_on_nf4(bases):
    model = build_reward_model(bases["llama"], quantization_config=nf4())[0].eval()
    alone = scores_of(model)
    for side in ("right", "left"):
        assert max_change(alone, _batch_scores(model, sequences(), 1, side)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "roberta", "deberta-v2"])
def test_pad_token_has_no_influence(bases, family):
    model = build_reward_model(bases[family])[0].eval()
    eos = 9
    ids = [[*row, eos] for row in sequences(vocab_size=model.config.vocab_size)]  # every text ends with EOS
    found = []
    for pad in (None, eos, 5):  # not set, EOS, dedicated
        model.config.pad_token_id = pad
        found.append(_batch_scores(model, ids, pad=1 if pad is None else pad))
        assert model.config.pad_token_id == pad, "the model's config was changed"
    assert max_change(found[0], found[1]) <= 1e-6
    assert max_change(found[0], found[2]) <= 1e-6
    assert max_change(found[0], scores_of(model, ids)) <= 1e-4
    if family == "llama":  # what goes wrong without us: the EOS is taken for padding
        model.config.pad_token_id = eos
        with torch.no_grad():
            theirs = model(*_padded(ids, eos)).logits[:, 0]
        assert max_change(found[0], theirs) > 0.05


def test_several_labels_and_whole_words_beside_padding(bases):
    model = build_reward_model(bases["llama"], num_labels=3)[0].eval()
    ids, mask = _padded(sequences(), 1, "left")
    with torch.no_grad():
        logits = token_logits_at_last(model, ids, mask)
        one = token_logits_at_last(model, torch.tensor([sequences()[4]]), torch.ones(1, len(sequences()[4])))
    assert logits.shape == (12, 3)
    assert max_change(logits[4], one[0]) <= 1e-4


def test_a_pad_token_set_after_training_changes_nothing(bases, tmp_path):
    tokenizer = tiny_tokenizer("llama", pad="eos")
    trainer = train(bases["llama"], tmp_path, peft_config=LoraConfig(), processing_class=tokenizer)
    assert trainer.model.config.pad_token_id == tokenizer.eos_token_id
    ids = [[*row, tokenizer.eos_token_id] for row in sequences()]
    trainer.model.eval()
    before = _batch_scores(trainer.model, ids, tokenizer.eos_token_id)
    loaded = load_reward_model(tmp_path)
    for pad in (tokenizer.eos_token_id, 5):
        loaded.config.pad_token_id = pad
        assert max_change(before, _batch_scores(loaded, ids, pad)) <= 1e-6


# ---------------------------------------------------------------------------------------------- and plain transformers
@pytest.fixture(scope="module")
def full(bases, tmp_path_factory):
    """Full checkpoints with a dedicated pad token and with pad = EOS, and what plain transformers makes of them."""
    folder = tmp_path_factory.mktemp("full")
    runs = {}
    for pad in ("dedicated", "eos"):
        tokenizer = tiny_tokenizer("llama", pad=pad)
        ids = [[*row, tokenizer.eos_token_id] for row in sequences()]
        trainer = make_trainer(bases["llama"], folder / pad, processing_class=tokenizer)
        trainer.train()
        runs[pad] = (trainer, folder / pad, ids)
    return runs


@pytest.fixture(scope="module")
def messages(full):
    """Save both models; the warnings that saving gave."""
    found = {}
    logger = logging.getLogger("trl_ext.trainers.common.checkpoint")
    for pad, (trainer, _, _) in full.items():
        found[pad] = []
        handler = logging.Handler(level=logging.WARNING)
        handler.emit = lambda record, to=found[pad]: to.append(record.getMessage())
        logger.addHandler(handler)
        trainer.save_model()
        logger.removeHandler(handler)
    return found


def test_plain_transformers_agrees_or_saving_says_why_not(full, messages):
    jobs = [{"path": str(folder), "ids": ids} for _, folder, ids in full.values()]
    results = dict(zip(full, plain_scores(jobs), strict=True))
    change = {pad: max_change(scores_of(full[pad][0].model, full[pad][2]), results[pad]["scores"]) for pad in full}
    assert change["dedicated"] <= 1e-5
    assert messages["dedicated"] == []
    assert read_sidecar(full["dedicated"][1]).pad_is_eos is False

    assert change["eos"] > 1e-3, "plain transformers agrees: the warning has lost its reason"
    assert any("pad token is EOS" in m and "plain transformers" in m for m in messages["eos"])
    assert read_sidecar(full["eos"][1]).pad_is_eos is True
    assert AutoTokenizer.from_pretrained(full["eos"][1]).pad_token == tiny_tokenizer("llama").eos_token
