"""`DenseGRPOTrainer`: the right tokens get credit, TRL's numbers where nothing is dense, and clear errors."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import save_tiny_model
from tests.trainers.table import step_rows, tiny_trainer
from trl_ext import RewardScorer
from trl_ext.data.segmentation import steps
from trl_ext.losses.advantages import normalize_steps, returns_to_go
from trl_ext.trainers.policy.config import DenseGRPOConfig
from trl_ext.trainers.policy.dense_rewards import DenseRewardError, DenseRewards, dense_function
from trl_ext.trainers.policy.trainer import DenseGRPOTrainer


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5)


PROMPTS = Dataset.from_list([{"prompt": text, "wanted": text[0]} for text in ("one", "two", "three", "four")])
COMMON = dict(
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=8,
    max_steps=2,
    logging_steps=1,
    learning_rate=1e-3,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
    seed=3,
)


def letters(prompts, completions, **columns):
    """A scalar reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def halves(prompts, completions, wanted, **columns):
    """A dense reward for the first half of each completion, and another one for the rest; none for the empty one."""
    found = []
    for text in completions:
        middle = len(text) // 2
        spans = [(0, middle, 1.0 * (sum(map(ord, text)) % 5))] if middle else []
        found.append([*spans, (middle, len(text), -0.5)] if text else None)
    return found


def config(folder, **kwargs):
    return DenseGRPOConfig(output_dir=str(folder), **(COMMON | kwargs))


def trained(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_without_dense_rewards_it_is_trls(policy_path, tmp_path):
    args = config(tmp_path, advantage="outcome")
    our_losses, our_weights = trained(DenseGRPOTrainer(str(policy_path), letters, args=args, train_dataset=PROMPTS))
    args = GRPOConfig(output_dir=str(tmp_path), **COMMON)
    their_losses, their_weights = trained(GRPOTrainer(str(policy_path), letters, args=args, train_dataset=PROMPTS))
    assert our_losses == pytest.approx(their_losses, abs=1e-6)
    for name, weight in their_weights.items():
        torch.testing.assert_close(our_weights[name], weight, atol=1e-7, rtol=0)


@pytest.mark.parametrize("advantage", ["process", "return", "min_form", "shaped", "shrunken"])
def test_two_steps_move_the_policy_and_log_what_was_rewarded(policy_path, tmp_path, advantage):
    trainer = DenseGRPOTrainer(
        str(policy_path), letters, halves, args=config(tmp_path, advantage=advantage), train_dataset=PROMPTS
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    _, after = trained(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    logged = trainer.state.log_history[0]
    assert 0 < logged["dense/rewards_per_completion"] <= 2
    assert 0 <= logged["dense/completions_without_reward"] < 1
    assert logged["dense/advantage_size"] > 0
    assert "rewards/dense/mean" in logged
    assert "rewards/letters/mean" in logged


class Rigged(DenseGRPOTrainer):
    """Keeps what generation and scoring returned, and what the dense function gave."""

    def _generate_and_score_completions(self, inputs):
        self.output = super()._generate_and_score_completions(inputs)
        return self.output


def test_advantages_are_those_of_the_definition_and_the_outcome_is_added(policy_path, tmp_path):
    kept = {}

    def dense(prompts, completions, completion_ids, **columns):
        kept["ids"], kept["spans"] = completion_ids, halves(prompts, completions, columns["wanted"])
        return kept["spans"]

    args = config(tmp_path, outcome_weight=0.5, dense_weight=2.0, max_steps=1)
    trainer = Rigged(str(policy_path), letters, dense, args=args, train_dataset=PROMPTS)
    trainer.train()
    output = trainer.output
    mask = output["completion_mask"].bool()
    rewards, given = torch.zeros(mask.shape), torch.zeros_like(mask)
    tokenizer = trainer.processing_class
    for row, (ids, spans) in enumerate(zip(kept["ids"], kept["spans"], strict=True)):
        prefixes = [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        for _, end, reward in spans or []:
            whole = prefixes[-1]
            token = next(n for n, text in enumerate(prefixes) if len(text) >= end and text[:end] == whole[:end])
            token = len(ids) - 1 if end == len(whole) else token  # the end of the text is said by the last token
            rewards[row, token] += reward
            given[row, token] = True
    wanted = 2.0 * returns_to_go(normalize_steps(rewards, given & mask, 4), mask)
    texts = tokenizer.batch_decode(kept["ids"], skip_special_tokens=True)
    scalar = torch.tensor(letters(None, texts))
    outcome = (scalar - scalar.mean()) / (scalar.std() + 1e-4)
    wanted = wanted + 0.5 * outcome[:, None] * mask
    torch.testing.assert_close(output["advantages"], wanted, atol=1e-5, rtol=1e-5)


def test_credit_changes_exactly_the_tokens_that_it_should(policy_path, tmp_path):
    trainer = DenseGRPOTrainer(str(policy_path), None, halves, args=config(tmp_path, beta=0.0), train_dataset=PROMPTS)
    batch = trainer._prepare_inputs([dict(PROMPTS[0]) for _ in range(4)])
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    row, token = batch["completion_mask"].nonzero()[1].tolist()
    batch["advantages"][row, token] = 1.0
    logps = []
    original = trainer._get_per_token_logps_and_entropies

    def keep(*args, **kwargs):
        result = original(*args, **kwargs)
        result[0].retain_grad()
        logps.append(result[0])
        return result

    trainer._get_per_token_logps_and_entropies = keep
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch).backward()
    moved = logps[-1].grad.nonzero().tolist()
    assert moved == [[row, token]]


def test_several_functions_are_weighted(policy_path, tmp_path):
    def whole(reward):
        return lambda prompts, completions, **columns: [[(0, len(c), reward)] if c else None for c in completions]

    dense = DenseRewards([whole(1.0), whole(10.0)], [0.5, 2.0])
    dense.tokenizer = tokenizer = AutoTokenizer.from_pretrained(policy_path)
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert dense(prompts=["p", "q"], completions=["one two", ""], completion_ids=[ids, []]) == [20.5, None]
    rewards, given = dense.take(torch.Size([2, len(ids) + 2]), torch.device("cpu"))
    assert rewards[0].tolist() == [0.0] * (len(ids) - 1) + [20.5, 0.0, 0.0]
    assert given.sum() == 1


def test_a_function_gets_messages_as_in_trl_and_the_text_that_spans_count_in(policy_path):
    seen = {}

    def last_word(prompts, completions, completion_texts, **columns):
        seen.update(completions=completions, texts=completion_texts)
        return [[(text.rindex(" ") + 1, len(text), 1.0)] for text in completion_texts]

    dense = DenseRewards([last_word], [1.0])
    dense.tokenizer = tokenizer = AutoTokenizer.from_pretrained(policy_path)
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    for completion in ("one two", [{"role": "assistant", "content": "one two"}]):
        assert dense(prompts=["p"], completions=[completion], completion_ids=[ids]) == [1.0]
        assert seen == {"completions": [completion], "texts": ["one two"]}
        rewards, _ = dense.take(torch.Size([1, len(ids)]), torch.device("cpu"))
        assert rewards.tolist() == [[0.0] * (len(ids) - 1) + [1.0]]


class StepScorer:
    """A process model of steps: P(correct) by the number of characters."""

    kind = "process"

    def score_steps(self, prompts, own, **columns):
        return [[min(1.0, len(step) / 10) for step in texts] for texts in own]


class SegmentScorer:
    kind = "segment"

    def score_segments(self, prompts, completions, spans, **columns):
        return [[{"a": 1.0, "b": float(end - start)} for start, end in own] for own in spans]


class TokenScorer:
    kind = "outcome"

    def score_tokens(self, prompts, completions, **columns):
        return [[float(n) for n, _ in enumerate(text.split(" "))] + [9.0] for text in completions]

    def token_texts(self, prompts, completions, **columns):
        return [
            [word if n == 0 else f" {word}" for n, word in enumerate(text.split(" "))] + [""] for text in completions
        ]


def test_scorers_become_spans():
    text = "one two\nthree\n"
    (found,) = dense_function(StepScorer())(prompts=["p"], completions=[text])
    assert found == [(*span, 0.7 if n == 0 else 0.5) for n, span in enumerate(steps(text))]
    (found,) = dense_function(SegmentScorer())(prompts=["p"], completions=["One. Two three."])
    assert found == [(0, 5, 6.0), (5, 15, 11.0)]
    (found,) = dense_function(TokenScorer())(prompts=["p"], completions=["one two"])
    assert found == [(0, 3, 0.0), (3, 7, 1.0)]


def test_a_trained_process_model_gives_the_steps_their_credit(policy_path, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")  # another tokenizer than the policy's
    prm = tiny_trainer("prm", base, tmp_path / "prm", step_rows(12), max_steps=2)
    prm.train()
    prm.save_model()
    scorer = RewardScorer(tmp_path / "prm", name="prm")
    before = [p.detach().clone() for p in scorer.model.parameters()]
    trainer = DenseGRPOTrainer(str(policy_path), None, scorer, args=config(tmp_path / "out"), train_dataset=PROMPTS)
    trainer.train()
    assert trainer.state.log_history[0]["dense/rewards_per_completion"] >= 1
    assert all(map(torch.equal, before, scorer.model.parameters()))


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_rewards_may_be_numbers_of_numpy_and_torch(policy_path, tmp_path, number):
    def half(prompts, completions, **columns):
        return [[(0, len(text), number)] if text else None for text in completions]

    trainer = DenseGRPOTrainer(str(policy_path), None, half, args=config(tmp_path), train_dataset=PROMPTS)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/dense/mean"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, completions, **c: None, "returned nothing for 4 completions"),
        (lambda prompts, completions, **c: [[]], "returned 1 lists for 4 completions"),
        (lambda prompts, completions, **c: [[(0, 10**6, 1.0)]] * 4, "the span 0 to 1000000 in completion 0"),
        (lambda prompts, completions, **c: [[(0, 1, float("nan"))]] * 4, "the reward nan in completion 0"),
    ],
)
def test_bad_dense_rewards_stop_with_a_sentence(policy_path, tmp_path, function, message):
    trainer = DenseGRPOTrainer(str(policy_path), None, function, args=config(tmp_path), train_dataset=PROMPTS)
    with pytest.raises(DenseRewardError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "at least one function"),
        ({"dense_reward_funcs": 3}, TypeError, "is a int"),
        ({"dense_reward_funcs": [halves], "tools": [print]}, ValueError, "without tools"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(kwargs, error, message, tmp_path):
    with pytest.raises(error, match=message):
        DenseGRPOTrainer("nowhere", args=config(tmp_path), train_dataset=PROMPTS, **kwargs)


def test_settings_that_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="does not use them"):
        DenseGRPOTrainer("nowhere", None, halves, args=config(tmp_path, advantage="outcome"))
    with pytest.raises(ValueError, match="2 dense_reward_weights for 1 functions"):
        DenseGRPOTrainer("nowhere", None, halves, args=config(tmp_path, dense_reward_weights=[1.0, 2.0]))
    with pytest.raises(TypeError, match="DenseGRPOConfig"):
        DenseGRPOTrainer("nowhere", None, halves, args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True))
    for wrong in (
        {"gamma": 2},
        {"advantage": "gae"},
        {"length_control": True, "advantage": "shaped"},
        {"shrinkage": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config(tmp_path, **wrong)
