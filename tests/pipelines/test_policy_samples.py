"""Samples of a policy for an evaluation: the rows that are scored, and what a rerun reads again."""

import json

import pytest

from trl_ext.demo.model import tiny_reward_base
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.pipelines.policy_samples import policy_samples
from trl_ext.pipelines.stages.cache_key import StaleError


def test_a_begun_answer_and_its_continuation_are_one_turn(tmp_path):
    policy, file = tiny_reward_base(tmp_path / "base", hidden_size=32), tmp_path / "samples.jsonl"
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}]
    prompts = [begun, begun[:1], "a text:"]

    def sample(prompts):
        return policy_samples(policy, prompts, file, 3, max_completion_length=6)

    rows = sample(prompts)
    assert [row["prompt"] for row in rows] == [begun[:1], begun[:1], "a text:"]
    for (message,) in rows[0]["completions"]:
        assert message["role"] == "assistant" and message["content"].startswith("good") and len(message["content"]) > 4
    assert all(isinstance(text, str) for text in rows[2]["completions"])

    # the evaluation scores one assistant turn, from the rows and from the file
    def turns(prompts, completions, **columns):
        return [float(len(prompt) + len(completion)) for prompt, completion in zip(prompts, completions, strict=True)]

    stored = [json.loads(line) for line in file.read_text().splitlines()]
    for found in (rows[:2], stored[:2]):
        report = evaluate_reward_model(turns, found, probes=False, resamples=20)
        assert set(report.histogram["scores"]) == {2.0}

    assert sample(prompts) == rows
    with pytest.raises(StaleError, match="line 1: this row is not line 1 of the prompts"):
        sample([[begun[0], {"role": "assistant", "content": "bad"}], *prompts[1:]])
