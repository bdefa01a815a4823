"""
What fits on one 24 GB card: training steps of 7-8B models with NF4 and LoRA, each row beside its estimate.

On a machine with a GPU (weights are random and nothing is downloaded; the process is capped at `--gpu_memory`, so that
a larger card behaves like a smaller one as far as memory goes):

    python examples/measure_24gb.py --output outputs/measure_24gb                    # the whole matrix
    python examples/measure_24gb.py --only pairs rankings --output outputs/part      # a part of it

Speed beside TRL's trainer, single members, and rows scored apart, on a Llama-style model of that size:

    size="--hidden_size 4096 --num_layers 32 --num_heads 32"
    trl-ext bench reward $size --load_in_4bit --gradient_checkpointing --shapes 512,512,2 512,256,4 512,512,8
    trl-ext bench ensemble $size --load_in_4bit --gradient_checkpointing --shapes 512,256,4,1
    trl-ext bench score $size --num_completions 16

Without a GPU only tiny shapes can be run, to see that every row of the matrix works (`--smoke`, about two minutes), or
the estimate alone, without any run (`--estimate`, about ten minutes).

`--bars` ends with status 1 where a bar is missed, or not measured: 20 GiB for one pair of 1,024 tokens, 22 GiB for
groups of eight.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig

from trl_ext.bench.runner import formatted
from trl_ext.fit import command as bench_fit


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B")
# name -> (part, config, tokens of prompt and completion, candidates, overrides)
MATRIX = {
    "pair, 1 x 1024": ("pairs", "reward/pairs_margin_qlora_8b.yaml", 512, 512, 2, {}),
    "pair, 2 x 1024": ("pairs", "reward/pairs_margin_qlora_8b.yaml", 512, 512, 2, {"per_device_train_batch_size": 2}),
    "K = 4, 512 + 256": ("rankings", "reward/rankings_qlora_8b.yaml", 512, 256, 4, {}),
    "K = 4, 512 + 256, padded": ("rankings", "reward/rankings_qlora_8b.yaml", 512, 256, 4, {"shared_prefix": False}),
    "K = 8, 512 + 512": ("rankings", "reward/rankings_qlora_8b.yaml", 512, 512, 8, {}),
    "K = 8, 512 + 512, padded": ("rankings", "reward/rankings_qlora_8b.yaml", 512, 512, 8, {"shared_prefix": False}),
    "ORM, 2 x 2048": ("tokens", "orm/orm_qlora_8b.yaml", 512, 1536, 1, {"max_length": 2048}),
    "PRM, 2 x 2048": ("tokens", "prm/prm_qlora_8b.yaml", 512, 1536, 1, {"max_length": 2048}),
    "ensemble of 4, branched, K = 4": ("ensemble", "ensemble/rankings_qlora_8b.yaml", 512, 256, 4, {}),
    "ensemble of 4, full depth, K = 4": (
        "ensemble",
        "ensemble/rankings_qlora_8b.yaml",
        512,
        256,
        4,
        {"branch_at": None},
    ),
}
BARS = {"pair, 1 x 1024": 20.0, "K = 8, 512 + 512": 22.0}
"""GiB."""


def main(argv: list[str] | None = None) -> int:
    """Measure or estimate every row; returns 1 if a bar is missed and `--bars` was given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--only", nargs="*", default=None, help="parts: pairs, rankings, tokens, ensemble")
    parser.add_argument("--gpu_memory", default="24")
    parser.add_argument("--steps", default="3")
    parser.add_argument("--estimate", action="store_true", help="run nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny shape in place of the models, an eighth of the tokens"
    )
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--output", default="outputs/measure_24gb")
    args = parser.parse_args(argv)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows, missed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model in [tiny_shape(folder)] if args.smoke else args.models:
            for name, (part, *case) in MATRIX.items():
                if args.only is None or part in args.only:
                    rows.append({"model": Path(model).name, "case": name, **measure(model, case, args)})
                    print(json.dumps(rows[-1]), flush=True)
                    (output / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
                    gib = rows[-1]["measured_gib"]
                    if name in BARS and (gib is None or gib > BARS[name]):
                        without = "out of memory" if rows[-1]["out_of_memory"] else "not measured"
                        found = without if gib is None else f"{gib:.1f} GiB"
                        missed.append(f"{name} of {model}: {found}, allowed {BARS[name]:.1f} GiB")
    header = ["model", "case", "estimate_gib", "measured_gib", "text_tokens_per_second", "error"]
    print(formatted([header, *([cell(row[name]) for name in header] for row in rows)]))
    print("\n".join(missed) or "No bar was missed." if args.bars else "")
    return int(bool(missed and args.bars))


def measure(model: str, case: list, args: argparse.Namespace) -> dict:
    """One row, through `trl-ext bench fit`."""
    config, prompt, completion, candidates, overrides = case
    shrink = 8 if args.smoke else 1
    values = {"model_name_or_path": model, "max_length": max(1024, prompt + completion) // shrink, **overrides}
    if "max_length" in overrides:
        values["max_length"] = overrides["max_length"] // shrink
    flags = ["--config", str(CONFIGS / config), "--no_changes", "--gpu_memory", args.gpu_memory, "--steps", args.steps]
    flags += ["--prompt_length", str(prompt // shrink), "--completion_length", str(completion // shrink)]
    flags += ["--candidates", str(candidates), *(["--estimate"] if args.estimate else [])]
    flags += ["--override", *(f"{name}={json.dumps(value)}" for name, value in values.items())]
    parser = argparse.ArgumentParser()
    bench_fit.add_arguments(parser)
    report = bench_fit.measure(parser.parse_args(flags))
    measured = report["measured"] or {}
    return {
        "command": "trl-ext bench fit " + " ".join(flags),
        "estimate_gib": report["estimate"]["total_gib"],
        "measured_gib": measured.get("peak_reserved_gib"),
        "out_of_memory": "out_of_memory" in measured,
        "text_tokens_per_second": measured.get("text_tokens_per_second"),
        "error": measured.get("error"),
        "machine": report["machine"],
        "versions": report["versions"],
    }


def tiny_shape(folder: str) -> str:
    """The folder of an architecture that a CPU can train."""
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, head_dim=16)
    AutoConfig.for_model("qwen3", vocab_size=512, num_key_value_heads=2, **sizes).save_pretrained(f"{folder}/tiny")
    return f"{folder}/tiny"


def cell(value: object) -> str:
    """A value of the table."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.3f}"


if __name__ == "__main__":
    sys.exit(main())
