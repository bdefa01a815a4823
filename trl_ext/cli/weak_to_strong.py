"""`trl-ext weak-to-strong`: train a strong model on a weak model's labels, and report the gap that this recovers.

`--task preference|outcome|process|generation` chooses the trainer and its arguments. TRL's flags for LoRA and
quantization apply to the strong model. The weak model trains all weights unless you add `--weak_use_peft`.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_ext.cli.common.options import command_parser, parse


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser

CONFIGS = {
    "preference": "RewardConfig",
    "outcome": "ORMConfig",
    "process": "PRMConfig",
    "generation": "WeakToStrongConfig",
}


@dataclass
class WeakModelArguments:
    """
    Settings of the weak model that differ from those of the strong one.

    Args:
        weak_use_peft (`bool`, *optional*, defaults to `False`): train the weak model with the same LoRA arguments.
        weak_load_in_4bit (`bool`, *optional*, defaults to `False`): load the weak model's base in 4 bits.
    """

    weak_use_peft: bool = field(default=False, metadata={"help": "Train the weak model with LoRA too."})
    weak_load_in_4bit: bool = field(default=False, metadata={"help": "Load the weak model in 4 bits."})


def task_of(argv: list[str]) -> str:
    """The task from `--task` or from the file of `--config`. The task decides which arguments exist."""
    import yaml

    first = argparse.ArgumentParser("trl-ext weak-to-strong", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--task")
    given, _ = first.parse_known_args(argv)
    task = given.task
    if task is None and given.config is not None:
        with open(given.config, encoding="utf-8") as file:
            values = yaml.safe_load(file)
        task = values.get("task") if isinstance(values, dict) else None  # the parser reports errors in the file
    task = "process" if task == "steps" else task  # its former name
    return task if task in list(CONFIGS) else "preference"


def make_parser(prog: str | None = "trl-ext weak-to-strong", task: str = "preference") -> "Parser":
    """The parser over the arguments of the data, the experiment, the task's trainer and the models."""
    from trl import ModelConfig

    import trl_ext
    from trl_ext.trainers.common.command_line import DataArguments

    types = (
        DataArguments,
        trl_ext.WeakToStrongArguments,
        getattr(trl_ext, CONFIGS[task]),
        WeakModelArguments,
        ModelConfig,
    )
    return command_parser(types, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from yaml import YAMLError

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        task = task_of(argv)
    except (OSError, ValueError, YAMLError):  # the parser reads the file again and reports the error
        task = "preference"
    parts = parse(make_parser(task=task), argv)
    run(*parts)
    return 0


def weak_model_config(model: Any, weak: WeakModelArguments) -> Any:
    """The strong model's config with the settings of the weak model in their place."""
    config = copy.copy(model)
    config.use_peft, config.load_in_8bit, config.load_in_4bit = weak.weak_use_peft, False, weak.weak_load_in_4bit
    return config


def run(data: Any, config: Any, args: Any, weak: WeakModelArguments, model: Any) -> None:
    """Load the data, run the experiment, and print its table and the path of the report."""
    from trl import get_peft_config, get_quantization_config

    from trl_ext import weak_to_strong
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.stages.progress import Progress, ended

    if not data.dataset_name:
        raise ValueError("No data was named. Give `--dataset_name` a Hub id, a folder or a file.")
    if model.model_name_or_path is not None or model.model_revision not in (None, "main"):
        raise ValueError(
            "--model_name_or_path and --model_revision name one model, but this command needs two. Give "
            "--weak_model_name_or_path and --strong_model_name_or_path; for another revision, give its folder."
        )
    if data.dataset_streaming:
        raise ValueError("--dataset_streaming is set, but splitting the rows by prompt needs all rows. Leave it out.")
    args.model_init_kwargs = {
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    splits = load_source(data.dataset_name, data.dataset_config)
    train = select_split(splits, data.dataset_train_split, "--dataset_train_split")
    split = data.dataset_test_split
    # 'test' is the default; if the data set has no such split, a share of the prompts is held out
    test = None if split == "test" and split not in splits else select_split(splits, split, "--dataset_test_split")
    train, test = data.converted(train), None if test is None else data.converted(test)
    weak_model = weak_model_config(model, weak)
    args.disable_tqdm = True  # Progress shows every run instead
    with Progress() as progress:
        report = weak_to_strong(
            config,
            args,
            train,
            test,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
            weak_peft_config=get_peft_config(weak_model),
            weak_quantization_config=get_quantization_config(weak_model),
            on_start=lambda stage: progress.start(stage.title),
            on_progress=lambda stage, share: progress.update(stage.title, share),
            on_end=lambda stage, outcome: progress.finish(stage.title, ended(stage.title, outcome)),
        )
    print(report.markdown())
    print(f"The report is in {args.output_dir}: report.json, report.md, report.png.")


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext_main

    sys.exit(trl_ext_main(["weak-to-strong", *sys.argv[1:]]))
