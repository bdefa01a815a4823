"""The arguments of a trainer: from flags and a YAML file to TRL's dataclasses, and from those to the trainer.

It knows dataclasses, flags, YAML and the names of the trainers. It loads no data and trains nothing.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
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


class ArgumentsError(ValueError):
    """What was given on the command line or in a config file cannot be used; the message says what to do."""


class Parser(TrlParser):
    """
    TRL's parser, with four differences: a mistake raises [`ArgumentsError`] with one line and the nearest name,
    `--config=FILE` works beside `--config FILE`, an unquoted `no` in YAML (which is false there) means `"no"` for
    arguments that have this choice, such as `eval_strategy`, and dataclasses may share a name: it sets the field of
    the first, and the others keep their defaults.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        types = dataclass_types if isinstance(dataclass_types, (tuple, list)) else [dataclass_types]
        with _the_first_owns_a_name(types):
            super().__init__(types, **kwargs)

    def error(self, message: str) -> None:
        raise ArgumentsError(message)

    def parse_args_and_config(self, args: Iterable[str] | None = None) -> tuple[Any, ...]:
        """
        The dataclasses, from flags and the file behind `--config`; a flag wins over the file.

        Raises:
            [`ArgumentsError`]: an unknown name, or a value that cannot be used.
            `OSError`, `yaml.YAMLError`: the file cannot be read.
        """
        path, rest = config_path(args)
        return self.parse_values({} if path is None else read_config(path), rest, path or "")

    def parse_values(self, values: dict[str, Any], flags: Sequence[str] = (), source: str = "") -> tuple[Any, ...]:
        """
        The dataclasses, from the values of a config, which flags override.

        Args:
            values (`dict`): argument to value. `env` holds environment variables, which are set.
            flags (`Sequence[str]`): a command line.
            source (`str`): where the values are from, for errors.
        """
        values = dict(values)
        environment = values.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ArgumentsError(f"{source}: env is {environment!r}; needed: names and values of variables.")
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
    """Inside, the parser does not see a field whose name an earlier dataclass has."""
    owners: dict[str, Any] = {}
    hidden = []
    for field in (field for kind in types for field in fields(kind) if field.init):
        if owners.setdefault(field.name, field) is not field:
            field.init = False
            hidden.append(field)
    try:
        yield
    finally:
        for field in hidden:
            field.init = True


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence with the nearest of some names, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def config_path(args: Iterable[str] | None) -> tuple[str | None, list[str]]:
    """The file that `--config` names, and the other arguments. `None` stands for those of the process."""
    rest = list(sys.argv[1:] if args is None else args)
    for place, arg in enumerate(rest):
        name, equals, value = arg.partition("=")
        if name == "--config" and equals:
            return value, rest[:place] + rest[place + 1 :]
        if arg == "--config":
            if place + 1 == len(rest):
                raise ArgumentsError("--config names no file.")
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
    """Raise [`ArgumentsError`] for a value that is none of those named: argparse checks flags, and no config file."""
    for arguments in parsed:
        for name, hint in get_type_hints(type(arguments)).items():
            hints = (hint, *get_args(hint))  # `Literal[...]` itself, or in a union with None
            known = [value for one in hints if get_origin(one) is Literal for value in get_args(one)]
            value = getattr(arguments, name, None)  # a field with init=False may be unset
            if known and value is not None and value not in known:
                raise ArgumentsError(f"{name}={value!r} is not known. Needed: one of {', '.join(map(str, known))}.")


def types_of(config_class: type[RewardConfig]) -> tuple[type, ...]:
    """The dataclasses of a command that trains, in the order in which they are parsed."""
    return ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig


def build_trainer(
    trainer_class: type[Trainer],
    training_args: RewardConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
) -> Trainer:
    """The trainer with the model, quantization and adapter that its arguments name."""
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


def check_resume(resume: str | bool | None, output_dir: Path) -> None:
    """Raise `FileNotFoundError` if there is no checkpoint to resume from."""
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
