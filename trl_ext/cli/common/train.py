"""The steps that all training commands share: parse arguments, load data, build the trainer, train, save.

The steps follow TRL's `reward` script. The module knows arguments and data sources. It does not know how a trainer
trains.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.cli.common.options import command_parser, parse


if TYPE_CHECKING:
    from transformers import Trainer
    from trl import DatasetMixtureConfig, ModelConfig, RewardConfig

    from trl_ext.trainers.common.command_line import DataArguments, Parser


def train_parser(config_class: "type[RewardConfig]", prog: str | None) -> "Parser":
    """The parser over `DataArguments`, our `config_class`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext.trainers.common.command_line import types_of

    return command_parser(types_of(config_class), prog)


def train_main(parser: "Parser", trainer_class: "type[Trainer]", argv: list[str] | None) -> int:
    """Parse, train and save. `argv` defaults to the arguments of the process. Returns the exit status."""
    train(trainer_class, *parse(parser, argv))
    return 0


def train(
    trainer_class: "type[Trainer]",
    script_args: "DataArguments",
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Load the data, train, save, and push to the Hub if `push_to_hub` is set.

    Raises:
        ValueError: if the arguments name no model or no data set, or a split that does not exist.
        FileNotFoundError: if there is no checkpoint to resume from.
    """
    from trl_ext.logs import show_logs
    from trl_ext.trainers.common.command_line import build_trainer, check_resume
    from trl_ext.trainers.common.console import show_important_metrics

    if model_args.model_name_or_path is None:
        raise ValueError("No model was named. Give `--model_name_or_path` a Hub id or a folder.")
    if training_args.log_level != "passive" or not training_args.should_log:  # the user's, or another process
        show_logs(training_args.get_process_log_level())
    check_resume(training_args.resume_from_checkpoint, Path(training_args.output_dir))
    evaluate = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, dataset_args, evaluate, training_args.seed)
    trainer = build_trainer(trainer_class, training_args, model_args, train_dataset, eval_dataset)
    show_important_metrics(trainer)
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # all metrics
    trainer.accelerator.print(f"Saved the model to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def load_data(
    script_args: "DataArguments", dataset_args: "DatasetMixtureConfig", evaluate: bool, seed: int
) -> tuple[Any, Any]:
    """Return the split to train on and the split to evaluate on, or `None` for the latter."""
    from accelerate.logging import get_logger
    from trl import get_dataset

    from trl_ext.data.sources import file_format, load_source, select_split

    # the share is split off below, because TRL's own split does not take a seed
    share, dataset_args.test_split_size = dataset_args.test_split_size, None
    streaming = script_args.dataset_streaming
    if dataset_args.datasets:
        if script_args.dataset_name:
            get_logger(__name__).warning("Both `datasets` and `dataset_name` were given: `dataset_name` is ignored.")
        for source in dataset_args.datasets:
            builder = file_format(source.path)
            if builder is not None:
                source.path, source.data_files = builder, source.path
        splits, streaming = get_dataset(dataset_args), dataset_args.streaming
    elif script_args.dataset_name:
        splits = load_source(script_args.dataset_name, script_args.dataset_config, streaming)
    else:
        raise ValueError("No data was named. Give `--dataset_name` a Hub id, a folder or a file, or set `datasets`.")
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    train_dataset = select_split(splits, train_name, "--dataset_train_split")
    if share is not None:
        if streaming:
            raise ValueError(
                "--test_split_size needs all rows at once, but a stream gives them one by one. Leave out "
                "--test_split_size or the streaming."
            )
        if test_name in splits:
            raise ValueError(
                f"--test_split_size makes a split {test_name!r}, but the data set already has one. Leave out "
                "--test_split_size, or choose another name with --dataset_test_split."
            )
        size = int(share) if share >= 1 else share  # a number of rows, or a share of them
        parts = train_dataset.train_test_split(test_size=size, seed=seed)
        train_dataset, splits = parts["train"], {test_name: parts["test"]}
    train_dataset = script_args.converted(train_dataset)
    if not evaluate:
        return train_dataset, None
    return train_dataset, script_args.converted(select_split(splits, test_name, "--dataset_test_split"))
