"""`trl-ext merge`: merge an adapter into the base it was trained on, or average several reward models into one.

This module parses arguments. One model goes to [`merge_reward_model`], which merges, scores again, and refuses the
merge if the scores moved too far. Several go to [`merge_reward_models`], which averages them.
"""

import argparse
import json
import sys

from trl_ext.pipelines.stages.one_process import check_one_process


DTYPES = ("float32", "bfloat16", "float16")


def make_parser(prog: str | None = "trl-ext merge") -> argparse.ArgumentParser:
    """The parser of adapter, output folder, precision and base."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Merge a reward model's adapter into its base. A base that was quantized in training is "
        "dequantized first, because the adapter was trained on those weights. The merged folder loads with plain "
        "transformers. The command prints how far the scores of a calibration set moved, and fails if it is too far. "
        "Several models of one base are averaged (WARM): adapters to an adapter, full models to a full model.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="model",
        help="folder or Hub id of a reward model: adapter, head, tokenizer, reward_model.json; several are averaged",
    )
    parser.add_argument("output_dir", help="new or empty folder for the merged model")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="stored precision (default: that of the base)")
    parser.add_argument(
        "--weights",
        type=_weight,
        nargs="+",
        default=None,
        help="a weight for each of several models, behind the folders (default: equal)",
    )
    parser.add_argument("--base_model", default=None, help="folder or Hub id of the base, if it has moved")
    return parser


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; put --weights behind the folders") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    args = make_parser().parse_args(argv)
    check_one_process("merge")
    from trl_ext import merge_reward_model, merge_reward_models

    if len(args.models) > 1:
        if args.dtype is not None:
            raise ValueError("--dtype is for one model. Average first, then merge the average in the dtype you want.")
        options = {} if args.base_model is None else {"base_model": args.base_model}
        report = merge_reward_models(args.models, args.output_dir, args.weights, **options)
    elif args.weights is not None:
        raise ValueError("--weights is for several models, and there is one.")
    else:
        report = merge_reward_model(args.models[0], args.output_dir, dtype=args.dtype, base_model=args.base_model)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["merge", *sys.argv[1:]]))
