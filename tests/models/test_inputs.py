"""Tokenizer and model that do not fit each other: unknown pad tokens, unknown tokens, few positions, processors."""

from datetime import datetime

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ProcessorMixin
from transformers.models.gptj.modeling_gptj import GPTJConfig, GPTJForSequenceClassification

from tests.models.helpers import make_trainer, max_change, scores_of, tiny_base, train
from tests.tiny import pair_rows, save_tiny_model, tiny_tokenizer
from trl_ext import PRMConfig, PRMTrainer, RewardEnsembleConfig, RewardEnsembleTrainer, RewardScorer
from trl_ext.data.validation import DataError
from trl_ext.models import build_reward_model, load_reward_model
from trl_ext.models.inputs import InputLimits, freeze_date, max_positions, writes_a_date


QUIET = dict(report_to="none", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=1)


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory):
    """A Llama whose tokenizer has no pad token."""
    folder = tmp_path_factory.mktemp("unpadded")
    return str(save_tiny_model(folder, tokenizer=tiny_tokenizer("llama", pad=None)))


def with_pad(**tokens):
    """A tokenizer with tokens that were added without resizing the model; unshared, because it is changed."""
    tokenizer = tiny_tokenizer("llama", pad=None)
    tokenizer.add_special_tokens(tokens or {"pad_token": "[PAD]"})
    return tokenizer


def step_rows(long=False, extra=""):
    """Stepwise rows; row 3 is long or has a text of its own."""
    rows = [
        {"prompt": "Count.", "completions": [f"Step {n}", "Step two"], "labels": [True, bool(n % 2)]} for n in range(6)
    ]
    rows[3]["completions"][1] += extra
    if long:
        rows[3]["completions"] = [" good good good good"] * 300
        rows[3]["labels"] = [True] * 300
    return rows


def prm(model, folder, rows, **kwargs):
    args = PRMConfig(str(folder), per_device_train_batch_size=2, max_length=kwargs.pop("max_length", None), **QUIET)
    return PRMTrainer(model, args, train_dataset=Dataset.from_list(rows), **kwargs)


# ------------------------------------------------------------------------------------------------------ the pad token
@pytest.mark.parametrize("shared_prefix", ["auto", False])
def test_a_pad_token_without_an_embedding_trains_and_loads(unpadded, tmp_path, caplog, shared_prefix):
    tokenizer = with_pad()
    known = build_reward_model(unpadded)[0].config.vocab_size
    assert tokenizer.pad_token_id == known
    trainer = train(unpadded, tmp_path, processing_class=tokenizer, shared_prefix=shared_prefix)
    assert f"'[PAD]' has the id {known}, and the model has embeddings for ids below {known}" in caplog.text
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.pad_token_id < known and plain.config.pad_token_id != tokenizer.eos_token_id
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6
    # a padded batch of plain transformers gives our scores, EOS and all
    texts = ["a good answer", "a bad answer that is longer"]
    batch = AutoTokenizer.from_pretrained(tmp_path)(
        [t + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        scores = plain.eval()(**batch).logits[:, 0].tolist()
    assert RewardScorer(tmp_path)(None, texts) == pytest.approx(scores, abs=1e-5)


def test_a_pad_token_without_an_embedding_in_other_trainers(unpadded, tmp_path):
    prm(unpadded, tmp_path / "prm", step_rows(), processing_class=with_pad()).train()
    args = RewardEnsembleConfig(str(tmp_path / "e"), num_members=2, per_device_train_batch_size=4, **QUIET)
    RewardEnsembleTrainer(
        unpadded, args, train_dataset=Dataset.from_list(pair_rows(8)), processing_class=with_pad(),
        peft_config=LoraConfig(target_modules=["q_proj"]),
    ).train()  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # TRL's, of the argument
@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_named_token_without_an_embedding_is_refused(unpadded, tmp_path, name):
    tokenizer = with_pad(additional_special_tokens=["[NEW]"])
    with pytest.raises(ValueError, match=rf"{name}='\[NEW\]' has the id \d+, and the model has embeddings for ids"):
        make_trainer(unpadded, tmp_path, processing_class=tokenizer, **{name: "[NEW]"})


# ---------------------------------------------------------------------------------------------------- unknown tokens
def test_a_token_without_an_embedding_is_an_error_of_its_row(unpadded, tmp_path):
    tokenizer = with_pad(additional_special_tokens=["[NEW]"])
    rows = pair_rows(8)
    rows[5]["rejected"] += "[NEW]"
    said = r"row {}, column '{}': found the token id \d+ \('\[NEW\]'\); needed ids below \d+"
    with pytest.raises(DataError, match=said.format(5, "chosen")):
        make_trainer(unpadded, tmp_path, rows=rows, processing_class=tokenizer)
    with pytest.raises(DataError, match=said.format(3, "completions")):
        prm(unpadded, tmp_path, step_rows(extra="[NEW]"), processing_class=tokenizer)
    train(unpadded, tmp_path / "model")
    with pytest.raises(DataError, match=said.format(1, "completions")):
        RewardScorer(tmp_path / "model", tokenizer)(None, ["a", "a [NEW]"])


def test_a_separator_or_template_without_an_embedding_is_an_error_of_its_row(unpadded, tmp_path):
    tokenizer = with_pad(additional_special_tokens=["[NEW]"])
    args = PRMConfig(str(tmp_path), step_separator="[NEW]", **QUIET)
    with pytest.raises(DataError, match=r"row 0.*\('\[NEW\]'\)"):
        PRMTrainer(unpadded, args, train_dataset=Dataset.from_list(step_rows()), processing_class=tokenizer)
    tokenizer.chat_template = "{% for message in messages %}[NEW]{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 0.*\('\[NEW\]'\)"):
        make_trainer(unpadded, tmp_path, rows=pair_rows(8, chat=True), processing_class=tokenizer)


# --------------------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 512), ("roberta", 512), ("bert", 512), ("opt", 512), ("llama", None), ("modernbert", None)],
)
def test_the_positions_of_a_family(tmp_path, family, limit):
    model, _ = build_reward_model(str(save_tiny_model(tmp_path, family)))
    assert max_positions(model) == limit


def test_a_table_of_rotations_is_a_limit():
    config = GPTJConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4, num_labels=1)
    assert InputLimits.of(GPTJForSequenceClassification(config)) == (50, 64)


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_rows_beyond_the_models_positions_are_dropped_and_counted(tmp_path, family, caplog):
    base = tiny_base(tmp_path / "base", family)
    rows = pair_rows(8)
    rows[3]["chosen"] = " good" * 700
    trainer = make_trainer(base, tmp_path / "a", rows=rows)  # max_length is 1,024, TRL's default
    assert "1 dropped: longer than 512 tokens, all the positions of the model (max_length=1024)" in caplog.text
    assert trainer.train_dataset["row_index"][:] == [0, 1, 2, 4, 5, 6, 7]
    caplog.clear()
    steps = prm(base, tmp_path / "b", step_rows(long=True))
    assert "1 dropped: longer than 512 tokens, all the positions of the model (max_length=None)" in caplog.text
    steps.train()
    make_trainer(base, tmp_path / "c", rows=rows, max_length=100)
    assert "longer than max_length=100" in caplog.text


def test_the_scorer_cuts_at_the_models_positions_at_the_latest(tmp_path):
    train(tiny_base(tmp_path / "base", "gpt2"), tmp_path / "model")
    long = [" good" * 700]
    with pytest.raises(DataError, match="row 0.*at most 512, which is all that the model .*Pass max_length=512"):
        RewardScorer(tmp_path / "model")(None, long)
    scorer = RewardScorer(tmp_path / "model", max_length=1024)
    assert scorer(None, long) == RewardScorer(tmp_path / "model", max_length=512)(None, long)
    assert scorer.num_truncated == 1


# -------------------------------------------------------------------------------------------------------- the date
DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
)


def test_a_template_that_writes_the_date_is_frozen_with_the_model(unpadded, tmp_path, monkeypatch, caplog):
    tokenizer = tiny_tokenizer("llama", pad=None)
    tokenizer.chat_template = DATED
    today = f"{datetime.now():%d %b %Y}"
    train(unpadded, tmp_path / "model", processing_class=tokenizer, rows=pair_rows(8, chat=True))
    assert f"It is frozen to {datetime.now():%Y-%m-%d}" in caplog.text
    template = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert "strftime_now" not in template and repr(today) in template
    prm(unpadded, tmp_path / "prm", step_rows(), processing_class=tokenizer)
    assert not writes_a_date(tokenizer)
    caplog.clear()
    RewardScorer(tmp_path / "model")
    assert "today's date" not in caplog.text
    tokenizer.chat_template = {"default": DATED, "tool_use": 'x {{ strftime_now("%Y") }}', "plain": "y"}
    RewardScorer(tmp_path / "model", tokenizer)
    assert "scores of chats change from day to day" in caplog.text
    freeze_date(tokenizer, datetime(2024, 7, 26))
    assert tokenizer.chat_template["default"].startswith("{{ '26 Jul 2024' }}")
    assert tokenizer.chat_template["tool_use"] == "x {{ '2024' }}" and tokenizer.chat_template["plain"] == "y"


# -------------------------------------------------------------------------------------------------------- processors
class TinyProcessor(ProcessorMixin):
    """A vision-language processor, as far as a text trainer sees it."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template


def test_the_tokenizer_of_a_processor_reads_text(unpadded, tmp_path, caplog):
    tokenizer = tiny_tokenizer("llama", pad=None)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    processor = TinyProcessor(tokenizer, template)
    trainer = train(unpadded, tmp_path, processing_class=processor, rows=pair_rows(8, chat=True))
    assert trainer.processing_class is tokenizer
    assert f"so its {type(tokenizer).__name__} is used" in caplog.text
    prm(unpadded, tmp_path / "prm", step_rows(), processing_class=processor).train()
    scorer = RewardScorer(tmp_path, processor)
    assert scorer(None, ["a good answer"]) == RewardScorer(tmp_path)(None, ["a good answer"])
