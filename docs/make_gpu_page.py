"""Makes the GPU results of the documentation from the rows of `examples/measure_gpu.py`.

    python docs/make_gpu_page.py outputs/measure_gpu/rows.jsonl

Writes docs/results/gpu_speed.json, gpu_memory.json and gpu_attention.json, which the pages show as tables, and the
line about memory in the header of every config that was measured. It needs no GPU: it estimates the memory of the
measured batches itself, which takes about half a minute of a CPU for each.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["python examples/measure_gpu.py", "python docs/make_gpu_page.py outputs/measure_gpu/rows.jsonl"]
MEMORY = re.compile(r"^# Memory: .*?(?=^# \w+: )", re.MULTILINE | re.DOTALL)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The last measurement of each row that ran. Raises `ValueError` if rows are from several machines or shapes."""
    rows = {row["row"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    ran = [row for row in rows.values() if "error" not in row]
    for name in ("machine", "shape"):
        found = sorted({row[name] for row in ran})
        if len(found) != 1:
            raise ValueError(f"{file} has rows of {len(found)} values of {name!r} ({found}); needed: rows of one.")
    return ran


def estimated(row: dict[str, Any]) -> float | None:
    """The estimate for a row in GiB: for a config by `trl-ext bench fit`, else for the groups of the row."""
    from peft import LoraConfig

    from trl_ext.data.prefix_layout import build_layout
    from trl_ext.fit.known_shapes import config_of
    from trl_ext.fit.memory_estimate import TrainingStep, estimate

    if "config" in row:
        from trl_ext.fit.config import parse, sizes_of, training_step

        path = ROOT / row["config"]
        given = argparse.Namespace(config=str(path), override=[], candidates=None, prompt_length=None)
        given.completion_length = None
        parsed, config = parse(path.parent.name, given), config_of(row["shape"])[0]
        sizes = sizes_of(path.parent.name, parsed, config, given)
        return estimate(training_step(path.parent.name, parsed, config, sizes)).peak / 2**30
    if "groups" not in row:
        return None
    config = config_of(row["shape"])[0]
    config.pad_token_id = 0
    batch = {"prefix_layout": build_layout([([3] * p, [[4] * c for c in lengths]) for p, lengths in row["groups"]])}
    lora = LoraConfig(r=16, target_modules="all-linear")
    options = dict(bf16=True, four_bit=True, peft_config=lora, checkpointing=True)
    import torch

    return estimate(TrainingStep(config, batch, dtype=torch.bfloat16, **options)).peak / 2**30


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def speed_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Time beside the other sides, tokens per second, and equality of losses and gradients."""
    found = []
    for row in rows:
        ratio = row.get("ratio")
        if ratio is None:
            continue
        beside = ratio if isinstance(ratio, dict) else {"one member": 1 / ratio}
        found.append(
            [
                row["row"],
                "; ".join(f"{value:.2f}x {name}" for name, value in beside.items()),
                "; ".join(f"{value:.2f}" for value in dict.fromkeys(row.get("token_bound", {}).values())) or "-",
                number(row.get("tokens_per_second"), "{:,.0f}"),
                number(row.get("percent_of_bf16"), "{:.0f} %"),
                number(row.get("loss_difference", row.get("score_difference")), "{:.1e}"),
                number(row.get("gradient_difference"), "{:.1e}"),
            ]
        )
    return found


def memory_table(rows: list[dict[str, Any]], estimate: Callable) -> list[list[str]]:
    return [
        [
            f"`{row['config']}`, {row['batch']}" if "config" in row else row["row"],
            number(row["allocated_gib"], "{:.1f}"),
            number(row["reserved_gib"], "{:.1f}"),
            number(estimate(row), "{:.1f}"),
        ]
        for row in rows
        if "config" in row or "groups" in row
    ]


def attention_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{row['row']}: {name}",
            number(1000 * seconds, "{:.2f}"),
            number(row["difference"][name], "{:.1e}"),
            "fastest" if name == row["fastest"] else "",
        ]
        for row in rows
        if "fastest" in row
        for name, seconds in row["seconds"].items()
    ]


def header(text: str, row: dict[str, Any], estimate: float | None) -> str:
    """The text of a config with the measured peak in its header."""
    line = (
        f"# Memory: {row['reserved_gib']:.1f} GiB reserved ({row['allocated_gib']:.1f} allocated) at the peak of a "
        f"training step,\n# measured on one {row['machine']} capped at 24 GB for {row['batch']}; "
        f"estimate {number(estimate, '{:.1f}')} GiB.\n"
    )
    new, times = MEMORY.subn(lambda _: line, text, count=1)
    if times != 1:
        raise ValueError(f"{row['config']} has no line '# Memory: ...' before another line of its header.")
    return new


def main(argv: list[str] | None = None) -> int:
    """Write the results. Returns 2 if the rows cannot be shown together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path, help="rows.jsonl of examples/measure_gpu.py")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose docs and configs are written")
    parser.add_argument("--no_estimates", action="store_true", help="leave the column of estimates empty")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.rows)
    except (OSError, ValueError) as error:
        print(f"make_gpu_page: {error}", file=sys.stderr)
        return 2
    known: dict[str, float | None] = {}

    def estimate(row: dict[str, Any]) -> float | None:
        if not args.no_estimates and row["row"] not in known:
            known[row["row"]] = estimated(row)
        return known.get(row["row"])

    about = {"date": date.today().isoformat(), "machine": f"{rows[0]['machine']}, torch {rows[0]['torch']}"}
    about["command"] = COMMAND
    shape = f"Random weights of the shape {rows[0]['shape']}, NF4, LoRA of rank 16 on all linear layers, bf16."
    tables = {
        "gpu_speed": (
            "Training steps and scoring on a GPU",
            f"{shape} A ratio is the time of the other side over ours; above 1, ours is faster.",
            ["row", "time of the others", "bound by tokens", "tokens/s", "of the bf16 limit", "loss", "gradients"],
            speed_table(rows),
        ),
        "gpu_memory": (
            "Peak memory of a training step under a cap of 24 GB (GiB)",
            f"{shape} Rows of configs have the adapter and the members of the config.",
            ["row", "allocated", "reserved", "estimate"],
            memory_table(rows, estimate),
        ),
        "gpu_attention": (
            "Attention kernels on a flat row of one prompt and four completions",
            "Forward and backward pass in bf16. `difference`: largest difference over the largest value, in float32.",
            ["row", "ms", "difference", ""],
            attention_table(rows),
        ),
    }
    for name, (title, note, columns, cells) in tables.items():
        if cells:
            result = {"title": title, **about, "note": note, "columns": columns, "rows": cells}
            text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
            (args.root / "docs" / "results" / f"{name}.json").write_text(text, encoding="utf-8")
    for row in rows:
        if "config" in row and row["reserved_gib"] is not None:
            path = args.root / row["config"]
            path.write_text(header(path.read_text(encoding="utf-8"), row, estimate(row)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
