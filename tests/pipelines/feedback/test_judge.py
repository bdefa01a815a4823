"""A judge in this process: its probabilities are those of the model, whatever the batch, order and samples."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pipelines.feedback.rigged import biased_judge, rigged_model, shown_texts
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.pipelines.feedback.judge import NO_LABEL, TOO_LONG, Judge, JudgeError, transcript
from trl_ext.pipelines.feedback.judge_settings import JudgeSettings
from trl_ext.pipelines.generation.generator import LabelError


GROUPS = [
    ("Say hello.", ["hello there", "go away"]),
    ("A longer question about the weather in the city?", ["It is fine.", "I do not know, and I will not say."]),
    (
        [{"role": "user", "content": "Hi"}],
        [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(
        tmp_path_factory.mktemp("judge"), tokenizer=tiny_tokenizer("llama", chat=True), max_position_embeddings=4096
    )


@pytest.fixture(scope="module")
def always(tmp_path_factory):
    """Says A with odds 3 to 1 against B, and 1 to 5 with the odds 1, 2, 3, 4, 6, whatever it is asked."""
    logits = {
        "A": math.log(3),
        "B": 0.0,
        **{str(n): math.log(w) for n, w in zip("12345", (0.1, 0.2, 0.3, 0.4, 0.6), strict=True)},
    }
    return rigged_model(tmp_path_factory.mktemp("always"), {name: value + 20 for name, value in logits.items()})


def make(judge, tokenizer=None, **settings):
    return Judge(judge, JudgeSettings.of(**settings), tokenizer)


def by_hand(folder, text, labels, begun=""):
    """The share of the labels in the next-token distribution, by a plain call of the model on one prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": text}]
    before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + begun
    ids = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(ids).logits[0, -1].log_softmax(-1)
    values = []
    for label in labels:
        spelled = tokenizer(before + label, add_special_tokens=False)["input_ids"]
        assert len(spelled) == ids.shape[1] + 1
        values.append(logprobs[spelled[-1]].exp().item())
    return values


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_probabilities_are_those_of_the_next_token(tiny, batch_size):
    judge = make(str(tiny), batch_size=batch_size)
    for (prompt, completions), found in zip(GROUPS, judge.judge(GROUPS), strict=True):
        orders = [by_hand(tiny, question.text, "AB") for question in judge.questions(prompt, completions)]
        (pair,) = found.comparisons
        assert pair.when_first == pytest.approx(orders[0][0] / sum(orders[0]), abs=1e-5)
        assert pair.when_second == pytest.approx(orders[1][1] / sum(orders[1]), abs=1e-5)
        log_odds = (math.log(orders[0][0] / orders[0][1]) + math.log(orders[1][1] / orders[1][0])) / 2
        assert pair.probability == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=1e-5)
        assert found.label_mass == pytest.approx(sum(map(sum, orders)) / 2, abs=1e-5)
        assert found.ratings == pytest.approx([pair.probability, 1 - pair.probability])


def test_an_answer_begins_with_the_prefix(tiny):
    judge = make(str(tiny), answer_prefix="Answer:")
    (found,) = judge.judge(GROUPS[:1])
    first = judge.questions(*GROUPS[0])[0]
    chances = by_hand(tiny, first.text, "AB", "Answer:")
    assert found.comparisons[0].when_first == pytest.approx(chances[0] / sum(chances), abs=1e-5)


def test_a_judge_without_a_chat_template_gets_plain_text(tmp_path):
    path = save_tiny_model(tmp_path, tokenizer=tiny_tokenizer("gpt2", chat=False))
    judge = make(
        str(path),
        system_prompt="Be strict.",
        template="{{ prompt }}{% for one in completions %}{{ one.label }} {{ one.text }}{% endfor %}",
    )
    assert judge._prompt("which?", judge._begun) == "Be strict.\n\nwhich?\n\nAnswer:"
    (found,) = judge.judge(GROUPS[:1])
    assert 0 < found.ratings[0] < 1


def test_a_known_preference_for_the_first_place_cancels(always):
    model, tokenizer = always
    (found,) = make(model, tokenizer).judge(GROUPS[:1])
    (pair,) = found.comparisons
    assert (pair.when_first, pair.when_second) == pytest.approx((0.75, 0.25), abs=1e-6)
    assert found.ratings == pytest.approx([0.5, 0.5], abs=1e-6)
    assert found.position_bias == pytest.approx(0.25, abs=1e-6) and pair.consistent is False


def test_the_score_is_the_expected_value_of_the_labels(always):
    model, tokenizer = always
    expected = (1 * 1 + 2 * 2 + 3 * 3 + 4 * 4 + 5 * 6) / 16
    (found,) = make(model, tokenizer, mode="score").judge(GROUPS[:1])
    assert found.ratings == pytest.approx([expected] * 2, abs=1e-5) and found.position_bias is None
    (found,) = make(model, tokenizer, mode="score", labels=["A", "B"], values=[10, -2]).judge(GROUPS[:1])
    assert found.ratings == pytest.approx([0.75 * 10 - 0.25 * 2] * 2, abs=1e-5)


def test_sampled_labels_have_the_shares_of_their_probabilities(always):
    model, tokenizer = always
    short = "{{ prompt }}{% for one in completions %} {{ one.label }} {{ one.text }}{% endfor %}"
    judge = make(model, tokenizer, read="share", num_samples=150, batch_size=150, template=short)
    judge._generator._config.max_new_tokens = 1  # the rigged head never ends an answer
    (found,) = judge.judge(GROUPS[:1])
    (pair,) = found.comparisons
    assert (pair.when_first, 1 - pair.when_second) == pytest.approx((0.75, 0.75), abs=0.12)
    assert set(found.failed) == {NO_LABEL} and 40 < len(found.failed) < 130


def test_after_reasoning_the_labels_are_read_from_the_distribution(tiny):
    judge = make(str(tiny), reasoning=True, num_samples=2, max_completion_length=6)
    question = judge.questions(*GROUPS[0])[0]
    answers = dict(judge.ask([(question, 0), (question, 1)]))
    assert answers[0]["text"] != answers[1]["text"]
    for answer in answers.values():
        begun = f"{answer['text'].strip()}\n\nAnswer:".lstrip()
        chances = by_hand(tiny, question.text, "AB", begun)
        assert [math.exp(value) for value in answer["logprobs"]] == pytest.approx(chances, rel=1e-3)


def test_long_questions_are_counted(tiny):
    (found,) = make(str(tiny), max_length=20).judge(GROUPS[:1])
    assert found.ratings == [None, None] and found.failed == [TOO_LONG] * 2


# Labels


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_label_of_several_tokens_is_named_with_its_tokens(tmp_path, kind):
    path = save_tiny_model(tmp_path, tokenizer=tiny_tokenizer(kind, chat=True))
    with pytest.raises(LabelError, match=r"'unquestionably' is not a single token.*\['.*Single tokens here are: A, B"):
        make(str(path), labels=["unquestionably", "B"]).judge(GROUPS[:1])


def test_labels_that_are_one_token_are_refused(tiny):
    judge = make(str(tiny))
    encoder = judge._generator._encoder
    chat = [{"role": "user", "content": "which?"}]
    # the tokenizer knows " A" and not " B", so only the spelling without a space counts
    assert encoder.label_tokens(chat, ["A", "B"]) == [encoder.tokenizer.convert_tokens_to_ids([x]) for x in "AB"]
    encoder.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(LabelError, match="same token"):
        encoder.label_tokens([{"role": "user", "content": "again?"}], ["A", "a"])


def test_a_chat_template_that_refuses_the_question_is_said(tmp_path):
    path = save_tiny_model(tmp_path, tokenizer=tiny_tokenizer("llama", chat=True))
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    (path / "chat_template.jinja").write_text(strict)
    with pytest.raises(JudgeError, match="no system role"):
        make(str(path), system_prompt="Be strict.").judge(GROUPS[:1])


# Functions


def test_a_function_may_give_texts_probabilities_or_nothing():
    answers = iter(["Answer: A", {"A": 0.2, "B": 0.6}])
    (found,) = make(lambda chats: [next(answers) for _ in chats], batch_size=1).judge(GROUPS[:1])
    assert found.comparisons[0].when_second == pytest.approx(0.75)
    texts = {"A": [0.5, 0.5], "longer": [0.0, 1.0]}
    for says, ratings in texts.items():

        def judge(chats, says=says):
            shown = [shown_texts(chat) for chat in chats]
            return ["AB"[one[0] < one[1]] if says == "longer" else says for one in [list(map(len, s)) for s in shown]]

        (found,) = make(judge).judge([("Which?", ["short", "much longer"])])
        assert found.ratings == ratings  # the log-odds of texts are infinite
    (found,) = make(lambda chats: [None for _ in chats]).judge(GROUPS[:1])
    assert found.ratings == [None, None] and found.failed == [NO_LABEL] * 2


@pytest.mark.parametrize(
    ("answers", "words"),
    [("A", "a str"), (["A"], "1 answers for 2"), ([1.0, 2.0], "a float"), ([{"A": 2.0}] * 2, "0 to 1")],
)
def test_a_function_that_gives_no_answers_is_refused(answers, words):
    with pytest.raises(JudgeError, match=words):
        make(lambda chats: answers).judge(GROUPS[:1])


def test_a_judge_that_never_gives_a_label_is_stopped():
    calls = []
    judge = make(lambda chats: calls.append(len(chats)) or ["I cannot say."] * len(chats), batch_size=4)
    with pytest.raises(JudgeError, match="I cannot say"):
        judge.judge([(str(number), ["a", "b"]) for number in range(100)])
    assert sum(calls) == 32


def test_a_planted_bias_cancels_exactly_in_the_log_odds():
    quality = {"good": 1.0, "bad": 0.0, "fair": 0.4}.__getitem__
    group = ("Which?", ["good", "bad", "fair"])
    (found,) = make(biased_judge(quality, 3.0), mode="rank").judge([group])
    chance = lambda one, other: 1 / (1 + math.exp(quality(other) - quality(one)))  # noqa: E731
    for place, one in enumerate(group[1]):
        others = [chance(one, other) for other in group[1] if other != one]
        assert found.ratings[place] == pytest.approx(sum(others) / 2)
    (alone,) = make(biased_judge(quality, 3.0), orders="one").judge([("Which?", ["good", "bad"])])
    assert abs(alone.ratings[0] - chance("good", "bad")) > 0.1 and alone.position_bias is None
    (plain,) = make(biased_judge(quality, 3.0), average="probability").judge([("Which?", ["good", "bad"])])
    assert abs(plain.ratings[0] - chance("good", "bad")) > 0.05  # only the log-odds remove it exactly


def test_a_list_is_asked_in_both_orders():
    def judge(chats):
        """Lists by length, but puts the answer that is shown first on top."""
        answers = []
        for chat in chats:
            texts = shown_texts(chat)
            order = [0, *sorted(range(1, len(texts)), key=lambda place: -len(texts[place]))]
            answers.append(" > ".join("ABC"[place] for place in order))
        return answers

    (found,) = make(judge, mode="list").judge([("Which?", ["a", "bb", "ccc"])])
    assert found.ratings == [0.5, 0.25, 0.75] and found.position_bias == 0.5
    (failed,) = make(lambda chats: ["A > B > C", "A > B"], mode="list").judge([("Which?", ["a", "bb", "ccc"])])
    assert failed.ratings == [None] * 3  # one order alone would keep its bias


def test_a_pair_needs_both_orders():
    answers = iter(["A", "neither"])
    (found,) = make(lambda chats: [next(answers) for _ in chats]).judge(GROUPS[:1])
    assert found.ratings == [None, None] and found.failed == [NO_LABEL]


def test_chats_are_shown_with_their_roles():
    tool = {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert transcript(chat) == "System: Be kind.\n\nUser: Hi"
    assert "search" in transcript([tool], answer=True)
    assert transcript(None) == "" and transcript([{"role": "assistant", "content": "x"}], answer=True) == "x"
