"""Token-level scorers inside stock TRL trainers, and behind a 4-bit base."""

import math

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.models.helpers import nf4
from tests.tiny import save_tiny_model
from tests.trainers.helpers import lora
from tests.trainers.table import logits_of, outcome_rows, segment_rows, step_rows, tiny_trainer
from trl_ext import RewardScorer, load_reward_model
from trl_ext.data.segmentation import steps as steps_of


ROWS = {"orm": outcome_rows, "prm": step_rows, "segment": segment_rows}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """`trained("prm")` -> a folder, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            trainer = tiny_trainer(kind, base, made[kind], ROWS[kind](12), max_steps=2, learning_rate=2e-2)
            trainer.train()
            trainer.save_model()
        return made[kind]

    return get


# Stock trainers

CASES = [
    ("grpo", "orm", "mean"),
    ("grpo", "prm", "mean"),
    ("grpo", "segment", "mean"),
    ("grpo", "prm", "prod"),
    ("rloo", "orm", None),
]


@pytest.mark.parametrize(("trainer", "kind", "aggregation"), CASES)
def test_two_steps(trained, policy, tmp_path, trainer, kind, aggregation):
    scorer = RewardScorer(trained(kind), name="own", aggregation=aggregation)
    calls = []

    def reward(prompts, completions, **columns):
        scores = scorer(prompts, completions, **columns)
        calls.append((prompts, completions, scores))
        return scores

    config, cls = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[trainer]
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": f"Question {n}:\n"} for n in range(4)])
    one = cls(model=str(policy), reward_funcs=[scorer, reward], args=args, train_dataset=data)
    one.train()
    logs = [log for log in one.state.log_history if "reward" in log]
    assert len(calls) == len(logs) == 2
    for log, (prompts, completions, scores) in zip(logs, calls, strict=True):
        real = [score for score in scores if score is not None]
        assert real and log["rewards/own/mean"] == pytest.approx(sum(real) / len(real), abs=1e-5)
        assert scores == [
            by_hand(trained(kind), aggregation, *pair) for pair in zip(prompts, completions, strict=True)
        ]


def by_hand(folder, aggregation, prompt, completion):
    """The reward of one completion from its tokens or steps, where that is short to say; else what is given."""
    if aggregation is None:  # an outcome model's own number: the output at the last token
        (tokens,) = RewardScorer(folder).score_tokens([prompt], [completion])
        return pytest.approx(tokens[-1], abs=1e-5)
    if aggregation == "prod":
        spans = steps_of(completion, separator="\n")  # an empty line belongs to the step before it
        steps = [completion[start:end].removesuffix("\n") for start, end in spans]
        (scores,) = RewardScorer(folder).score_steps([prompt], [steps])
        return pytest.approx(math.prod(scores), abs=1e-5) if steps else None
    (score,) = RewardScorer(folder, aggregation=aggregation, batch_size=1)([prompt], [completion])
    return None if score is None else pytest.approx(score, abs=1e-5)


# A base in 4 bits


@pytest.mark.parametrize("kind", ["orm", "prm"])
def test_on_a_4_bit_base_reloaded_scores_are_those_in_memory(base, tmp_path, kind):
    rows = ROWS[kind](9, seed=5)
    arguments = {"quantization_config": nf4(), "peft_config": lora()}
    trainer = tiny_trainer(kind, base, tmp_path, rows, max_steps=2, learning_rate=2e-2, trainer_kwargs=arguments)
    trainer.train()
    trainer.save_model()
    reloaded = RewardScorer(tmp_path, batch_size=4)
    assert load_reward_model(tmp_path).get_base_model().is_loaded_in_4bit
    in_memory = RewardScorer(trainer.model, AutoTokenizer.from_pretrained(tmp_path), batch_size=2)
    prompts = [row["prompt"] for row in rows]
    if kind == "orm":
        found, want = (s.score_tokens(prompts, [row["completion"] for row in rows]) for s in (reloaded, in_memory))
    else:
        found, want = (s.score_steps(prompts, [row["completions"] for row in rows]) for s in (reloaded, in_memory))
    assert [len(own) for own in found] == [len(own) for own in want]
    flat = [score for own in found for score in own]
    assert flat == pytest.approx([score for own in want for score in own], abs=1e-5)
    assert max(flat) - min(flat) > 1e-2
    for own, row in zip(found, trainer.train_dataset, strict=True):  # and those of the trainer itself
        logits = logits_of(trainer, row)
        at = logits[row["label_positions"]]
        assert own == pytest.approx((at[:, 0] if kind == "orm" else at.softmax(-1)[:, 1]).tolist(), abs=1e-5)
