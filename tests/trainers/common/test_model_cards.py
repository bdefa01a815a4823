"""The model card beside a checkpoint: what it says is so, and its examples give the scores that trl_ext gives."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import config, lora, trainer_for
from trl_ext import (
    ORMConfig,
    ORMTrainer,
    PRMConfig,
    PRMTrainer,
    RewardEnsembleConfig,
    RewardEnsembleTrainer,
    RewardScorer,
    WeakToStrongConfig,
)
from trl_ext.trainers.common.model_card import name_in_card, put_evaluation
from trl_ext.trainers.weak_to_strong.trainer import WeakToStrongTrainer


OUTCOMES = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "label": n % 2 == 0} for n in range(8)]
STEPS = [{"prompt": "2 + 2?", "completions": ["2 + 2 = 4", "So 4."], "labels": [True, n % 2 == 0]} for n in range(8)]


def run_example(card: str, heading: str) -> dict:
    """The variables after the example under a heading."""
    section = card.split(f"## {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    variables: dict = {}
    exec(code, variables)
    return variables


def saved_card(trainer, folder: Path) -> str:
    trainer.train()
    trainer.save_model(str(folder))
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("adapter", [False, True])
def test_both_examples_of_a_reward_model_give_its_score(base, tmp_path, adapter):
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = trainer_for(
        base, args, eval_dataset=Dataset.from_list(pair_rows(8)), peft_config=lora() if adapter else None
    )
    card = saved_card(trainer, tmp_path / "model")
    score = RewardScorer(str(tmp_path / "model"))(["2 + 2?"], ["4"])[0]
    assert run_example(card, "Score with plain transformers")["score"].item() == pytest.approx(score, abs=1e-5)
    assert run_example(card, "Score with trl_ext")["scorer"](["2 + 2?"], ["4"]) == [pytest.approx(score, abs=1e-5)]
    assert f"library_name: {'peft' if adapter else 'transformers'}" in card and "- trl-ext" in card
    assert f"from `{base}` with `RewardTrainer`" in card and "None" not in card
    metrics = trainer.state.log_history[-2] if "eval_loss" in trainer.state.log_history[-2] else None
    assert metrics is not None and f"| loss | {metrics['eval_loss']:.4g} | 0.6931 for a model" in card
    assert f"{metrics['eval_length_accuracy']:.4g} if the longer answer won" in card
    assert f"| length_accuracy | {metrics['eval_length_accuracy']:.4g} |  |" in card  # a baseline has none


def test_the_example_without_us_sees_the_last_token_where_the_pad_token_is_eos(tmp_path, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trainer_for(base, config(tmp_path, max_steps=1), processing_class=tokenizer)
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token
    card = saved_card(trainer, tmp_path / "model")
    score = RewardScorer(str(tmp_path / "model"))(["2 + 2?"], ["4"])[0]
    assert run_example(card, "Score with plain transformers")["score"].item() == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["orm", "prm"])
def test_the_examples_of_token_level_models_give_their_outputs(tmp_path, family, kind):
    base = save_tiny_model(tmp_path / "base", family)
    trainer_class, config_class, rows = {
        "orm": (ORMTrainer, ORMConfig, OUTCOMES),
        "prm": (PRMTrainer, PRMConfig, STEPS),
    }[kind]
    trainer = trainer_for(base, config(tmp_path, config_class, max_steps=1), rows, trainer_class)
    card = saved_card(trainer, tmp_path / "model")
    found = run_example(card, "Score with plain transformers")
    scorer = RewardScorer(str(tmp_path / "model"))
    if kind == "orm":
        assert found["score"].item() == pytest.approx(scorer(["2 + 2?"], ["4"])[0], abs=1e-5)
    else:
        assert "with '\\n' behind it" in card
        expected = scorer.score_tokens(["2 + 2?"], ["4"])[0]
        assert torch.allclose(found["outputs"][-len(expected) :], torch.tensor(expected), atol=1e-5)
        run_example(card, "Score with trl_ext")


def test_an_ensemble_and_its_members_have_cards(base, tmp_path):
    args = config(tmp_path, RewardEnsembleConfig, max_steps=1, num_members=2)
    trainer = trainer_for(base, args, trainer_class=RewardEnsembleTrainer, peft_config=lora())
    card = saved_card(trainer, tmp_path / "model")
    assert "An ensemble of 2 reward models" in card
    scores = run_example(card, "Score with trl_ext")["ensemble"].score_members(["2 + 2?"], ["4"])[0]
    for member, score in enumerate(scores):
        member_card = (tmp_path / f"model/member-{member}/README.md").read_text(encoding="utf-8")
        found = run_example(member_card, "Score with plain transformers")["score"].item()
        assert found == pytest.approx(score, abs=1e-3)


def test_a_student_has_a_card(base, tmp_path):
    texts = Dataset.from_list([{"prompt": "2 + 2 =", "completion": " 4"}] * 4)
    args = config(tmp_path, WeakToStrongConfig, max_steps=1)
    trainer = WeakToStrongTrainer(
        str(base), str(base), args, train_dataset=texts, peft_config=lora(task_type="CAUSAL_LM", modules_to_save=None)
    )
    card = saved_card(trainer, tmp_path / "model")
    assert (
        "KL(weak \\|\\| strong)" in card
        and "learned from a weaker one" in card
        and "pipeline_tag: text-generation" in card
    )
    run_example(card, "Use")


def test_checkpoints_have_cards_and_the_section_of_an_evaluation_stays(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), peft_config=lora())
    trainer.dataset_name = "somebody/pairs"
    trainer.train()
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "RewardTrainer" in card and "datasets: somebody/pairs" in card
    put_evaluation(tmp_path, "accuracy 0.7")
    put_evaluation(tmp_path, "accuracy 0.8")
    trainer.create_model_card(tags=["maths"], license="mit", dataset_name="somebody/others")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("## Evaluation") == 1 and "accuracy 0.8" in card and "accuracy 0.7" not in card
    assert "license: mit" in card and "- maths" in card and "on `somebody/others`" in card

    assert str(base) in card  # its examples run here
    trainer.hub_model_id = "somebody/model"
    trainer.create_model_card(dataset_name=str(tmp_path / "rows.jsonl"))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and str(base) not in card
    assert f'from_pretrained("path/to/{base.name}", num_labels=1' in card and "`path/to/rows.jsonl` was a" in card


def test_a_card_names_the_folder_that_a_stage_gets_when_it_is_done():
    trainer = SimpleNamespace()
    assert name_in_card(trainer, Path("run/weak-0.partial/checkpoint-2")) == "run/weak-0/checkpoint-2"
    assert name_in_card(trainer, Path("/run/weak.partial.x")) == "/run/weak.partial.x"
    assert name_in_card(SimpleNamespace(hub_model_id="a/b"), Path("run/weak-0.partial")) == "a/b"
