"""`trl-ext serve-info`: print the command by which vLLM serves reward models with the scores that they have here.

It parses arguments and prints. [`~trl_ext.serving.serve_info.server_commands`] knows what vLLM needs. No server is
started.
"""

import argparse
import sys


def make_parser(prog: str | None = "trl-ext serve-info") -> argparse.ArgumentParser:
    """The parser: which models, where files go, on which port."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the command that starts a vLLM server for reward models, with the scores that they have "
        "here. Run it in an environment with vLLM; nothing is started. Adapters of one base and the members of an "
        "ensemble share a server; other models get one each. The command also writes what the server reads: a "
        "template for its /score route, and for token-level adapters a copy of their base with their heads, and the "
        "adapters without them.",
        epilog="Then score through it: trl-ext score --model http://localhost:8000#FOLDER --input rows.jsonl --output "
        "scored.jsonl. Before the first row it is checked that the server gives the scores of the saved model.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="FOLDER", help="folder or Hub id of a reward model (full or adapter) or ensemble"
    )
    parser.add_argument(
        "--output_dir", default="served", help="folder for the files that servers read (default: served)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port of the first server (default: 8000); others get the next"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    args = make_parser().parse_args(argv)
    from trl_ext.serving.serve_info import server_commands

    for number, command in enumerate(server_commands(args.models, args.output_dir, args.port)):
        url = f"http://localhost:{args.port + number}"
        print("" if number == 0 else "\n", end="")
        print(command)
        print("\n# scores, after a check that the server gives those of the saved model:")
        for folder in command.models:
            print(f'#   RewardScorer("{url}", "{folder}")      trl-ext score --model {url}#{folder} ...')
        for note in command.notes:
            print(f"# {note}")
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["serve-info", *sys.argv[1:]]))
