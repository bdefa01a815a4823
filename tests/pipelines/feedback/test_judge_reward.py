"""A judge as a reward function: alone, in groups, in stock GRPO, in our pipelines, and from a file."""

import json

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.pipelines.feedback.rigged import biased_judge, rigged_model, shown_texts
from tests.tiny import pair_rows, save_tiny_model, tiny_tokenizer
from trl_ext import JudgeReward, best_of_n, evaluate_reward_model, rejection_sample
from trl_ext.pipelines.feedback.judge import JudgeError
from trl_ext.pipelines.names import check_name
from trl_ext.pipelines.reward_functions import check_rewards, load_reward, reward_identity, reward_name


def by_length(chats):
    """Grades by the length of the answer; silent about answers that say so."""
    texts = [shown_texts(chat)[0] for chat in chats]
    return [None if "silent" in text else str(min(5, max(1, len(text)))) for text in texts]


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory):
    return save_tiny_model(
        tmp_path_factory.mktemp("judge"), tokenizer=tiny_tokenizer("llama"), max_position_embeddings=4096, seed=3
    )


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5)


def test_grades_alone_and_none_for_no_label(caplog):
    logged = []
    judge = JudgeReward(by_length, name="length")
    scores = judge(
        ["p"] * 3, ["ab", "silent", [{"role": "assistant", "content": "abc"}]], log_metric=lambda *x: logged.append(x)
    )
    assert scores == [2.0, None, 3.0] and judge.__name__ == "length"
    assert logged == [("length/without_score", 1 / 3)] and judge.counts == {"judged": 3, "without_score": 1}
    assert judge(None, ["abcd"]) == [4.0] and judge([], []) == []
    calls = []
    same = JudgeReward(lambda chats: calls.extend(chats) or by_length(chats))
    assert (
        same(["p"] * 3, ["ab", "ab", "abc"]) == [2.0, 2.0, 3.0] and len(calls) == 2
    )  # equal questions are asked once
    with pytest.raises(ValueError, match="1 prompts for 0 completions"):
        judge(["p"], [])
    assert caplog.text.count("get None") == 1


def test_ranks_within_the_completions_of_a_prompt():
    judge = JudgeReward(biased_judge(lambda text: 10.0 * len(text), 0.0), mode="rank")
    chat = [{"role": "user", "content": "p"}]
    scores = judge(["q", chat, "q", chat, chat, "lonely"], ["a", "a", "bb", "ccc", "bb", "x"])
    assert scores[:5] == pytest.approx([0, 0, 1, 1, 0.5], abs=1e-3) and scores[5] is None
    listed = JudgeReward(
        lambda chats: [
            " > ".join(sorted("AB", key=lambda x: -len(shown_texts(chat)["AB".index(x)]))) for chat in chats
        ],
        mode="list",
        labels=["A", "B"],
    )
    assert listed(["q", "q"], ["a", "bb"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="2 labels"):
        listed(["q"] * 3, ["a", "b", "c"])


def test_comparing_is_no_reward_and_a_silent_judge_stops():
    with pytest.raises(ValueError, match="'rank' or 'list'"):
        JudgeReward(by_length, mode="compare")
    with pytest.raises(JudgeError, match="None of the first 32"):
        JudgeReward(lambda chats: ["hm"] * len(chats))([f"p{n}" for n in range(40)], ["a"] * 40)


@pytest.mark.parametrize("mode", ["score", "rank"])
def test_two_steps_in_stock_grpo(judge_path, policy_path, tmp_path, mode):
    judge = JudgeReward(str(judge_path), mode=mode, name="quality")
    seen = []

    def recorded(prompts, completions, **columns):
        seen.append(judge(prompts, completions, **columns))
        return seen[-1]

    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
    )
    rows = Dataset.from_list([{"prompt": row["prompt"], "answer": "x"} for row in pair_rows(4, chat=True)])
    trainer = GRPOTrainer(
        str(policy_path), reward_funcs=[judge if mode == "score" else recorded], args=args, train_dataset=rows
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    if mode == "score":
        assert 1 <= logged["rewards/quality/mean"] <= 5 and logged["quality/without_score"] == 0
    else:
        assert sum(seen[0]) == pytest.approx(2.0)  # of four completions of a prompt: the mean chance to win is 1/2


def test_in_rejection_sampling_best_of_n_and_evaluation(judge_path, policy_path, tmp_path):
    judge = JudgeReward(str(judge_path), name="quality")
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in pair_rows(3)])
    sampling = {"max_completion_length": 6, "seed": 1}
    found = rejection_sample(str(policy_path), judge, rows, tmp_path / "samples", num_generations=2, **sampling)
    assert len(found) == 3 and all(1 <= score <= 5 for score in found["score"])
    (pick,) = best_of_n(str(policy_path), judge, ["Say hello."], n=2, **sampling)
    assert 1 <= pick.score <= 5
    report = evaluate_reward_model(judge, pair_rows(10), probes=False, resamples=200)
    assert 0 <= report.metrics["accuracy"] <= 1


def test_a_file_names_a_judge(judge_path, tmp_path):
    path = tmp_path / "politeness.yaml"
    path.write_text(f"judge: {judge_path}\ncriteria: Is it polite?\nlabels: ['1', '2']\n")
    check_rewards([str(path)], ["answer"])
    check_name(str(path))
    assert reward_name(str(path)) == "politeness" == load_reward(path).__name__
    assert load_reward(str(path))(["p"], ["c"]) == JudgeReward(
        str(judge_path), criteria="Is it polite?", labels=["1", "2"]
    )(["p"], ["c"])
    key = reward_identity(str(path))
    assert key == json.loads(json.dumps(key)) and key["criteria"] == "Is it polite?"
    assert key["judge"]["content"] and "batch_size" not in key
    path.write_text(f"judge: {judge_path}\nbatch_size: 3\ncriteria: Is it polite?\nlabels: ['1', '2']\n")
    assert reward_identity(str(path)) == key
    path.write_text(f"judge: {judge_path}\ncriteria: Is it short?\n")
    assert reward_identity(str(path)) != key


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"mode": "rank", "orders": "one"}, True),
        ({"mode": "rank"}, False),
        ({"orders": "one"}, False),  # a grade has no order
        ({"reasoning": True}, True),
    ],
)
def test_a_seed_that_changes_scores_is_in_the_key(settings, differs):
    one, other = (JudgeReward(by_length, seed=seed, **settings).identity() for seed in (0, 1))
    assert (one != other) == differs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("criteria: x", "no key 'judge'"),
        ("judge: m\ncriterion: x", "Did you mean 'criteria'"),
        ("judge: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_generated(tmp_path, text, words):
    path = tmp_path / "judge.yaml"
    path.write_text(text)
    for check in (check_name, lambda spec: check_rewards([spec])):
        with pytest.raises(ValueError, match=words):
            check(str(path))
        with pytest.raises(FileNotFoundError):
            check(str(tmp_path / "other.yaml"))


def test_a_rigged_model_gives_the_known_grade(tmp_path):
    model, tokenizer = rigged_model(tmp_path, {"1": 20.0, "5": 20.0})
    judge = JudgeReward(model, processing_class=tokenizer)
    assert judge(["p", "q"], ["a", "b"]) == pytest.approx([3.0, 3.0], abs=1e-4)
