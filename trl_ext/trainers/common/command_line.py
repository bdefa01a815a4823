"""The command line of the commands that train: flags and a YAML file become TRL's dataclasses, and those a trainer.

It knows dataclasses, flags, YAML and the names of the trainers. It loads no data and trains nothing. The arguments
that have no effect on a reward model are listed in `inherited_arguments.py`.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import Trainer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    RewardConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_ext.data.recipes import convert, find_recipe


class ArgumentsError(ValueError):
    """A value on the command line or in a config file cannot be used. The message says what to do."""


class Parser(TrlParser):
    """
    TRL's parser with four differences:

    - A mistake raises [`ArgumentsError`] with one line and the nearest known name.
    - `--config=FILE` works as well as `--config FILE`.
    - YAML reads an unquoted `no` as false. For arguments that have the choice `"no"`, such as `eval_strategy`, the
      parser takes it as `"no"`.
    - Several dataclasses may have a field of the same name. The argument sets the field of the first one; the others
      keep their defaults.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        types = dataclass_types if isinstance(dataclass_types, (tuple, list)) else [dataclass_types]
        with _the_first_owns_a_name(types):
            super().__init__(types, **kwargs)

    def error(self, message: str) -> None:
        raise ArgumentsError(message)

    def parse_args_and_config(self, args: Iterable[str] | None = None) -> tuple[Any, ...]:
        """
        The dataclasses, from the flags and from the file that `--config` names. A flag wins over the file.

        Raises:
            [`ArgumentsError`]: an unknown name, or a value that cannot be used.
            `OSError`, `yaml.YAMLError`: the file cannot be read.
        """
        path, rest = config_path(args)
        return self.parse_values({} if path is None else read_config(path), rest, path or "")

    def parse_values(self, values: dict[str, Any], flags: Sequence[str] = (), source: str = "") -> tuple[Any, ...]:
        """
        The dataclasses, from the values of a config file and from flags. A flag wins over a value of the file.

        Args:
            values (`dict`): the value of each argument. `env` is a mapping of environment variables that are set.
            flags (`Sequence[str]`): a command line.
            source (`str`): the file that the values come from, for error messages.
        """
        values = dict(values)
        environment = values.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ArgumentsError(f"{source}: env is {environment!r}. Needed: a mapping of variables to values.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        known = {action.dest: action for action in self._actions if action.dest != "help"}
        for name, value in values.items():
            if name not in known:
                raise ArgumentsError(f"{source}: unknown argument {name!r}.{nearest(str(name), known)}")
            if value is False and "no" in (known[name].choices or ()):
                values[name] = "no"
        self.set_defaults_with_config(**values)
        with _the_first_owns_a_name(self.dataclass_types):
            *parsed, rest = self.parse_args_into_dataclasses(list(flags), return_remaining_strings=True)
        if rest:
            name = rest[0].split("=")[0]
            raise ArgumentsError(f"unknown argument {name!r}.{nearest(name, [f'--{known}' for known in known])}")
        check_choices(parsed)
        return tuple(parsed)


@contextmanager
def _the_first_owns_a_name(types: Iterable[type]) -> Iterator[None]:
    """Hide a field from the parser while an earlier dataclass has a field of the same name."""
    owners: dict[str, Any] = {}
    hidden = []
    for one in (one for kind in types for one in fields(kind) if one.init):
        if owners.setdefault(one.name, one) is not one:
            one.init = False
            hidden.append(one)
    try:
        yield
    finally:
        for one in hidden:
            one.init = True


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that suggests the nearest of the names, or an empty string."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def config_path(args: Iterable[str] | None) -> tuple[str | None, list[str]]:
    """The file that `--config` names, and the other arguments. With `None` it reads the arguments of the process."""
    rest = list(sys.argv[1:] if args is None else args)
    for place, arg in enumerate(rest):
        name, equals, value = arg.partition("=")
        if name == "--config" and equals:
            return value, rest[:place] + rest[place + 1 :]
        if arg == "--config":
            if place + 1 == len(rest):
                raise ArgumentsError("--config names no file. Give the path of a YAML file after it.")
            return rest[place + 1], rest[:place] + rest[place + 2 :]
    return None, rest


def read_config(path: str) -> dict[str, Any]:
    """The values of a YAML file."""
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise ArgumentsError(f"{path} must contain a YAML mapping: lines such as `model_name_or_path: NAME`.")
    return values


def check_choices(parsed: Iterable[Any]) -> None:
    """Raise [`ArgumentsError`] for a value outside its choices. (argparse checks flags only, not a config file.)"""
    for arguments in parsed:
        for name, hint in get_type_hints(type(arguments)).items():
            hints = (hint, *get_args(hint))  # `Literal[...]` itself, or in a union with None
            known = [value for one in hints if get_origin(one) is Literal for value in get_args(one)]
            value = getattr(arguments, name, None)  # a field with init=False may be unset
            if known and value is not None and value not in known:
                raise ArgumentsError(f"{name}={value!r} is not known. Needed: one of {', '.join(map(str, known))}.")


@dataclass
class DataArguments(ScriptArguments):
    """TRL's arguments of a script that trains, and the format of a public data set."""

    dataset_format: str | None = field(
        default=None,
        metadata={"help": "the rows are a public data set as released, e.g. prm800k or hh_rlhf: convert them"},
    )

    def __post_init__(self) -> None:
        if self.dataset_format is not None:
            find_recipe(self.dataset_format)

    def converted(self, dataset: Any) -> Any:
        """The data set with our columns."""
        return dataset if self.dataset_format is None else convert(dataset, self.dataset_format)


@dataclass
class PolicyArguments(DataArguments):
    """Arguments of a command that trains a policy: where its rewards come from."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "reward functions (package.function, file.py:function, a name of trl.rewards) and models"},
    )
    dense_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "rewards of parts of a completion: process, segment and outcome models, or functions"},
    )
    share_base: bool = field(
        default=True, metadata={"help": "put reward adapters that were trained on the policy's base onto that base"}
    )


@dataclass
class PPOArguments(PolicyArguments):
    """Arguments of `trl-ext ppo`: those of a policy, and what the critic starts from."""

    value_model: str | None = field(
        default=None, metadata={"help": "reward model or saved critic that the critic starts from"}
    )


def types_of(config_class: type[RewardConfig]) -> tuple[type, ...]:
    """The dataclasses of a command that trains, in the order in which the parser reads them."""
    return DataArguments, config_class, ModelConfig, DatasetMixtureConfig


def build_trainer(
    trainer_class: type[Trainer],
    training_args: RewardConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    **more: Any,
) -> Trainer:
    """Make the trainer, with the model, quantization and adapter that its arguments name; `more` goes to it as is."""
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
            **more,
        )
    except ValueError as error:  # transformers and PEFT raise it too; here it is always about the user's arguments
        raise ValueError(str(error)) from error


def check_resume(resume: str | bool | None, output_dir: Path) -> None:
    """Raise `FileNotFoundError` if there is no checkpoint to resume from."""
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={resume!r} is not a folder (seen from {Path.cwd()}). Needed: a checkpoint-<step> "
            "folder that a run saved. In a config file, true takes the last one in output_dir."
        )
    if resume is True and not any(output_dir.glob("checkpoint-*")):
        raise FileNotFoundError(
            f"resume_from_checkpoint=True, but {output_dir} has no checkpoint-<step> folder. Leave "
            "resume_from_checkpoint out to start from the beginning."
        )
