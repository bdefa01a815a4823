"""Tokenizers that do not fit the policy, tools as JSON, content in parts, and adapters that load as other ones."""

import json

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.data.validation import DataError
from trl_ext.models.adapters import check_policy_adapter
from trl_ext.pipelines.generation.generator import PromptEncoder
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, load_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model", "llama")


def test_a_pad_token_that_the_policy_does_not_know_is_not_needed(policy):
    prompts = ["2 + 2 =", "a much longer prompt than the first, so that it is padded"]
    settings = Sampling(max_completion_length=4, temperature=0.0)
    expected = TransformersGenerator(str(policy), settings).generate(prompts, 1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert tokenizer.pad_token_id >= AutoModelForCausalLM.from_pretrained(policy).config.vocab_size
    found = TransformersGenerator(str(policy), settings, tokenizer).generate(prompts, 1, seed=0)
    assert [one.text for [one] in found] == [one.text for [one] in expected]


def test_a_prompt_with_a_token_that_the_policy_does_not_know_is_named(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["<new>"])
    generator = TransformersGenerator(str(policy), Sampling(max_completion_length=4), tokenizer)
    with pytest.raises(DataError, match=r"row 1.*<new>"):
        generator.generate(["2 + 2 =", "a <new> one"], 1, seed=0)


def test_tools_as_json_and_content_in_parts_are_what_they_stand_for():
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    encoder = PromptEncoder(tokenizer, Sampling())
    tools, text = [{"name": "add"}], [{"role": "user", "content": "2 + 2?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}]
    expected = encoder.ids([text], [{"tools": tools}])
    assert "[add]" in tokenizer.decode(expected[0])
    assert encoder.ids([text], [{"tools": json.dumps(tools)}]) == expected
    assert encoder.ids([parts], [{"tools": tools}]) == expected
    image = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
    with pytest.raises(DataError, match="no text"):
        encoder.ids([image], None)


def test_an_adapter_that_loads_as_another_one_is_refused(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path)
    load_policy(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    for harmless in (True, "gaussian", "pissa", "olora"):
        config.init_lora_weights = harmless
        check_policy_adapter(config)
    config.init_lora_weights = "pissa_niter_4"
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would not be the one that was trained"):
        load_policy(tmp_path)
