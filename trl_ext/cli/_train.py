"""What the commands that train share: TRL's flags, a model, data, a run, what is saved.

The flow is that of TRL's `reward` script with the trainer and config of a command. Knows arguments; trains nothing
itself.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints


if TYPE_CHECKING:
    from transformers import Trainer
    from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, ScriptArguments, TrlParser


def train_parser(config_class: "type[RewardConfig]", prog: str | None) -> "TrlParser":
    """TRL's parser over `ScriptArguments`, our `config_class`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    types = (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig)
    return TrlParser(types, prog=prog, allow_abbrev=False)


def parse(parser: "TrlParser", argv: list[str] | None) -> tuple[Any, ...]:
    """What the arguments say, one object for each of the parser's types; a mistake ends the command in one line."""
    from yaml import YAMLError

    try:
        parsed = parser.parse_args_and_config(argv)
        _check_choices(parsed)
        return parsed
    except (ValueError, OSError, YAMLError) as error:  # unknown flags and keys, values of a wrong kind, no such file
        parser.error(" ".join(str(error).split()))


def _check_choices(parsed: tuple[Any, ...]) -> None:
    """Raise `ValueError` for a value of a config file that is none of those named: argparse sees only flags."""
    for arguments in parsed:
        for name, hint in get_type_hints(type(arguments)).items():
            hints = (hint, *get_args(hint))  # `Literal[...]` itself, or in a union with None
            known = [value for one in hints if get_origin(one) is Literal for value in get_args(one)]
            value = arguments.__dict__.get(name)
            if known and value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is not known. Needed: one of {', '.join(map(str, known))}.")


def train_main(parser: "TrlParser", trainer_class: "type[Trainer]", argv: list[str] | None) -> int:
    """Parse, train and save. `argv` defaults to the arguments of the process. Returns the exit status."""
    train(trainer_class, *parse(parser, argv))
    return 0


def train(
    trainer_class: "type[Trainer]",
    script_args: "ScriptArguments",
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Load the data, train, save, and push to the Hub where asked to.

    Raises:
        ValueError: if no model or no dataset was named, or a split does not exist.
        FileNotFoundError: if there is no checkpoint to resume from.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("No model was named. Give `--model_name_or_path` a Hub id or a folder.")
    _check_resume(training_args.resume_from_checkpoint, Path(training_args.output_dir))
    train_dataset, eval_dataset = _load(script_args, dataset_args, training_args.eval_strategy != "no")
    trainer = build_trainer(trainer_class, training_args, model_args, train_dataset, eval_dataset)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved the reward model to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def _check_resume(resume: str | bool | None, output_dir: Path) -> None:
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={resume!r} is not a folder (seen from {Path.cwd()}). Needed: a checkpoint-<step> "
            "that a run saved, or in a config file true for the last one in output_dir."
        )
    if resume is True and not any(output_dir.glob("checkpoint-*")):
        raise FileNotFoundError(
            f"resume_from_checkpoint=True, and {output_dir} has no checkpoint-<step>. Leave it out to start from the "
            "beginning."
        )


def build_trainer(
    trainer_class: "type[Trainer]",
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    train_dataset: Any,
    eval_dataset: Any = None,
) -> "Trainer":
    """The trainer of a command, with the model, quantization and adapter that its arguments name."""
    from trl import get_peft_config, get_quantization_config

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        return trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except ValueError as error:  # of transformers or PEFT too: here it is about what was given
        raise ValueError(str(error)) from error


def _load(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", evaluate: bool) -> tuple[Any, Any]:
    """The split to train on, and the one to evaluate on or `None`."""
    from accelerate.logging import get_logger
    from trl import get_dataset

    from trl_ext.data.sources import file_format, load_source, select_split

    if dataset_args.datasets:
        if script_args.dataset_name:
            get_logger(__name__).warning("Both `datasets` and `dataset_name` were given: `dataset_name` is ignored.")
        for source in dataset_args.datasets:
            builder = file_format(source.path)
            if builder is not None:
                source.path, source.data_files = builder, source.path
        splits = get_dataset(dataset_args)
    elif script_args.dataset_name:
        splits = load_source(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    else:
        raise ValueError("No data was named. Give `--dataset_name` a Hub id, a folder or a file, or set `datasets`.")
    train_dataset = select_split(splits, script_args.dataset_train_split, "--dataset_train_split")
    if not evaluate:
        return train_dataset, None
    return train_dataset, select_split(splits, script_args.dataset_test_split, "--dataset_test_split")
