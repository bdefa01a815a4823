"""`trl-ext rejection-sample`: generate completions, score them, keep the best; interrupted and resumed at any moment.

It knows arguments. The stages are those of [`~trl_ext.rejection_sample`]; `--stage` runs one of them alone. Standard
output gets a report as JSON, with the path of the selected rows.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ._train import parse


if TYPE_CHECKING:
    from trl import TrlParser


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RejectionSampleArguments:
    """Arguments of `trl-ext rejection-sample`."""

    model_name_or_path: str = field(
        metadata=_help("folder or Hub id of the policy; for the backend openai its name there")
    )
    dataset_name: str = field(metadata=_help("Hub id, folder or file of rows with a prompt"))
    output_dir: str = field(metadata=_help("where completions, scores and selected rows are kept"))
    reward_funcs: list[str] | None = field(
        default=None,
        metadata=_help(
            "folders or Hub ids of reward models, names of trl.rewards (accuracy_reward ...), paths of functions"
        ),
    )
    reward_weights: list[float] | None = field(default=None, metadata=_help("one for each of them (default: 1)"))
    stage: Literal["all", "generate", "score", "select"] = field(
        default="all", metadata=_help("run one stage alone; it needs what those before it made")
    )
    dataset_config: str | None = field(default=None, metadata=_help("configuration of a Hub dataset"))
    dataset_split: str = field(default="train", metadata=_help("split of the dataset"))

    selection: str = field(default="top_per_prompt", metadata=_help("a selector; trl-ext plugins lists them"))
    selection_kwargs: dict | str | None = field(default=None, metadata=_help("its options, as JSON"))
    drop_truncated: bool = field(
        default=False, metadata=_help("never select a completion that was cut at max_completion_length")
    )

    num_generations: int = field(default=8, metadata=_help("completions of each prompt"))
    max_completion_length: int = field(default=512, metadata=_help("longest completion in tokens"))
    temperature: float = field(default=1.0, metadata=_help("of the sampling"))
    top_p: float = field(default=1.0, metadata=_help("nucleus; 1: off"))
    top_k: int = field(default=0, metadata=_help("most likely tokens to keep; 0: off"))
    min_p: float | None = field(
        default=None, metadata=_help("least probability, scaled by that of the likeliest token")
    )
    repetition_penalty: float = field(default=1.0, metadata=_help("1: off"))
    stop: list[str] | None = field(default=None, metadata=_help("texts that end a completion"))
    generation_kwargs: dict | str | None = field(
        default=None, metadata=_help("further arguments of the backend, as JSON")
    )
    chat_template: str | None = field(default=None, metadata=_help("path of a Jinja template in place of the model's"))
    chat_template_kwargs: dict | str | None = field(default=None, metadata=_help("arguments of the template, as JSON"))
    system_prompt: str | None = field(
        default=None, metadata=_help("put before chats without a system message; not kept in the rows")
    )
    few_shot: str | None = field(
        default=None, metadata=_help("JSONL file of examples (prompt, completion) that the model sees first")
    )
    seed: int = field(default=0, metadata=_help("of the generation"))

    backend: Literal["transformers", "vllm", "openai"] = field(
        default="transformers",
        metadata=_help("in this process, a vLLM server through TRL's client, or any OpenAI-compatible server"),
    )
    generation_batch_size: int = field(default=32, metadata=_help("completions in a batch, in this process"))
    shard_size: int = field(default=64, metadata=_help("prompts that are generated and stored at a time"))
    model_revision: str | None = field(default=None, metadata=_help("revision of the model on the Hub"))
    dtype: str | None = field(default=None, metadata=_help("of the policy, e.g. bfloat16 (default: as saved)"))
    attn_implementation: str | None = field(default=None, metadata=_help("e.g. sdpa, flash_attention_2"))
    load_in_4bit: bool = field(default=False, metadata=_help("load the policy in NF4 with bitsandbytes"))
    trust_remote_code: bool = field(default=False, metadata=_help("run code that comes with the model"))

    server_base_url: str = field(default="http://localhost:8000", metadata=_help("where the server is"))
    server_timeout: float = field(default=240.0, metadata=_help("seconds to wait for it, and for an answer"))
    max_concurrency: int = field(default=64, metadata=_help("requests that are under way at a time"))
    max_retries: int = field(default=6, metadata=_help("of a request to an OpenAI-compatible server"))
    api_key_variable: str | None = field(
        default=None, metadata=_help("environment variable that holds the server's key")
    )

    def __post_init__(self) -> None:
        for name in ("selection_kwargs", "generation_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except ValueError as error:
                    raise ValueError(f"--{name} is no valid JSON ({error}): {value}") from error
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"--{name} is {value!r}; needed: a JSON object.")
            setattr(self, name, value)
        if self.reward_funcs is None and self.stage != "generate":
            raise ValueError(f"--stage {self.stage} needs --reward_funcs.")


SERVER = ("server_base_url", "server_timeout", "max_concurrency", "max_retries", "api_key_variable")


def make_parser(prog: str | None = "trl-ext rejection-sample") -> "TrlParser":
    """TRL's parser over `RejectionSampleArguments`: flags, or `--config x.yaml` with the same names."""
    from trl import TrlParser

    return TrlParser(RejectionSampleArguments, prog=prog, allow_abbrev=False, description=__doc__.split("\n\n")[0])


def run(args: RejectionSampleArguments) -> dict[str, Any] | None:
    """Run the stages that were asked for. Returns the report of the selection, if there is one."""
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.generation import Sampling
    from trl_ext.pipelines.rejection_sampling import RejectionSampler

    splits = load_source(args.dataset_name, args.dataset_config)
    sampling = {item.name: getattr(args, item.name) for item in fields(Sampling)}
    if args.few_shot is not None:
        with open(args.few_shot, encoding="utf-8") as file:
            sampling["few_shot"] = [json.loads(line) for line in file if line.strip()]
    sampler = RejectionSampler(
        args.model_name_or_path,
        args.reward_funcs,
        select_split(splits, args.dataset_split, "--dataset_split"),
        args.output_dir,
        args.num_generations,
        args.seed,
        args.backend,
        reward_weights=args.reward_weights,
        shard_size=args.shard_size,
        generation_batch_size=args.generation_batch_size,
        model_init_kwargs=model_init_kwargs(args),
        server=None if args.backend == "transformers" else {name: getattr(args, name) for name in SERVER},
        **sampling,
    )
    if args.stage in ("all", "generate"):
        sampler.generate()
    if args.stage in ("all", "score"):
        sampler.score()
    if args.stage in ("all", "select"):
        selected = sampler.select(args.selection, args.selection_kwargs, args.drop_truncated)
        return selected.report | {"path": str(selected.path)}
    return None


def model_init_kwargs(args: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained` among those of a command."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    report = run(args)
    if report is not None:
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    from .main import main as trl_ext

    sys.exit(trl_ext(["rejection-sample", *sys.argv[1:]]))
