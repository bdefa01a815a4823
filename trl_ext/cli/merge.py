"""`trl-ext merge`: merge an adapter into the base it was trained on, as one plain checkpoint.

This module parses arguments for [`merge_reward_model`], which merges, scores again, and refuses the merge if the
scores moved too far.
"""

import argparse
import json
import sys


DTYPES = ("float32", "bfloat16", "float16")


def make_parser(prog: str | None = "trl-ext merge") -> argparse.ArgumentParser:
    """The parser of adapter, output folder, precision and base."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Merge a reward model's adapter into its base. A base that was quantized in training is "
        "dequantized first, because the adapter was trained on those weights. The merged folder loads with plain "
        "transformers. The command prints how far the scores of a calibration set moved, and fails if it is too far.",
    )
    parser.add_argument(
        "model", help="folder or Hub id of the reward model: adapter, head, tokenizer, reward_model.json"
    )
    parser.add_argument("output_dir", help="new or empty folder for the merged model")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="stored precision (default: that of the base)")
    parser.add_argument("--base_model", default=None, help="folder or Hub id of the base, if it has moved")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    args = make_parser().parse_args(argv)
    from trl_ext import merge_reward_model

    report = merge_reward_model(args.model, args.output_dir, dtype=args.dtype, base_model=args.base_model)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["merge", *sys.argv[1:]]))
