"""The top level of the `trl-ext` command: which commands there are, and nothing of what they do.

It imports neither torch nor trl. A command is the module `trl_ext.cli.<name>` with a `main(argv)`; it is imported when
it is asked for and parses its own arguments.
"""

import argparse
import difflib
import importlib
import sys

import trl_ext


COMMANDS = {
    "reward": "Train a reward model from pairs or K-way rankings.",
    "orm": "Train an outcome reward model: was the answer right?",
    "prm": "Train a process reward model: is this step right?",
    "segment": "Train rewards for segments of a text, in one or more categories.",
    "score": "Score the rows of a JSONL file with a reward model.",
    "merge": "Merge an adapter into the base it was trained on.",
    "plugins": "List what is registered and which distribution it comes from.",
    "demo": "Train and test a Plackett-Luce reward model, offline, on this machine.",
    "bench": "Measure a step of our trainer beside TRL's own in one process.",
}


def make_parser() -> argparse.ArgumentParser:
    """The top-level parser. It knows the commands' names and one line about each; their options are their own."""
    width = max(len(name) for name in COMMANDS)
    listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-ext",
        usage="trl-ext [-h] [--version] COMMAND ...",
        description="Reward models from rankings, on top of TRL.",
        epilog=f"commands:\n{listing}\n\n'trl-ext COMMAND --help' shows the options of one command.",
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
        `int`: the exit status: 0 for success (also when no command is given: the help is shown), else what the command
        returned.

    Raises:
        SystemExit: with status 2 on an unknown command or option, as argparse does.
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
    return importlib.import_module(f"trl_ext.cli.{command}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
