"""Makes generation backends by name, and lists what the completions of each depend on.

`transformers_backend`, `vllm_backend` and `openai_backend` do the work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.models.fingerprint import model_identity, tokenizer_identity
from trl_ext.pipelines.generation.generator import GenerationError, Generator
from trl_ext.pipelines.generation.openai_backend import OpenAIGenerator
from trl_ext.pipelines.generation.sampling import BACKENDS, Backend, Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, tokenizer_in_memory
from trl_ext.pipelines.generation.vllm_backend import VLLMGenerator
from trl_ext.pipelines.stages.values import plain
from trl_ext.serving.server_pool import Advice, ServerPool


_ADVICE = Advice(
    address="Start it, or correct server_base_url; give a slow start more time with server_timeout.",
    key="Name the environment variable that holds its key in api_key_variable.",
    slow="For a slow server raise server_timeout or lower max_concurrency.",
    refused="Correct the argument or the prompt that it names; leave arguments that it does not know at their "
    "defaults.",
    again="When it is back, run the same again; what was stored is kept.",
)


def make_generator(
    model: Any,
    backend: Backend = "transformers",
    sampling: Sampling | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    generation_batch_size: int = 32,
    model_init_kwargs: dict[str, Any] | None = None,
    server_base_url: str | Sequence[str] = "http://localhost:8000",
    server_timeout: float = 240.0,
    max_concurrency: int = 64,
    max_retries: int = 6,
    api_key_variable: str | None = None,
) -> Generator:
    """
    Make a backend by its name.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Folder or Hub id, full model or adapter; for `"transformers"` also a model in memory. For `"vllm"` the
            folder or id that the server serves, whose tokenizer is used here; for `"openai"` the server's name for it.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` generates in this process. `"vllm"` sends token ids to `vllm serve`. `"openai"` sends
            texts and messages to any OpenAI-compatible server.
        sampling ([`Sampling`], *optional*): how to sample.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the model's.
        generation_batch_size (`int`, *optional*, defaults to `32`): completions in a batch, in this process.
        model_init_kwargs (`dict`, *optional*): for `from_pretrained` (`dtype`, `revision`, `quantization_config` ...).
        server_base_url (`str` or sequence of `str`, *optional*): URL of the server, with or without `/v1`. Give
            several servers with the same model as a list or separated by commas. They get requests in turn; if one
            dies, the others continue.
        server_timeout (`float`, *optional*, defaults to `240.0`): seconds to wait for a server to start, and for the
            answer to a request.
        max_concurrency (`int`, *optional*, defaults to `64`): requests at a time, over all servers.
        max_retries (`int`, *optional*, defaults to `6`): how often a request is repeated after 429, 5xx, a broken
            connection, a time-out or an unreadable answer. The waits are 0.5, 1, 2 ... seconds, or as long as the
            server asks.
        api_key_variable (`str`, *optional*): name of the environment variable that holds the server's key.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; needed: one of {', '.join(BACKENDS)}.")
    sampling = sampling or Sampling()
    if backend == "transformers":
        return TransformersGenerator(model, sampling, processing_class, generation_batch_size, model_init_kwargs)
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"backend={backend!r} cannot take a {type(model).__name__}, because the server loads the weights. Give "
            "the folder or id of the model that it serves."
        )
    servers = ServerPool(
        server_base_url, server_timeout, max_concurrency, max_retries, api_key_variable, GenerationError, _ADVICE
    )
    if backend == "openai":
        return OpenAIGenerator(servers, str(model), sampling)
    init = model_init_kwargs or {}
    tokenizer = processing_class or AutoTokenizer.from_pretrained(
        model, revision=init.get("revision"), trust_remote_code=init.get("trust_remote_code", False)
    )
    return VLLMGenerator(servers, model, sampling, tokenizer)


def model_of_backend(
    model: Any, backend: str, init: dict[str, Any], processing_class: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """The model's entries in a manifest: the content of its folder, or the name and revision that a server has."""
    identity: dict[str, Any] = {}
    if backend == "transformers" or not isinstance(model, (str, Path)) or Path(model).is_dir():
        identity["content"] = model_identity(model, init.get("revision"))
    else:
        identity["name"] = str(model)
    if processing_class is None and not isinstance(model, (str, Path)):
        processing_class = tokenizer_in_memory(model, init)  # a folder's key covers its tokenizer
    if processing_class is not None:
        identity["tokenizer"] = tokenizer_identity(processing_class)
    identity |= {name: value for name, value in plain(init).items() if name not in ("device_map", "token")}
    return identity
