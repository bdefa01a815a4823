"""encode_with_offsets: the ids of `encode`, and the characters of each token, in text and in chats."""

import random

import pytest

from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.data.offsets import encode_with_offsets
from trl_ext.data.tokenization import TokenizationSettings, encode


PIECES = ["apples", " 12", "\n", "\n\n", "  ", "日本語。", "🙂", "Über", "cafe\u0301", "don't", ".", "\r\n", "é", "\t"]
# In the manner of Qwen 3: an empty thinking part is put before an answer without one, one with it is left in place.
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set think = '' %}{%- set content = m.content %}{%- if '</think>' in content %}"
    "{%- set think = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<think>\n' + think + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{ m.content }}{%- endif %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
)


def random_text(rng: random.Random, least: int = 1) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(least, 10)))


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_ids_equal_encode_and_tokens_hold_their_characters(kind, chat):
    tokenizer = tiny_tokenizer(kind)
    tokenization = TokenizationSettings.for_training(tokenizer)
    rng = random.Random(kind)
    for _ in range(80):
        prompt, completion = random_text(rng, 0 if not chat else 1), random_text(rng)
        if chat:
            prompt = [{"role": "user", "content": prompt}]
        limit = rng.choice([None, None, 12, 25])
        located = encode_with_offsets(tokenizer, prompt, completion, tokenization, max_length=limit)
        plain = encode(tokenizer, prompt, completion, tokenization, max_length=limit)
        assert (located.ids, located.truncated) == (plain.ids, plain.truncated)
        assert len(located.starts) == len(located.ends) == len(located.ids)
        assert located.stripped == (chat and kind == "llama" and completion != completion.strip())
        if limit is not None and located.truncated:
            continue
        for position in range(located.completion_start):
            assert located.ends[position] <= 0 or located.starts[position] == located.ends[position]
        # Each character that the tokenizer does not drop is in a token, whose text has it (in some form).
        for character, glyph in enumerate(completion):
            tokens = located.tokens(character, character + 1)
            if glyph.isspace() and (kind == "bert" or located.stripped):
                continue
            if kind in ("qwen", "bert") and glyph in "e\u0301":  # composed or stripped of the accent
                continue
            assert len(tokens) > 0
            text = tokenizer.decode([located.ids[t] for t in range(tokens[0], tokens[-1] + 1)])
            assert glyph.isspace() or glyph.lower() in text.lower() or kind == "bert"
            assert tokens[0] >= located.completion_start


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_cutting_the_prompt_does_not_shift_the_completion(kind):
    tokenizer = tiny_tokenizer(kind)
    tokenization = TokenizationSettings.for_training(tokenizer)
    prompt, completion = "one two three four five six seven eight nine ten " * 3, "the answer is 56, é."
    whole = encode_with_offsets(tokenizer, prompt, completion, tokenization)
    cut = encode_with_offsets(tokenizer, prompt, completion, tokenization, max_length=len(whole.ids) - 9)
    assert cut.truncated and cut.completion_start == whole.completion_start - 9
    for span in [(0, 3), (4, 10), (14, 16), (18, 19), (0, len(completion))]:
        assert cut.tokens(*span).tolist() == (whole.tokens(*span) - 9).tolist()


def test_white_space_that_the_template_strips():
    tokenizer = tiny_tokenizer("llama")  # its template trims
    prompt = [{"role": "user", "content": "answer"}]
    completion = " \n answer. \n"
    located = encode_with_offsets(tokenizer, prompt, completion, TokenizationSettings(True))
    assert located.stripped
    assert tokenizer.decode([located.ids[t] for t in located.tokens(0, len(completion))]) == "answer."
    assert located.tokens(0, 3).tolist() == located.tokens(10, 12).tolist() == []
    assert located.tokens(0, 4).tolist() == [located.completion_start]
    located = encode_with_offsets(tokenizer, prompt, completion + " " * 40, TokenizationSettings(True))
    assert (located.starts <= located.ends).all()
    assert located.tokens(0, 50)[-1] == located.tokens(0, len(completion))[-1]
    for blank in ("\n", "  \n"):
        located = encode_with_offsets(tokenizer, prompt, blank, TokenizationSettings(True))
        assert located.tokens(0, len(blank)).tolist() == []
        assert located.ids[located.completion_start] == tokenizer.eos_token_id


def test_the_completion_is_not_mistaken_for_the_same_words_elsewhere():
    tokenizer = tiny_tokenizer("qwen")
    prompt = [{"role": "user", "content": "user assistant yes"}, {"role": "assistant", "content": "yes"}]
    prompt += [{"role": "user", "content": "yes"}]
    for completion in ("yes", "assistant", "user", "im_end"):
        located = encode_with_offsets(tokenizer, prompt, completion, TokenizationSettings(True))
        alone = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert located.completion_start == len(alone)
        assert tokenizer.decode(located.ids[located.completion_start :]).startswith(completion)


def test_characters_are_those_of_the_last_message():
    tokenizer = tiny_tokenizer("qwen")
    turns = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    turns += [{"role": "assistant", "content": "three"}]
    located = encode_with_offsets(tokenizer, [{"role": "user", "content": "go"}], turns, TokenizationSettings(True))
    assert tokenizer.decode([located.ids[t] for t in located.tokens(0, 5)]) == "three"
    implicit = [{"role": "user", "content": "go"}, *turns]
    assert encode_with_offsets(tokenizer, None, implicit, TokenizationSettings(True)).ids == located.ids


def test_a_template_that_looks_for_thoughts():
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.chat_template = THINKING
    prompt = [{"role": "user", "content": "<think>\nwell\n</think>\n\nyes"}]
    for completion in ("yes, 9.", "\n\nyes, 9.", "<think>\nwell\n</think>\n\nyes"):
        located = encode_with_offsets(tokenizer, prompt, completion, TokenizationSettings(True))
        assert located.ids == encode(tokenizer, prompt, completion, TokenizationSettings(True)).ids
        tokens = located.tokens(0, len(completion))
        assert tokens[0] >= located.completion_start
        assert tokenizer.decode([located.ids[t] for t in tokens]).strip() == completion.strip()
        assert len(located.tokens(len(completion) - 1, len(completion))) == 1
    for rewritten in ("<think>well</think>yes", "<think>a</think><think>b</think>c"):
        with pytest.raises(ValueError, match="rewrites the completion"):
            encode_with_offsets(tokenizer, prompt, rewritten, TokenizationSettings(True))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
        "{{ messages[0].content }}",
    ],
    ids=["upper case", "twice", "not at all"],
)
def test_templates_that_rewrite_the_completion_are_refused(template):
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="rewrites the completion"):
        encode_with_offsets(tokenizer, [{"role": "user", "content": "a"}], "some answer", TokenizationSettings(True))


def test_template_arguments_reach_both_renderings():
    tokenizer = tiny_tokenizer("llama")
    prompt, options = [{"role": "user", "content": "a"}], {"chat_template_kwargs": {"thinking": True}}
    options["tools"] = [{"type": "function", "function": {"name": "add", "description": "b", "parameters": {}}}]
    located = encode_with_offsets(tokenizer, prompt, "b", TokenizationSettings(True), **options)
    assert located.ids == encode(tokenizer, prompt, "b", TokenizationSettings(True), **options).ids
    assert located.ids != encode(tokenizer, prompt, "b", TokenizationSettings(True)).ids
    assert tokenizer.decode([located.ids[t] for t in located.tokens(0, 1)]) == "b"


def test_a_tokenizer_without_offsets_and_mixed_kinds_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="need a fast tokenizer.*Slow is slow"):
        encode_with_offsets(Slow(), "a", "b", TokenizationSettings(True))
    with pytest.raises(TypeError, match="give both as one kind"):
        encode_with_offsets(tiny_tokenizer(), "a", [{"role": "assistant", "content": "b"}], TokenizationSettings(True))
