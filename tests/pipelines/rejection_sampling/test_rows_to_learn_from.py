"""What a round trains on: the prompts that it sampled from, whole completions, and one draw also after a kill."""

import json
import logging
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import TrainerCallback

from tests.pipelines.rejection_sampling.test_rejection_sampling_trainer import ROWS, share_of_vowels, trainer
from trl_ext import RejectionSamplingConfig
from trl_ext.demo.model import tiny_reward_base, tiny_tokenizer
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator


CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS[:8]])
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant (quiet): ' if quiet else 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_reward_base(tmp_path_factory.mktemp("base"), hidden_size=32)


class Texts(TrainerCallback):
    """Keeps the texts that a round trains on."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, processing_class, train_dataloader, **kwargs):
        self.found += [processing_class.decode(row["input_ids"]) for row in train_dataloader.dataset]


def vowels(prompts, completions, **kwargs):
    return share_of_vowels(prompts, [completion[0]["content"] for completion in completions])


def rows_of(folder, number=1):
    return [json.loads(line) for line in (folder / "rounds" / str(number) / "rows.jsonl").read_text().splitlines()]


def test_arguments_of_the_chat_template_are_those_of_the_samples(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if quiet %}Quietly.\n{% endif %}" + TEMPLATE
    seen = Texts()
    run = trainer(
        base, tmp_path, vowels, train_dataset=CHATS, eval_dataset=None, processing_class=tokenizer, max_steps=1,
        chat_template_kwargs={"quiet": True}, callbacks=[seen], num_rounds=2, accumulate_rounds=True,
    )  # fmt: skip
    run.train()
    assert len(seen.found) >= 16 and all(text.startswith("Quietly.\n") for text in seen.found)
    assert rows_of(tmp_path)[0]["chat_template_kwargs"] == {"quiet": True}


def test_the_first_policy_samples_with_the_chat_template_that_it_is_trained_with(tmp_path, monkeypatch):
    base = tiny_reward_base(tmp_path / "base", hidden_size=32)
    bare = tiny_tokenizer()
    bare.chat_template = None  # as that of a base model
    bare.save_pretrained(base)
    Path(base, "chat_template.jinja").unlink(missing_ok=True)
    template, prompts, seen = tmp_path / "template.jinja", [], Texts()
    template.write_text(TEMPLATE)
    run = TransformersGenerator._run

    def note(self, encoded):
        prompts.extend(map(tiny_tokenizer().decode, encoded))
        return run(self, encoded)

    monkeypatch.setattr(TransformersGenerator, "_run", note)
    arguments = dict(train_dataset=CHATS, eval_dataset=CHATS, max_steps=1, num_generations=2, callbacks=[seen])
    trainer(base, tmp_path / "out", vowels, chat_template_path=str(template), **arguments).train()
    assert len(prompts) == 3 * 16 and all(text.endswith(":\nassistant: ") for text in prompts)
    assert all(text[: text.index("assistant: ")] in " ".join(prompts) for text in seen.found)

    with pytest.raises(ValueError, match="is no .jinja or .j2 file.*a processing_class"):
        trainer(base, tmp_path / "other", vowels, chat_template_path=str(base), **arguments)


class Kill(TrainerCallback):
    """Ends a run after its first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_round_that_died_in_training_goes_on_with_the_rows_that_it_had(base, tmp_path):
    arguments = dict(eval_dataset=None, max_steps=2, num_generations=2, save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer(base, tmp_path, **arguments, callbacks=[Kill()]).train()
    first, seen = rows_of(tmp_path), Texts()
    again = trainer(base, tmp_path, **arguments, generation_batch_size=3, callbacks=[seen])  # would draw others
    again.train()
    assert rows_of(tmp_path) == first
    assert all(row["prompt"] + row["completion"] in text for row, text in zip(first, seen.found, strict=True))
    chosen = [row["score"] for row in first]
    assert again.history[1]["selected_reward"] == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_sft_would_cut_are_left_out_or_warned_of(base, tmp_path, caplog, masked):
    seen = Texts()
    run = trainer(
        base, tmp_path, eval_dataset=None, max_steps=1, max_length=40, callbacks=[seen],
        mask_truncated_completions=masked, max_completion_length=64, generation_kwargs={"stop_strings": [*"abcdefgh"]},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        run.train()
    rows = rows_of(tmp_path)
    whole = [len(tiny_tokenizer()(row["prompt"] + row["completion"] + "<eos>")["input_ids"]) <= 40 for row in rows]
    assert 0 < sum(whole) < len(rows)
    assert f"{len(rows) - sum(whole)} of {len(rows)} selected completions are longer than max_length=40" in caplog.text
    assert run.history[1]["rows"] == len(seen.found) == (sum(whole) if masked else len(rows))
    assert all(text.endswith("<eos>") for text in seen.found) == masked


def test_a_round_without_a_row_that_fits_says_so(base, tmp_path):
    run = trainer(base, tmp_path, eval_dataset=None, max_length=3, mask_truncated_completions=True)
    with pytest.raises(ValueError, match="There is nothing left to fine-tune on. Raise max_length"):
        run.train()


def test_rows_of_a_grpo_script_are_not_cut(tmp_path):
    given = trl.GRPOConfig(output_dir=str(tmp_path), max_completion_length=1500, use_cpu=True, bf16=False)
    assert RejectionSamplingConfig.from_grpo(given).max_length is None
