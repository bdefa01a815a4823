"""Options of commands: parsers over dataclasses, and a short help that is read from the dataclasses' source.

The short help imports neither torch nor trl: it reads the fields of our dataclasses from their files, and names the
options of TRL and transformers that most runs use. It knows dataclasses and their help texts. It does not know what a
command does with them.
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl_ext


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser

PACKAGE = Path(trl_ext.__file__).parent
ENSEMBLE = "trainers/ensemble/config.py"
GENERATION = "trainers/weak_to_strong/config.py:WeakToStrongConfig"
WEAK_TO_STRONG = "pipelines/weak_to_strong/config.py:WeakToStrongArguments"
DATA = "trainers/common/command_line.py:DataArguments"
TRAINED = {
    "reward": "trainers/ranking/config.py:RewardConfig",
    "orm": "trainers/token/orm_config.py:ORMConfig",
    "prm": "trainers/token/prm_config.py:PRMConfig",
    "segment": "trainers/token/segment_config.py:SegmentRewardConfig",
}
POLICIES = {
    "dense-grpo": ("trainers/policy/config.py:DenseGRPOConfig", "trainers/common/command_line.py:PolicyArguments"),
    "ppo": ("trainers/policy/ppo_config.py:PPOConfig", "trainers/common/command_line.py:PPOArguments"),
    "ranked-dpo": ("trainers/policy/ranked_dpo_config.py:RankedDPOConfig", DATA),
}
TASKS = {"preference": "reward", "outcome": "orm", "steps": "prm", "process": "prm"}
ASKED_FIRST = {
    "model_name_or_path": "folder or Hub id of the model to train",
    "dataset_name": "file, folder or Hub id of the rows",
    "output_dir": "folder for checkpoints and the trained model",
}
# one of these is needed too, which a dataclass cannot say
NEEDED_TOO = {"evaluate": ("model", "reward_funcs")}
# options of TRL, PEFT and transformers that most runs set; `--help-all` has their own help and defaults
USED_MOST = {
    "dataset_train_split": "split to train on (default: train)",
    "dataset_test_split": "split to evaluate on (default: test)",
    "test_split_size": "hold out this share, or number, of the rows to evaluate on",
    "max_length": "tokens of a prompt with its completion; longer rows are dropped and counted",
    "per_device_train_batch_size": "rows in a batch of one device",
    "gradient_accumulation_steps": "batches in an optimizer step",
    "learning_rate": "the highest learning rate",
    "num_train_epochs": "passes over the data",
    "max_steps": "optimizer steps, in place of epochs",
    "use_peft": "train LoRA adapters (and the head of a reward model) in place of all weights",
    "lora_r": "rank of LoRA",
    "lora_target_modules": "layers with adapters, e.g. all-linear",
    "load_in_4bit": "NF4 base (QLoRA)",
    "dtype": "of the weights, e.g. bfloat16 or float32",
    "bf16": "bf16 autocast",
    "gradient_checkpointing": "compute activations twice in place of keeping them",
    "eval_strategy": "no, steps or epoch",
    "eval_steps": "optimizer steps between evaluations",
    "save_steps": "optimizer steps between checkpoints",
    "logging_steps": "optimizer steps between log lines",
    "report_to": "where metrics go, e.g. wandb",
    "run_name": "name of the run there",
    "log_level": "what is logged: warning, info, debug",
    "resume_from_checkpoint": "checkpoint-<step> folder to go on from",
    "seed": "of new weights, the order of rows and dropout",
}


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of an option, unless there is none or the help names it already."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, max_help_position=36, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, "", [], {}) or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".lstrip()


# ------------------------------------------------------------------------------------------------------------- parsers
def command_parser(types: Any, prog: str | None, description: str | None = None) -> "Parser":
    """The parser of a command, made from its dataclasses. The first paragraph of `description` starts its help."""
    from trl_ext.trainers.common.command_line import Parser

    text = description.split("\n\n")[0] if description else None
    parser = Parser(types, prog=prog, allow_abbrev=False, description=text, formatter_class=HelpFormatter)
    parser.format_help = lambda: full_help(parser)
    return parser


def parse(parser: "Parser", argv: list[str] | None) -> tuple[Any, ...]:
    """Reads the arguments into one object for each dataclass. A mistake ends the command with one line."""
    from yaml import YAMLError

    try:
        return parser.parse_args_and_config(argv)
    except (ValueError, OSError, YAMLError) as error:  # unknown names, values of a wrong kind, no such file
        text = " ".join(str(error).split())
        if "use_cpu" in text:  # transformers' advice leaves out bf16, which TRL turns on
            text += " On a CPU add: --use_cpu --bf16 false"
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from error


def full_help(parser: "Parser") -> str:
    """The help of every option: ours first, then those of TRL, then those of transformers."""
    owners = {"trl_ext": "options", "trl": "options of TRL", "transformers": "options of transformers"}
    groups: dict[str, list[argparse.Action]] = {title: [] for title in owners.values()}
    for action in parser._actions:
        package = next((p for kind in parser.dataclass_types if (p := owner_of(kind, action.dest))), "trl_ext")
        groups[owners.get(package, "options of transformers")].append(action)
    shown = _empty(parser.prog, parser.description, parser.epilog)
    for title, actions in groups.items():
        group = shown.add_argument_group(title)
        if title == "options":
            group.add_argument("--config", metavar="FILE", help="YAML file with the same names; flags win over it")
        for action in actions:
            group._add_action(action)
    return shown.format_help()


def owner_of(kind: type, name: str) -> str | None:
    """The package of the class that defines a field; `None` if the dataclass has no such field."""
    for base in kind.__mro__:
        if name in inspect.get_annotations(base):  # the class's own annotations, without those of its bases
            return base.__module__.split(".")[0]
    return None


def _empty(prog: str | None, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--NAME VALUE ...]",
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        add_help=False,
    )


# ---------------------------------------------------------------------------------------------------------- short help
@dataclass
class Option:
    """A field of a dataclass as it stands in the source. The `default` of a required field is `MISSING`."""

    name: str
    help: str
    default: Any
    choices: tuple[Any, ...] | None


MISSING = object()


def places_of(command: str, argv: Iterable[str] = ()) -> tuple[str, ...]:
    """The dataclasses of ours with the options of a command, as file:class; none if the command's parser is light."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--kind", default="reward")
    first.add_argument("--task", default="preference")
    chosen, _ = first.parse_known_args([arg for arg in argv if arg not in ("-h", "--help", "--help-all")])
    kind = chosen.kind if chosen.kind in TRAINED else "reward"
    names = {"reward": "Reward", "orm": "ORM", "prm": "PRM", "segment": "Segment"}
    trained = GENERATION if chosen.task == "generation" else TRAINED[TASKS.get(chosen.task, "reward")]
    return {
        **{name: (place, DATA) for name, place in TRAINED.items()},
        **POLICIES,
        "ensemble": (f"{ENSEMBLE}:{names[kind]}EnsembleConfig", DATA),
        "score": ("cli/common/score_arguments.py:ScoreArguments",),
        "evaluate": ("cli/evaluate.py:EvaluateArguments",),
        "label-preferences": ("cli/label_preferences.py:LabelPreferencesArguments",),
        "rejection-sample": ("cli/rejection_sample.py:RejectionSampleArguments",),
        "self-instruct": ("cli/self_instruct.py:SelfInstructArguments",),
        "label-steps": ("cli/label_steps.py:LabelStepsArguments",),
        "best-of-n": ("cli/best_of_n.py:BestOfNArguments",),
        "choose": ("cli/choose.py:ChooseArguments",),
        "weak-to-strong": (WEAK_TO_STRONG, trained, DATA, "cli/weak_to_strong.py:WeakModelArguments"),
    }.get(command, ())


def short_help(command: str, description: str, argv: Iterable[str] = ()) -> str | None:
    """The short help of a command; `None` if the command's own parser is light."""
    places = places_of(command, argv)
    if not places:
        return None
    ours: dict[str, Option] = {}
    for place in places:
        for name, option in options_of(place).items():
            ours.setdefault(name, option)  # the first dataclass owns a name, as in the parser
    trains = command in TRAINED or command in POLICIES or command in ("ensemble", "weak-to-strong")
    epilog = None
    if trains:
        epilog = f"'trl-ext {command} --help-all' lists every option, those of TRL and transformers too."
    if command == "ensemble":
        epilog = f"--kind {{{','.join(TRAINED)}}} says what the members are (default: reward). {epilog}"
    shown = _empty(f"trl-ext {command}", description, epilog)
    first = shown.add_argument_group("start here")
    first.add_argument("--config", metavar="FILE", help="YAML file with the same names; flags win over it")
    if trains:
        for name, text in ASKED_FIRST.items():
            if not (command == "weak-to-strong" and name == "model_name_or_path"):
                first.add_argument(f"--{name}", help=text, metavar=name.split("_")[0].upper())
    group = shown.add_argument_group("options of this command")
    for option in ours.values():
        needed = option.default is MISSING or option.name in NEEDED_TOO.get(command, ())
        _show(first if needed else group, option)
    if trains:
        group = shown.add_argument_group("options of TRL and transformers that most runs use")
        for name, text in USED_MOST.items():
            absent = "test_split_size" if command == "weak-to-strong" else "max_length" if command in POLICIES else ""
            if name not in ours and name != absent:
                group.add_argument(f"--{name}", help=text, metavar="")
    return shown.format_help()


def _show(group: Any, option: Option) -> None:
    default = None if option.default in (MISSING, False) else option.default
    choices = None if option.choices is None else "{" + ",".join(map(str, option.choices)) + "}"
    group.add_argument(f"--{option.name}", help=option.help, default=default, metavar=choices or "")


def options_of(place: str) -> dict[str, Option]:
    """
    Reads the fields of a dataclass, and of its bases in this package, from the source: name to [`Option`].
    """
    file, name = place.split(":")
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name: f"{node.module.removeprefix('trl_ext.').replace('.', '/')}.py:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_ext.")
        for alias in node.names
    }
    found: dict[str, Option] = {}
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and isinstance(node.target, ast.Name):
            found[node.target.id] = _option(node.target.id, node.annotation, node.value)
    for base in classes[name].bases:
        where = ast.unparse(base)
        place = f"{file}:{where}" if where in classes else imported.get(where)
        found = found | {k: v for k, v in options_of(place).items() if k not in found} if place else found
    return found


def _option(name: str, annotation: ast.expr, call: ast.Call) -> Option:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    metadata, text = given.get("metadata"), ""
    if len(call.args) == 2:  # described(default, "...")
        given["default"], text = call.args[0], ast.literal_eval(call.args[1])
    elif isinstance(metadata, ast.Call):  # field(metadata=described("..."))
        text = ast.literal_eval(metadata.args[0])
    elif metadata is not None:
        text = ast.literal_eval(metadata)["help"]
    default = MISSING
    if "default" in given:
        default = ast.literal_eval(given["default"])
    elif isinstance(given.get("default_factory"), ast.Lambda):
        default = ast.literal_eval(given["default_factory"].body)
    elif "default_factory" in given:
        default = {"list": [], "dict": {}}[ast.unparse(given["default_factory"])]
    choices = None
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            choices = ast.literal_eval(node.slice)
            choices = choices if isinstance(choices, tuple) else (choices,)
    return Option(name, text, default, choices)


def report_to_wandb(job_type: str, args: Any, log: Callable[[], Any]) -> None:
    """With `--report_to wandb`, call `log` while a Weights & Biases run of the command with its arguments is open."""
    if args.report_to == "wandb":
        import wandb

        with wandb.init(job_type=job_type, config=vars(args)):
            log()
