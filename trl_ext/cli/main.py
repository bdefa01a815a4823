"""The top level of the `trl-ext` command: it finds the command, shows its help, and turns errors into one line.

It imports neither torch nor trl. A command is the module `trl_ext.cli.<name>` (with underscores for dashes) with a
`main(argv)`; it is imported when you ask for it and parses its own arguments. The top level does not know what a
command does.
"""

import argparse
import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable

import trl_ext
from trl_ext.cli.common.logs import quiet_noise
from trl_ext.cli.common.options import short_help
from trl_ext.logs import show_logs


COMMANDS = {
    "reward": "Train a reward model from pairs or K-way rankings.",
    "orm": "Train an outcome reward model: was the answer right?",
    "prm": "Train a process reward model: is this step right?",
    "segment": "Train rewards for segments of a text, in one or more categories.",
    "ensemble": "Train an ensemble of reward models on one base in one run.",
    "dense-grpo": "Train a policy with rewards of steps, segments or tokens (GRPO).",
    "ppo": "Train a policy with PPO and a critic, all models on one base.",
    "ranked-dpo": "Train a policy on rankings or pairs (DPO), without a reward model.",
    "score": "Score the rows of a JSONL file with a reward model.",
    "evaluate": "Find out whether a reward model is any good, and where it is biased.",
    "label-preferences": "Let a judge label pairs or rankings; resumable.",
    "label-steps": "Label the steps of solutions by rollouts that a verifier judges.",
    "rejection-sample": "Generate completions, score them, keep the best; resumable.",
    "best-of-n": "Write the best of n completions of each prompt, by scores or a vote.",
    "choose": "Choose which rows of a pool to annotate next.",
    "self-instruct": "Let a model make up tasks from a few seeds, as rows to train on.",
    "weak-to-strong": "Train a strong model on a weak one's labels; report the gap recovered.",
    "merge": "Merge an adapter into its base, or average several reward models.",
    "serve-info": "Print the command by which vLLM serves reward models; starts nothing.",
    "plugins": "List what is registered and which distribution it comes from.",
    "demo": "Train and compare reward models of several kinds, offline, on this machine.",
    "bench": "Measure time and memory of training, scoring and sampling on this machine.",
}

# Commands with many runs in one display: of our log lines they show warnings only, the others information too.
QUIET = {"trl-ext demo", "trl-ext bench", "trl-ext weak-to-strong"}

# What a user can do after Ctrl-C.
_AGAIN = "What is finished is kept. Run the same command again to continue."
_FROM_CHECKPOINT = "Saved checkpoints are kept: --resume_from_checkpoint true goes on from the last one."
AFTER_INTERRUPT = {
    **{f"trl-ext {name}": _AGAIN for name in ("score", "rejection-sample", "best-of-n", "weak-to-strong", "demo")},
    **{f"trl-ext {name}": _AGAIN for name in ("label-preferences", "label-steps", "self-instruct")},
    **{f"trl-ext {name}": _FROM_CHECKPOINT for name in ("reward", "orm", "prm", "segment", "ensemble")},
    **{f"trl-ext {name}": _FROM_CHECKPOINT for name in ("dense-grpo", "ppo", "ranked-dpo")},
}

# Set this environment variable to see the traceback of an error that is otherwise shown as one line.
TRACEBACK = "TRL_EXT_TRACEBACK"


def module_of(command: str) -> str:
    """The module of a command, e.g. `trl_ext.cli.rejection_sample` of `rejection-sample`."""
    return f"trl_ext.cli.{command.replace('-', '_')}"


def make_parser() -> argparse.ArgumentParser:
    """The top-level parser, which lists the commands with one line each. Every command has its own parser."""
    width = max(len(name) for name in COMMANDS)
    listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-ext",
        usage="trl-ext [-h] [--version] COMMAND ...",
        description="Reward models from rankings, on top of TRL.",
        epilog=f"commands:\n{listing}\n\n'trl-ext COMMAND --help' shows the options of one command. An error in your "
        f"input is one line;\n{TRACEBACK}=1 in the environment shows its traceback.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-ext {trl_ext.__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: the exit status: 0 if no command is given (the help is shown), else the status from [`guarded`].

    Raises:
        SystemExit: with status 2 for an unknown command or option, as in argparse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    command, rest = argv[0], argv[1:]
    if command.startswith("-"):
        parser.parse_args([command])  # --help and --version exit; any other option is an error
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        parser.error(f"unknown command '{command}': {hint}Commands: {', '.join(COMMANDS)}.")
    if "--help-all" in rest:
        full = [argument for argument in rest if argument != "--help-all"]
        return guarded(f"trl-ext {command}", importlib.import_module(module_of(command)).main, [*full, "--help"])
    if {"-h", "--help", "--help-all"} & set(rest):
        text = short_help(command, COMMANDS[command], rest)
        if text is not None:
            print(text, end="")
            return 0
    return guarded(f"trl-ext {command}", lambda argv: _run(command, argv), rest)


def _run(command: str, argv: list[str]) -> int | None:
    from trl_ext.cli.common.early import UsageError, check_names  # help needs none of it

    try:
        check_names(command, argv)
    except UsageError as error:
        print(f"trl-ext {command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return importlib.import_module(module_of(command)).main(argv)


def guarded(prog: str, command: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """
    Run a command and turn errors in the user's input into one line on standard error.

    An error counts as one in the input if trl_ext defines its class, if our code itself raised it as a `ValueError` or
    `ImportError`, or if it is an `OSError` (a missing file, an unknown repository). Any other error is a bug in
    trl_ext or in a library and keeps its traceback. If the reader of standard output leaves (`| head`), the command
    ends silently. After Ctrl-C it ends with the line "interrupted" and, if the command can be continued, how.

    Args:
        prog (`str`):
            Start of the line, e.g. `"trl-ext score"`.
        command (`Callable`):
            The `main` of a command.
        argv (`list[str]`, *optional*):
            Its arguments. Defaults to those of the process.

    Returns:
        `int`: the exit status: the command's own, 1 after an error, 130 after Ctrl-C, or 141 (as for a process that
        SIGPIPE ends) if the reader has left.
    """
    quiet_noise()
    # a display of many runs has no room for the start of each
    show_logs(default=logging.WARNING if prog in QUIET else logging.INFO)
    try:
        status = command(argv) or 0
        sys.stdout.flush()
        return status
    except Exception as error:
        ours = _raised_here(error)
        if isinstance(error, BrokenPipeError) and ours:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise flushing the rest at exit fails
            return 141
        named = _is_of_files(error) or type(error).__module__.startswith("trl_ext.")
        expected = named or (ours and isinstance(error, (ValueError, ImportError)))
        if os.environ.get(TRACEBACK) or not expected:
            raise
        print(f"{prog}: error: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        hint = AFTER_INTERRUPT.get(prog)
        _close_bars()
        print(f"{prog}: interrupted" if hint is None else f"\n{prog}: interrupted. {hint}", file=sys.stderr)
        return 130


def _close_bars() -> None:
    """Close tqdm's bars, which would draw themselves again below the last line."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def _is_of_files(error: Exception) -> bool:
    """Whether the system refused a file, e.g. a missing path or a full disk (safetensors has its own error class)."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "(os error " in str(error))


def _raised_here(error: Exception) -> bool:
    """Whether the innermost Python frame is in our code: it raised the error, or called C code that did."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].startswith("trl_ext.")


if __name__ == "__main__":
    sys.exit(main())
