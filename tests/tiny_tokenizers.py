"""Tiny tokenizers made in code, put together like the real families'.

Knows how each family combines normaliser, pre-tokeniser, model and post-processor, and copies that at a vocabulary of
a few hundred tokens. Nothing is downloaded. Knows nothing of models or of trl_ext.
"""

import functools
import json
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast


TOKENIZER_KINDS = ("llama", "qwen", "mistral", "gemma", "gpt2", "bert")

CORPUS = """The quick test writes a short line, then a longer one, and counts: 0 1 2 3 4 5 6 7 8 9 10 11 12.
Question: how many apples are left when 3 of 12 are eaten? Answer: 9 apples are left, because 12 - 3 = 9.

A good answer is clear, correct and kind. A bad answer is vague, wrong and rude.
Step 1: read the question.
Step 2: work it out, 7 * 8 = 56.
Step 3: say the answer. The answer is 56.

Über den Dächern liegt Schnee; le café est fermé, mañana también. 日本語のテキスト、そして数字 123。 Привет, мир! 🙂
def add(a, b):
    return a + b

It's what we'd call a test: don't stop, they've said, I'm here. The user asks and the assistant answers.
system user assistant tool hello there how are you today fine thanks and you tell me about the weather in the city
"""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# Chat templates in the manner of each family, with `tools` and a switch `thinking` of our own.
_CHATML = (
    "{%- if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{%- if thinking is defined and thinking %}{{ '<|im_start|>thinking\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3_CHAT = (
    "{{- bos_token }}{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{%- if thinking is defined and thinking %}{{ 'thinking\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_INST_CHAT = (
    "{{- bos_token }}{%- if tools %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}"
    "{%- if thinking is defined and thinking %}{{ '[THINK]' }}{% endif %}"
    "{%- for message in messages %}{%- if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{%- else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{%- endfor %}"
)
_PLAIN_CHAT = (
    "{%- if tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{%- if thinking is defined and thinking %}{{ 'thinking\n' }}{% endif %}"
    "{%- for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# kind -> bos, eos, dedicated pad, unk, other special tokens, chat template, whether a text starts with bos
_KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        unk=None,
        template=_LLAMA3_CHAT,
        extra=["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        add_bos=True,
    ),
    "qwen": dict(
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        unk=None,
        template=_CHATML,
        extra=["<|im_start|>"],
        add_bos=False,
    ),
    "mistral": dict(
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        template=_INST_CHAT,
        extra=["[INST]", "[/INST]"],
        add_bos=True,
    ),
    "gemma": dict(
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        template="{{- bos_token }}"
        + _CHATML.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>"),
        extra=["<start_of_turn>", "<end_of_turn>"],
    ),
    "gpt2": dict(
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|pad|>",
        unk=None,
        template=_PLAIN_CHAT,
        extra=[],
        add_bos=False,
    ),
    "bert": dict(
        bos=None,
        eos=None,
        pad="[PAD]",
        unk="[UNK]",
        template=_PLAIN_CHAT,
        extra=["[CLS]", "[SEP]", "[MASK]"],
        add_bos=False,
    ),
}


def _byte_level(split: str | None, normalizer: normalizers.Normalizer | None, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: `split` is the pre-tokeniser's pattern, ``None`` for GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _sentencepiece(prepend: bool, specials: list[str], vocab_size: int) -> Tokenizer:
    """SentencePiece-style BPE with byte fallback: specials, 256 byte tokens, then what was learned."""
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prepend else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizer
    learned.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, max_token_length=8)
    learned.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    spec = json.loads(learned.to_str())["model"]
    # Rare letters stay out of the vocabulary, as in the real ones, so that byte fallback happens.
    rare = {token for token in spec["vocab"] if any(ord(char) > 0x2FF and char != "▁" for char in token)}
    merges = [tuple(pair) for pair in spec["merges"] if "".join(pair) not in rare and not rare & set(pair)]
    pieces = [token for token in sorted(spec["vocab"], key=spec["vocab"].get) if token not in rare]
    order = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(order))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    if not prepend:  # Gemma
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    strip = [decoders.Strip(content=" ", left=1)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _wordpiece(specials: list[str], vocab_size: int) -> Tokenizer:
    """BERT's WordPiece: lower-cased, [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    return tokenizer


@functools.cache
def _backend(kind: str, with_pad: bool) -> str:
    """The trained `tokenizers` object as JSON; training happens once a process."""
    spec = _KINDS[kind]
    named = [spec["unk"], spec["bos"], spec["eos"], spec["pad"] if with_pad else None, *spec["extra"]]
    specials = list(dict.fromkeys(token for token in named if token))
    if kind == "llama":
        tokenizer = _byte_level(_LLAMA3_SPLIT, None, 500)
    elif kind == "qwen":
        tokenizer = _byte_level(_QWEN_SPLIT, normalizers.NFC(), 500)
    elif kind == "gpt2":
        tokenizer = _byte_level(None, None, 500)
    elif kind == "bert":
        tokenizer = _wordpiece(specials, 400)
    else:
        tokenizer = _sentencepiece(kind == "mistral", specials, 300)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if spec["add_bos"]:
        bos = spec["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def tiny_tokenizer(kind: str = "llama", pad: str | None = "dedicated", chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens put together like a real family's.

    Args:
        kind (`str`): one of `TOKENIZER_KINDS`. "llama" is Llama 3 (byte-level BPE, bos), "qwen" byte-level without
            bos, "mistral" Llama 2 / Mistral (SentencePiece style, byte fallback, bos), "gemma", "gpt2", and "bert"
            (WordPiece, closes a text with [SEP], has no eos).
        pad (`str` or `None`): "dedicated" a token of its own, "eos" the eos token, ``None`` no pad token.
        chat (`bool`): whether it has a chat template (with `tools` and a switch `thinking`).
    """
    spec = _KINDS[kind]
    if pad == "eos" and spec["eos"] is None:
        raise ValueError(f"the {kind} tokenizer has no eos token to pad with")
    pad_token = {"dedicated": spec["pad"], "eos": spec["eos"], None: None}[pad]
    extra = {}
    if kind == "bert":
        extra = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind, pad == "dedicated")),
        bos_token=spec["bos"],
        eos_token=spec["eos"],
        pad_token=pad_token,
        unk_token=spec["unk"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **extra,
    )
    tokenizer.chat_template = spec["template"] if chat else None
    return tokenizer
