"""A tokenizer and a Llama-style model that are built in code, in milliseconds and without a network.

The demo trains on them, and benches, examples and smoke runs borrow them. Every byte of a text is one token, so any
text in any script can be encoded without loss; beginning, end and padding have separate tokens. It knows no task.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

# Enough for chat rows in examples; the demo itself uses plain text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds a byte-level tokenizer: 256 bytes and `<pad>`, `<bos>`, `<eos>`, which are three different tokens.

    A plain text gets `<bos>` at its start and nothing at its end, as with Llama's tokenizer.

    Example:

    >>> tokenizer = tiny_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(tokenizer("2*3=6")["input_ids"])
    ['<bos>', '2', '*', '3', '=', '6']
    """
    specials = [PAD, BOS, EOS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(
    *, hidden_size: int = 96, num_layers: int = 2, num_heads: int = 4, max_position_embeddings: int = 2048
) -> LlamaConfig:
    """
    A Llama configuration that fits [`tiny_tokenizer`]; the defaults are the demo's policy (0.25 M parameters).

    Args:
        hidden_size (`int`, *optional*, defaults to `96`):
            Width; the feed-forward layers are 8/3 of it, rounded up to a multiple of 32.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        max_position_embeddings (`int`, *optional*, defaults to `2048`):
            The longest sequence.
    """
    tokenizer = tiny_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def tiny_model(seed: int = 0, **config_kwargs) -> LlamaForCausalLM:
    """An untrained model of [`tiny_config`], the same for the same seed. Sets the global seeds, as a trainer does."""
    set_seed(seed)
    return LlamaForCausalLM(tiny_config(**config_kwargs)).eval()


def tiny_reward_base(path: str | Path, *, seed: int = 0, **config_kwargs) -> str:
    """
    Saves an untrained tiny language model and its tokenizer: a base for reward models that needs no network.

    Args:
        path (`str` or `Path`):
            The folder to write to. It is created if it is missing, and files of the same names are replaced.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        config_kwargs:
            Passed to [`tiny_config`].

    Returns:
        `str`: The folder, for `from_pretrained` and trainers.
    """
    tiny_tokenizer().save_pretrained(path)
    tiny_model(seed, **config_kwargs).save_pretrained(path)
    return str(path)
