"""The template by which vLLM's `/score` reads a prompt and a completion as the model was trained to see them.

`/score` joins its two texts without an EOS, or for some models as a pair with a separator, which gives other scores.
With such a template they are right, though `RewardScorer` and `/classify` by token ids need none. This module makes
texts of a template. It knows nothing of servers.
"""

import json
from typing import Any

from trl_ext.data.tokenization import TokenizationSettings, Tokenizer


# Stand for the two texts while a chat template is rendered: private characters, no white space that could be cut.
_PROMPT, _COMPLETION = "\ue0f1\ue0f2\ue0f4", "\ue0f1\ue0f2\ue0f5"


def text_template(tokenizer: Tokenizer, tokenization: TokenizationSettings) -> str:
    """
    The template for a text prompt with a text completion.

    ```python
    >>> text_template(gpt2_tokenizer, TokenizationSettings(append_eos=False))
    '{{ messages[0]["content"] }}{{ messages[1]["content"] }}'
    ```
    """
    text = '{{ messages[0]["content"] }}{{ messages[1]["content"] }}'
    if not tokenization.append_eos:
        return text
    eos = json.dumps(tokenizer.eos_token)
    return f'{text}{{% if not messages[1]["content"].endswith({eos}) %}}{{{{ {eos} }}}}{{% endif %}}'


def chat_template(tokenizer: Any) -> str | None:
    """
    The template for a question as the user's message and its answer; `None` where there is none that gives the token
    ids of the chat template: the tokenizer has no template, or puts tokens of its own around every text.
    """
    if not tokenizer.chat_template:
        return None
    rendered = tokenizer.apply_chat_template(_chat(_PROMPT, _COMPLETION), tokenize=False)
    if rendered.count(_PROMPT) != 1 or rendered.count(_COMPLETION) != 1:
        return None
    before, rest = rendered.split(_PROMPT)
    between, after = rest.split(_COMPLETION)
    # /score lets the tokenizer put its BOS before the text once more
    for opening in (before, before.removeprefix(tokenizer.bos_token or "")):
        pieces = [json.dumps(opening), 'messages[0]["content"]', json.dumps(between), 'messages[1]["content"]']
        template = "".join(f"{{{{ {piece} }}}}" for piece in [*pieces, json.dumps(after)])
        texts = tokenizer.apply_chat_template(_chat("2 + 2 =", "4"), chat_template=template, tokenize=False)
        whole = tokenizer.apply_chat_template(_chat("2 + 2 =", "4"), tokenize=True, return_dict=True)
        if tokenizer(texts)["input_ids"] == whole["input_ids"]:
            return template
    return None


def _chat(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
