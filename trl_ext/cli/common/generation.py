"""Arguments of the commands that generate: the policy, the sampling, the backend, and the reward functions.

This module maps command-line flags to pipeline arguments. `trl_ext.pipelines.generation.sampling` declares the flags
of sampling. It does not know what a pipeline does with the arguments.
"""

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl_ext.pipelines.generation.sampling import Sampling, SamplingFields
from trl_ext.pipelines.stages.row_file import read_rows


# Arguments for requests to a server
SERVER = ("server_base_url", "server_timeout", "max_concurrency", "max_retries", "api_key_variable")


def described(text: str) -> dict[str, str]:
    """The metadata of a field with this help text."""
    return {"help": text}


@dataclass(kw_only=True)
class WriterArguments(SamplingFields):
    """Arguments of a command that generates texts. Here `few_shot` is the path of a file."""

    model_name_or_path: str = field(
        metadata=described("folder or Hub id of the policy; for the backend openai, the model's name on the server")
    )
    few_shot: str | None = field(
        default=None,
        metadata=described("JSONL file of examples (prompt, completion) that the model sees before each prompt"),
    )
    seed: int = field(default=0, metadata=described("random seed of the generation"))

    backend: Literal["transformers", "vllm", "openai"] = field(
        default="transformers",
        metadata=described("generate in this process, on a vLLM server, or on any OpenAI-compatible server"),
    )
    generation_batch_size: int = field(
        default=32, metadata=described("completions in a batch, for the backend transformers")
    )
    model_revision: str | None = field(default=None, metadata=described("revision of the model on the Hub"))
    dtype: str | None = field(
        default=None, metadata=described("dtype of the policy, e.g. bfloat16 (default: as saved)")
    )
    attn_implementation: str | None = field(default=None, metadata=described("e.g. sdpa, flash_attention_2"))
    load_in_4bit: bool = field(default=False, metadata=described("load the policy in NF4 with bitsandbytes"))
    trust_remote_code: bool = field(default=False, metadata=described("run code that comes with the model"))

    server_base_url: str = field(
        default="http://localhost:8000", metadata=described("URL of the server; separate several with commas")
    )
    server_timeout: float = field(
        default=240.0, metadata=described("seconds to wait for the server to start, and for each answer")
    )
    max_concurrency: int = field(default=64, metadata=described("requests in flight at a time, over all servers"))
    max_retries: int = field(default=6, metadata=described("how often a failed request is repeated"))
    api_key_variable: str | None = field(
        default=None, metadata=described("environment variable that holds the server's key")
    )

    def __post_init__(self) -> None:
        for name in ("generation_kwargs", "chat_template_kwargs"):
            setattr(self, name, json_object(name, getattr(self, name)))


@dataclass(kw_only=True)
class GenerationArguments(WriterArguments):
    """Arguments of a command that generates completions and scores them."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata=described(
            "folders or Hub ids of reward models, names of trl.rewards (accuracy_reward ...), judges (judge.yaml), or "
            "functions: package.module.function or file.py:function"
        ),
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=described("one weight for each reward function (default: 1)")
    )


def json_object(name: str, value: dict | str | None) -> dict | None:
    """Parse an argument that is JSON on the command line. Raises `ValueError` if it is not a JSON object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"--{name} is {value!r}, which is not valid JSON ({error}). Needed: a JSON object."
            ) from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"--{name} is {value!r}; needed: a JSON object.")
    return value


def sampling_kwargs(args: WriterArguments) -> dict[str, Any]:
    """The fields of [`Sampling`]; `few_shot` holds the examples read from its file."""
    sampling = {item.name: getattr(args, item.name) for item in fields(Sampling)}
    if args.few_shot is not None:
        sampling["few_shot"] = read_rows(args.few_shot)
    return sampling


def server_kwargs(args: WriterArguments) -> dict[str, Any] | None:
    """The server's arguments, or `None` when the policy generates in this process."""
    return None if args.backend == "transformers" else {name: getattr(args, name) for name in SERVER}


def model_init_kwargs(args: WriterArguments) -> dict[str, Any]:
    """The command's arguments for `from_pretrained`."""
    kwargs: dict[str, Any] = {
        "revision": args.model_revision,
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code or None,
    }
    if args.load_in_4bit:
        kwargs["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": args.dtype or "bfloat16",
        }
    return {name: value for name, value in kwargs.items() if value is not None}
