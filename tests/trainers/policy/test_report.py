"""The page of a policy's training: what its log holds is drawn, and texts are shown as they are."""

import re

import pytest

from trl_ext.trainers.policy.pictures import CURVES, curve, draw
from trl_ext.trainers.policy.report import FIRST, LAST, LONG, completions_page, policy_report


def entry(step):
    """What PPO with dense rewards logs at a step."""
    values = {name: 0.1 * step for each in CURVES.values() for name in each.metrics}
    places = {f"dense/reward_at_step_{n}": 0.1 * n for n in range(1, 7)}
    shares = {f"dense/first_low_at_step_{n}": 0.1 for n in range(1, 7)}
    more = {"rewards/exact/mean": 0.5, "dense/without_low_step": 0.4, "watch/verifier_trend": float("inf")}
    return {"step": step, **values, **places, **shares, **more}


def sample(pieces, **more):
    count = len(pieces)
    return {
        "step": 7,
        "prompt": "2 < 3?",
        "pieces": pieces,
        "advantages": [0.0] * count,
        "rewards": [None] * count,
    } | more


@pytest.fixture(scope="module")
def history():
    return [entry(1), entry(2), {"step": 2, "train_runtime": 3.0}]


def test_every_metric_has_its_picture(history):
    pictures = draw(history, "svg")
    assert set(pictures) == {f"policy_{name}" for name in (*CURVES, "steps", "first_low")}
    text = pictures["policy_steps"]["svg"].decode()
    assert "<svg" in text
    assert list(draw([entry(1)], "png")) == ["policy_steps"]  # a curve needs two points


def test_what_is_not_finite_is_left_out_of_curves(history):
    assert curve(history, "watch/verifier_trend") == []
    assert curve(history, "kl") == [(1, 0.1), (2, 0.2)]


def test_a_run_without_logs_or_completions_says_so(tmp_path):
    page = policy_report(tmp_path / "new", []).read_text()
    assert "Nothing was logged" in page and "log_completions=True" in page
    assert not list(tmp_path.rglob("*.png"))


def test_texts_are_escaped_and_equal_neighbours_are_joined():
    page = completions_page([sample(["<b>", " & ", "x"], advantages=[1.0, 1.0, -1.0], reward=0.5)])
    assert ">&lt;b&gt; &amp; </span>" in page and "<b>" not in page
    assert page.count('class="piece"') == 2 and "3 tokens, scalar reward 0.5" in page
    assert "2 &lt; 3?" in page
    with_values = completions_page([sample(["a", "b"], values=[0.25, 0.5])])
    assert with_values.count('class="piece"') == 2 and "value before it 0.25" in with_values
    assert "All advantages are 0" in with_values


def test_a_token_without_letters_shows_its_reward():
    page = completions_page([sample(["1", "\n", ""], rewards=[None, 0.9, 0.2])])
    assert re.search(r'reward 0.9" data-mark="↵"></span>\n<span', page)
    assert 'reward 0.2" data-mark="end"' in page
    assert "2 dense rewards, lowest 0.2, sum 1.1" in page


def test_a_long_completion_loses_its_middle():
    count = LONG + 300
    page = completions_page(
        [sample([f"w{n} " for n in range(count)], advantages=[float(n % 2) for n in range(count)])]
    )
    shown = [int(n) for n in re.findall(r">w(\d+) <", page)]
    assert shown == [*range(FIRST), *range(count - LAST, count)]
    assert f"{count - FIRST - LAST} tokens are not shown" in page


def test_completions_of_one_prompt_share_it():
    page = completions_page([sample(["a"]), sample(["b"]), sample(["c"], prompt="other")])
    assert page.count('box text prompt"') == 2 and "Completion 3: " in page
