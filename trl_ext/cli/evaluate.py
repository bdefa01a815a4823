"""`trl-ext evaluate`: find out whether a reward model is any good: accuracy, biases, calibration, best-of-n.

It knows arguments. What is computed, and from which columns, is said in [`~trl_ext.evaluate_reward_model`].
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import json_object, sampling_kwargs
from trl_ext.cli.common.options import command_parser, parse, report_to_wandb
from trl_ext.pipelines.generation.sampling import SamplingFields
from trl_ext.pipelines.stages.one_process import check_one_process


if TYPE_CHECKING:
    from trl_ext.evaluation import EvaluationReport
    from trl_ext.trainers.common.command_line import Parser


@dataclass
class EvaluateArguments(SamplingFields):
    """Arguments of `trl-ext evaluate`; how the policy is sampled is what the other commands call it."""

    dataset_name: str = field(
        metadata={"help": "file (.jsonl, .json, .parquet, .csv), folder, or Hub id of the rows to evaluate on"}
    )
    output_dir: str = field(metadata={"help": "folder for evaluation.json, .md, .html and the pictures"})
    model: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the reward model (full or adapter), or of an ensemble"},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "in place of --model: a function, as `module.function` or `file.py:function`"},
    )
    compare: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a second model that is tested against the first one"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    dataset_split: str | None = field(
        default=None, metadata={"help": "split to read (default: test, validation or train, the first that is there)"}
    )
    dataset_format: str | None = field(
        default=None,
        metadata={"help": "the rows are a public data set as released, e.g. helpsteer3 or rewardbench: convert them"},
    )
    samples: str | None = field(
        default=None,
        metadata={"help": "JSONL file of the policy's own samples (prompt, completions): would the model teach it?"},
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "in place of --samples: folder or Hub id of the policy; it is sampled with the options at the end"
        },
    )
    policy_prompts: int = field(default=64, metadata={"help": "prompts of the data set that the policy answers"})
    num_generations: int = field(default=8, metadata={"help": "samples of the policy for each prompt"})
    backend: Literal["transformers", "vllm", "openai"] = field(
        default="transformers", metadata={"help": "where the policy runs: in this process, or on a server"}
    )
    server_base_url: str = field(default="http://localhost:8000", metadata={"help": "the server of the policy"})
    generation_batch_size: int = field(
        default=32, metadata={"help": "samples of the policy in a batch, in this process"}
    )
    cluster_column: str | None = field(
        default=None, metadata={"help": "column that says which rows are not independent, e.g. a conversation"}
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "text prompts and completions become chat messages, as in the public benchmarks' own code"},
    )
    max_rows: int | None = field(default=None, metadata={"help": "take only the first rows"})
    probes: bool = field(
        default=True,
        metadata={"help": "run the bias probes: change one feature of a completion and see what the score does"},
    )
    probe_rows: int = field(
        default=200, metadata={"help": "rows whose completions the bias probes change, drawn at random"}
    )
    resamples: int = field(default=2_000, metadata={"help": "bootstrap resamples for the intervals"})
    seed: int = field(
        default=0, metadata={"help": "seed of the bootstrap, of the rows for the probes, and of the policy's samples"}
    )
    batch_size: str = field(default="auto", metadata={"help": "rows of a batch, or auto: by tokens"})
    max_length: int | None = field(default=None, metadata={"help": "cut rows to so many tokens"})
    device: str | None = field(default=None, metadata={"help": "e.g. cpu or cuda:1"})
    base_model: str | None = field(default=None, metadata={"help": "where the base of an adapter is now, if it moved"})
    calibrated: bool = field(default=False, metadata={"help": "evaluate scores as the stored calibration gives them"})
    calibrate: Literal["temperature", "isotonic"] | None = field(
        default=None, metadata={"help": "fit a calibration on half of the prompts and store it with --model"}
    )
    update_model_card: bool = field(
        default=False, metadata={"help": "put the results into the model card (README.md) of --model"}
    )
    report_to: Literal["none", "wandb"] = field(
        default="none", metadata={"help": "wandb: put numbers and tables on a run"}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.reward_funcs is None):
            raise ValueError("Found both or neither of --model and --reward_funcs; needed: one of them.")
        if self.reward_funcs is not None and len(self.reward_funcs) != 1:
            raise ValueError(
                f"--reward_funcs names {len(self.reward_funcs)} functions; needed: one. Evaluate several one by one, "
                "or together as the folder of an ensemble."
            )
        given = scorer_kwargs(self)
        if given and self.model is None and self.compare is None:
            raise ValueError(
                f"Found --{', --'.join(given)} with --reward_funcs alone; needed: a model that is loaded with it. "
                "Leave it out, or give --model or --compare."
            )
        if self.dataset_format is not None:
            from trl_ext.data.recipes import find_recipe

            find_recipe(self.dataset_format)
        stored = [name for name in ("update_model_card", "calibrate") if getattr(self, name)]
        if stored and (self.model is None or not Path(self.model).is_dir()):
            raise ValueError(f"--{stored[0]} writes into the folder of --model, which is {self.model!r}.")
        if self.calibrate is not None and not Path(self.model, "reward_model.json").is_file():
            raise ValueError(
                f"--calibrate stores into reward_model.json, and {self.model} has none; needed: a single model saved "
                "by trl_ext. Calibrate the members of an ensemble one by one."
            )
        if self.calibrated and self.calibrate is not None:
            raise ValueError(
                "Found --calibrated and --calibrate; needed: one of them. A calibration is fitted on scores that are "
                "not calibrated yet: leave out --calibrated."
            )
        if self.policy is not None and self.samples is not None:
            raise ValueError("Found --policy and --samples; needed: one of them. Samples need no policy.")
        for name in ("policy_prompts", "num_generations", "generation_batch_size", "resamples", "probe_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; needed: 1 or more.")
        for name in ("generation_kwargs", "chat_template_kwargs"):
            setattr(self, name, json_object(name, getattr(self, name)))
        if self.batch_size != "auto":
            if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
                raise ValueError(f"--batch_size is {self.batch_size!r}; needed: auto, or a number of rows >= 1.")
            self.batch_size = int(self.batch_size)


def make_parser(prog: str | None = "trl-ext evaluate") -> "Parser":
    """The parser over `EvaluateArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(EvaluateArguments, prog, __doc__)


def run(args: EvaluateArguments) -> "EvaluationReport":
    """Read the rows, evaluate, write the report. What is wrong in the arguments fails before scoring."""
    check_one_process("evaluate")
    from trl_ext.evaluation import evaluate_reward_model
    from trl_ext.scoring.calibration import store_calibration

    dataset: Any = _rows(args.dataset_name, args.dataset_config, args.dataset_split)
    if args.dataset_format is not None:
        from trl_ext.data.recipes import convert

        dataset = convert(dataset, args.dataset_format)
    if args.samples is not None:
        dataset = {"data": dataset, "samples": _rows(args.samples, None, None)}
    elif args.policy is not None:
        dataset = {"data": dataset, "samples": _policy_samples(args, dataset)}
    report = evaluate_reward_model(
        args.model if args.reward_funcs is None else _function(args.reward_funcs[0]),
        dataset,
        output_dir=args.output_dir,
        compare=args.compare,
        seed=args.seed,
        probes=args.probes,
        probe_rows=args.probe_rows,
        cluster_column=args.cluster_column,
        as_chat=args.as_chat,
        resamples=args.resamples,
        max_rows=args.max_rows,
        **scorer_kwargs(args),
    )
    if args.calibrate is not None:
        if args.calibrate not in report.calibrations:
            raise ValueError(
                f"These rows determine no {args.calibrate} calibration; needed: preference or outcome rows of which "
                "the model gets some, but not all, right."
            )
        store_calibration(args.model, report.calibrations[args.calibrate])
    if args.update_model_card:
        report.update_model_card(args.model)
    return report


def _policy_samples(args: EvaluateArguments, dataset: Any) -> list[dict[str, Any]]:
    from trl_ext.evaluation.items import family_of, read_item
    from trl_ext.pipelines.policy_samples import draw_prompts, policy_samples

    family = family_of(dataset.column_names)
    rows = itertools.islice(dataset, args.max_rows) if args.max_rows else dataset
    prompts = (read_item(row, index, family, signed=True).prompt for index, row in enumerate(rows))
    kwargs: dict[str, Any] = {"generation_batch_size": args.generation_batch_size}
    if args.backend != "transformers":
        kwargs = {"server_base_url": args.server_base_url}
    return policy_samples(
        args.policy,
        draw_prompts(prompts, args.policy_prompts, args.seed),
        Path(args.output_dir, "policy_samples.jsonl"),
        args.num_generations,
        seed=args.seed,
        backend=args.backend,
        backend_kwargs=kwargs,
        **sampling_kwargs(args),
    )


def _rows(name: str, config: str | None, split: str | None) -> Any:
    from trl_ext.data.sources import load_source, select_split

    splits = load_source(name, config)
    if split is None:
        split = next((known for known in ("test", "validation", "train") if known in splits), next(iter(splits)))
    return select_split(splits, split, "--dataset_split")


def _function(name: str) -> Callable:
    from trl_ext.pipelines.reward_functions import load_reward

    return load_reward(name)


def scorer_kwargs(args: EvaluateArguments) -> dict[str, Any]:
    """The options that were given for the models that are loaded here: --model and --compare."""
    names = ("batch_size", "max_length", "device", "base_model", "calibrated")
    options = {name: getattr(args, name) for name in names}
    return {name: value for name, value in options.items() if value not in (None, "auto", False)}


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    report = run(args)
    report.print()
    report_to_wandb("evaluate", args, report.log_to_wandb)
    print(f"\nThe report is in {args.output_dir}: open evaluation.html in a browser.")
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["evaluate", *sys.argv[1:]]))
