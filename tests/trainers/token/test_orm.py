"""`ORMTrainer`: labels on every token, metrics over and within questions, checkpoints that GRPO takes as they are."""

import json
from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import save_tiny_model
from tests.trainers.helpers import lora
from tests.trainers.table import logits_of, outcome_rows, tiny_trainer
from trl_ext import merge_reward_model


def test_every_token_of_the_completion_and_eos_has_the_label(base, tmp_path):
    """Cobbe et al.: the verifier predicts the outcome after each token."""
    rows = outcome_rows(4)
    everywhere = tiny_trainer("orm", base, tmp_path, rows)
    tokenizer = everywhere.processing_class
    for prepared, row in zip(everywhere.train_dataset, rows, strict=True):
        ids, start = prepared["span_input_ids"], prepared["completion_start"]
        assert tokenizer.decode(ids[start:]) == row["completion"] + tokenizer.eos_token
        assert prepared["label_positions"] == list(range(start, len(ids)))
        assert set(prepared["label_values"]) == {float(row["label"])}
    last = tiny_trainer("orm", base, tmp_path, rows, label_placement="last")
    for prepared in last.train_dataset:
        assert prepared["label_positions"] == [len(prepared["span_input_ids"]) - 1]


@pytest.mark.parametrize("placement", ["all", "last"])
def test_metrics_against_scikit_learn(placement, base, tmp_path):
    """The score of a completion is that of its last token, wherever labels were in training."""
    rows = outcome_rows(60, questions=12)
    trainer = tiny_trainer(
        "orm", base, tmp_path, rows, rows, label_placement=placement, max_steps=15, learning_rate=2e-3
    )
    trainer.train()
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    scores = [logits_of(trainer, row)[-1, 0].item() for row in trainer.eval_dataset]
    labels = [row["label"] for row in rows]
    predicted = [score > 0 for score in scores]
    assert 0 < sum(predicted) < len(predicted)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["right_rate"] == pytest.approx(sum(labels) / len(labels))
    squares = (torch.tensor(scores).sigmoid() - torch.tensor(labels).float()).square()
    assert metrics["brier"] == pytest.approx(squares.mean().item(), abs=1e-6)
    assert 0 < metrics["ece"] < 1

    questions = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        questions[row["prompt"]].append((score, row["label"]))
    areas, best = [], []
    for answers in questions.values():
        best.append(max(answers)[1])
        given = [label for _, label in answers]
        if len(set(given)) == 2:
            areas.append(roc_auc_score(given, [score for score, _ in answers]))
    assert metrics["questions"] == 12
    assert metrics["question_auc"] == pytest.approx(sum(areas) / len(areas))
    assert metrics["best_of_n"] == pytest.approx(sum(best) / len(best))
    assert metrics["mean_of_n"] == pytest.approx(sum(labels) / len(labels))


def test_questions_with_one_completion_have_no_metrics_within(base, tmp_path):
    rows = outcome_rows(6, questions=6)
    metrics = tiny_trainer("orm", base, tmp_path, rows, rows).evaluate()
    assert "eval_auc" in metrics
    assert "eval_questions" not in metrics


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_same_prompt_is_the_same_question(chat, base, tmp_path):
    rows = outcome_rows(8, questions=2, chat=chat)
    metrics = tiny_trainer("orm", base, tmp_path, rows, rows).evaluate()
    assert metrics["eval_questions"] == 2


@pytest.mark.parametrize("loss", ["mse", "hinge"])
def test_other_losses_are_read_in_their_own_way(loss, base, tmp_path):
    """A squared error estimates the probability, so one half divides; a hinge loss gives no probability."""
    rows = outcome_rows(40)
    trainer = tiny_trainer("orm", base, tmp_path, rows, rows, loss_type=loss, max_steps=40, learning_rate=5e-3)
    trainer.train()
    metrics = trainer.evaluate()
    threshold = 0.5 if loss == "mse" else 0.0
    scores = [logits_of(trainer, row)[-1, 0].item() for row in trainer.eval_dataset]
    want = balanced_accuracy_score([row["label"] for row in rows], [score > threshold for score in scores])
    assert metrics["eval_balanced_accuracy"] == pytest.approx(want)
    assert want > 0.8
    assert "eval_brier" not in metrics


def test_it_learns(base, tmp_path):
    trainer = tiny_trainer(
        "orm", base, tmp_path, outcome_rows(64), outcome_rows(32, seed=5), max_steps=60, learning_rate=5e-3
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_auc"] > 0.95
    assert metrics["eval_question_auc"] > 0.95
    assert metrics["eval_best_of_n"] > metrics["eval_mean_of_n"]


@pytest.mark.parametrize("how", ["full", "merged"])
def test_a_checkpoint_goes_straight_into_grpo(how, base, tmp_path):
    """`GRPOTrainer(reward_funcs="path")` loads it by itself and rewards completions with its scores."""
    peft = {"peft_config": lora()} if how == "merged" else {}
    trainer = tiny_trainer("orm", base, tmp_path / "orm", outcome_rows(16), trainer_kwargs=peft, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    path = tmp_path / "orm"
    if how == "merged":
        path = tmp_path / "merged"
        merge_reward_model(tmp_path / "orm", path)
    assert json.loads((path / "reward_model.json").read_text())["kind"] == "outcome"

    policy = save_tiny_model(tmp_path / "policy", "llama", seed=5)
    args = GRPOConfig(
        output_dir=str(tmp_path / "grpo"), per_device_train_batch_size=4, num_generations=4, max_steps=1,
        max_completion_length=6, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": "Question 1:"}] * 4)
    grpo = GRPOTrainer(model=str(policy), reward_funcs=str(path), args=args, train_dataset=prompts)
    seen = []
    reward_model, forward = grpo.reward_funcs[0], grpo.reward_funcs[0].forward

    def watched(*positional, **keyword):
        output = forward(*positional, **keyword)
        seen.append((keyword["input_ids"], keyword["attention_mask"], output.logits[:, 0].detach()))
        return output

    reward_model.forward = watched
    grpo.train()
    assert len(seen) == 1
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for ids, mask, score in zip(*seen[0], strict=True):
        row = {"span_input_ids": ids[mask.bool()].tolist()}
        assert score.item() == pytest.approx(logits_of(trainer, row)[-1, 0].item(), abs=1e-4)
    logged = next(entry["reward"] for entry in grpo.state.log_history if "reward" in entry)
    assert logged == pytest.approx(seen[0][2].mean().item(), abs=1e-6)
