"""A scorer inside stock TRL trainers, and beside ours: same ids, same scores, under its own name."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.scoring.test_scorer import seen_ids
from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from trl_ext import RewardConfig, RewardScorer, RewardTrainer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.tokenization import TokenizationSettings


class Recorder(RewardScorer):
    """A scorer that keeps what it was called with."""

    def __call__(self, prompts, completions, **columns):
        self.calls = [*self.__dict__.get("calls", []), (prompts, completions, columns)]
        return super().__call__(prompts, completions, **columns)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5)


def prompt_only(chat):
    rows = [{"prompt": row["prompt"], "answer": str(i)} for i, row in enumerate(pair_rows(4, chat=chat, seed=4))]
    if chat:
        rows = [row | {"chat_template_kwargs": {"thinking": True}} for row in rows]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_two_steps_in_stock_trainers(reward_path, policy_path, tmp_path, trainer, chat):
    path = reward_path(lora=True)  # another tokenizer than the policy's
    scorer = Recorder(path, name="helpfulness", shared_prefix=False)  # its check runs ids of its own
    config, cls = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[trainer]
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    one = cls(model=str(policy_path), reward_funcs=[scorer], args=args, train_dataset=prompt_only(chat))
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    weights = [p.detach().clone() for p in scorer.model.parameters()]
    with seen_ids(scorer) as seen:
        one.train()

    logs = [log for log in one.state.log_history if "reward" in log]
    assert len(logs) == len(scorer.calls) == 2
    by_hand = RewardScorer(path, batch_size=1)
    for log, (prompts, completions, columns) in zip(logs, scorer.calls, strict=True):
        assert len(prompts) == 4 and isinstance(prompts[0], list if chat else str)
        assert set(columns) >= {"answer", "completion_ids", "trainer_state"}
        extra = {"chat_template_kwargs": [{"thinking": True}] * 4} if chat else {}
        want = by_hand(prompts, completions, **extra)
        assert len(set(want)) > 1
        assert log["reward"] == pytest.approx(sum(want) / 4, abs=1e-6)
        assert log["rewards/helpfulness/mean"] == pytest.approx(sum(want) / 4, abs=1e-6)
    assert any(not torch.equal(before[name], p.cpu()) for name, p in one.model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, scorer.model.parameters(), strict=True))

    # the ids inside the trainer are those that training a reward model on these completions would see
    tokenizer = AutoTokenizer.from_pretrained(path)
    extra = {"chat_template_kwargs": {"thinking": True}} if chat else {}
    rows = [
        {"prompt": p, "completions": [c, other], "ratings": [1.0, 0.0], **extra}
        for prompts, completions, _ in scorer.calls
        for p, c, other in zip(prompts, completions, completions[1:] + completions[:1], strict=True)
    ]
    groups, _ = prepare_groups(
        Dataset.from_list(rows), tokenizer, tokenization=TokenizationSettings.for_training(tokenizer), max_length=None
    )
    assert sorted(seen) == sorted(group["candidate_ids"][0] for group in groups)


def test_the_name_defaults_to_the_class(reward_path, policy_path, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=8)
    trainer = GRPOTrainer(
        model=str(policy_path),
        reward_funcs=[RewardScorer(reward_path()), RewardScorer(reward_path(), name="brevity")],
        args=args,
        train_dataset=prompt_only(False),
    )
    assert trainer.reward_func_names == ["RewardScorer", "brevity"]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_trained_model_scores_as_its_trainer_did(tmp_path, family, chat):
    base = save_tiny_model(tmp_path / "base", family)
    rows = ranked_rows(6, k=3, chat=chat)
    args = RewardConfig(
        output_dir=str(tmp_path / "out"),
        loss_type="plackett_luce",
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    trainer = RewardTrainer(
        str(base),
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(target_modules=targets),
    )
    trainer.train()
    trainer.save_model()
    want = trainer.evaluate()
    scorer = RewardScorer(tmp_path / "out", batch_size=4)
    flat = [(row["prompt"], c) for row in rows for c in row["completions"]]
    scores = scorer([p for p, _ in flat], [c for _, c in flat])
    assert all(math.isfinite(score) for score in scores)
    assert sum(scores) / len(scores) == pytest.approx(want["eval_mean_reward"], abs=1e-5)
    assert min(scores) == pytest.approx(want["eval_min_reward"], abs=1e-5)
    assert max(scores) == pytest.approx(want["eval_max_reward"], abs=1e-5)
    in_memory = RewardScorer(trainer.model, trainer.processing_class)  # its sidecar is on the model
    assert in_memory([p for p, _ in flat], [c for _, c in flat]) == pytest.approx(scores, abs=1e-5)
