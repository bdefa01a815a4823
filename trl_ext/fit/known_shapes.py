"""Architectures of a few public models by their Hub id, so that memory can be measured and estimated without the Hub.

The numbers are the fields of each model's published `config.json`. It knows transformers' configs and downloads
nothing.
"""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig


_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_QWEN25 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, tied: bool, **more: int) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    return dict(zip(names, (hidden, intermediate, layers, heads, tied), strict=True)) | more


KNOWN_SHAPES = {
    "meta-llama/Llama-3.1-8B": _LLAMA3 | _sizes(4096, 14336, 32, 32, False),
    "meta-llama/Llama-3.2-1B": _LLAMA3 | _sizes(2048, 8192, 16, 32, True, head_dim=64),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, True),
    "Qwen/Qwen2.5-7B": _QWEN25 | _sizes(3584, 18944, 28, 28, False, num_key_value_heads=4, vocab_size=152064),
    "Qwen/Qwen2.5-1.5B": _QWEN25 | _sizes(1536, 8960, 28, 12, True, num_key_value_heads=2, vocab_size=151936),
    "Qwen/Qwen2.5-0.5B": _QWEN25 | _sizes(896, 4864, 24, 14, True, num_key_value_heads=2, vocab_size=151936),
}
"""Hub id -> fields of the config. Variants of the same shape (`-Instruct`, `-Base`) are found by the plain name."""


def config_of(model: str) -> tuple[PretrainedConfig, str]:
    """
    The config of a model by its folder or Hub id, and a sentence that says where it comes from.

    Raises:
        `ValueError`: neither a folder with a `config.json` nor a model of the table.
    """
    if Path(model, "config.json").is_file():
        return AutoConfig.from_pretrained(model), f"config.json in {model}"
    plain = model
    for suffix in ("-Instruct", "-Base", "-it"):
        plain = plain.removesuffix(suffix)
    plain = plain.replace("/Meta-Llama", "/Llama")
    if plain not in KNOWN_SHAPES:
        raise ValueError(
            f"{model} is neither a folder with a config.json nor one of the models whose shape is known here "
            f"({', '.join(KNOWN_SHAPES)}). Nothing is downloaded: name a folder with a config.json or one of these."
        )
    fields = dict(KNOWN_SHAPES[plain])
    return AutoConfig.for_model(fields.pop("model_type"), **fields), f"the published config of {plain}, built in"
