"""`trl-ext score`: score the rows of a JSONL file with a reward model, in order. A rerun resumes.

This file reads a stream of rows and writes them with their scores. [`~trl_ext.RewardScorer`] scores them, or
[`~trl_ext.RewardEnsemble`] if the model is the folder of an ensemble.

A row may have a `prompt`. Its other columns decide which scores it gets:

- `completion` gets `score`;
- `completions`, a list, gets `scores`;
- `chosen` and `rejected` get `chosen_score` and `rejected_score`;
- for a process model, steps (`completions` with `labels`, or the column that `--steps_column` names) get
  `step_scores`, and `score` holds their aggregate.

The output keeps all columns. With `--member_scores` an ensemble also writes `<column>_members` and
`<column>_disagreement`; with `--uncertainty` a single model also writes `<column>_std`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trl_ext.cli.common.options import command_parser, parse
from trl_ext.cli.common.score_arguments import ScoreArguments
from trl_ext.cli.common.score_rows import SCORE_COLUMNS, Row, ScoreError, add_scores, model_kind
from trl_ext.data.validation import DataError
from trl_ext.pipelines.stages.one_process import check_one_process
from trl_ext.pipelines.stages.parts import Part
from trl_ext.pipelines.stages.row_file import RowFile, line_of
from trl_ext.pipelines.stages.row_parts import merge_rows


if TYPE_CHECKING:
    from trl_ext import RewardEnsemble, RewardScorer
    from trl_ext.trainers.common.command_line import Parser


SHARDS = (
    "To use several GPUs, start one command for each, with its own --shard i/n, --output and --device, and merge the "
    "outputs with --shards_from."
)
CHUNK_ROWS = 256  # rows that are scored and written together; an interruption loses at most this many


def make_parser(prog: str | None = "trl-ext score") -> "Parser":
    """The parser over `ScoreArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(ScoreArguments, prog, __doc__)


def run(args: ScoreArguments) -> int:
    """
    Score the rows that the output does not hold yet.

    Returns:
        `int`: number of rows that this call scored.

    Raises:
        [`ScoreError`]: if a line of the input cannot be used.
        ValueError: if a launcher started several processes.
        [`~trl_ext.pipelines.stages.cache_key.StaleError`]: if the existing output comes from another model, other
            options or other rows.
    """
    check_one_process("score", SHARDS)
    from tqdm import tqdm

    to_file = args.output != "-"
    if to_file and args.input != "-" and Path(args.output).exists() and os.path.samefile(args.input, args.output):
        raise ScoreError(
            f"--output is the input file {args.input}. Give another file: the command never overwrites its input."
        )
    if to_file and Path(args.output).is_dir():
        raise ScoreError(f"--output {args.output} is a folder; needed: a file, e.g. one in that folder.")
    with ExitStack() as stack:
        source = sys.stdin.buffer if args.input == "-" else stack.enter_context(open(args.input, "rb"))
        rows = converted(read_rows(source, args.input), args)
        total = None if args.input == "-" else count_rows(args)
        scorer = make_scorer(args) if args.fit_uncertainty and not args.shards_from else None
        output = output_file(args) if to_file else None
        if args.shards_from:
            merge_rows(output, list(map(Path, args.shards_from)), rows, args.input, total)
            print(f"Merged {total} rows.", file=sys.stderr)
            return 0
        if args.shard is not None:
            own = Part.parse(args.shard).rows(total)
            rows, total = islice(rows, own.start, own.stop), len(own)
        done = 0 if output is None else output.resume(rows, args.input)
        scored = truncated = cut_off = 0
        kind = None if scorer is None else model_kind(args.model)
        with tqdm(total=total, initial=done, unit=" rows", desc="Scoring", file=sys.stderr) as bar:
            for chunk in chunks(rows, CHUNK_ROWS):
                if scorer is None:  # load the model only if rows are left to score
                    scorer, kind = make_scorer(args), model_kind(args.model)
                cut_off += add_scores(scorer, kind, chunk, args)
                if output is not None:
                    output.append(row for _, row in chunk)
                else:
                    sys.stdout.buffer.write(b"".join(line_of(row) for _, row in chunk))
                    sys.stdout.buffer.flush()
                scored += len(chunk)
                truncated = scorer.num_truncated
                bar.update(len(chunk))
    cut = f", {truncated} completions cut to max_length={args.max_length}" if truncated else ""
    cut += f", {cut_off} steps without a score because max_length cut them off" if cut_off else ""
    print(f"Scored {scored} rows{f'; {done} rows already had scores' if done else ''}{cut}.", file=sys.stderr)
    return scored


# ------------------------------------------------------------------------------------------------------------- reading
def read_rows(source: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """Yield line number (from 1) and row of each line that is not blank. Raises [`ScoreError`] for an invalid line."""
    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # invalid JSON or invalid UTF-8
            raise ScoreError(
                f"{name}, line {number}: not valid JSON ({error}). Correct or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise ScoreError(
                f"{name}, line {number}: found a {type(row).__name__}; needed: a JSON object with columns."
            )
        yield number, row


def converted(rows: Iterator[tuple[int, Row]], args: ScoreArguments) -> Iterator[tuple[int, Row]]:
    """The rows with our columns, if they are those of a public data set; each keeps the number of its line."""
    if args.dataset_format is None:
        yield from rows
        return
    from trl_ext.data.recipes import read_released

    try:
        yield from read_released(rows, args.dataset_format)
    except DataError as error:
        raise ScoreError(
            f"{args.input}, line {error.row}: found {error.found}; needed {error.needed}. {error.fix}"
        ) from error


def chunks(rows: Iterator[tuple[int, Row]], size: int) -> Iterator[list[tuple[int, Row]]]:
    """Yield lists of up to `size` rows. An invalid line raises its error after the rows before it are yielded."""
    chunk: list[tuple[int, Row]] = []
    try:
        for item in rows:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except ScoreError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def count_rows(args: ScoreArguments) -> int | None:
    """Number of rows of the input. Rows of a public data set are counted only if they are divided into parts."""
    with open(args.input, "rb") as file:
        if args.dataset_format is None:
            return sum(1 for line in file if line.strip())
        if args.shard is None and not args.shards_from:
            return None  # a released row may give several rows or none, so that counting takes time
        return sum(1 for _ in converted(read_rows(file, args.input), args))


def output_file(args: ScoreArguments) -> RowFile:
    """The output file; its settings are everything except the rows that the scores depend on."""
    from trl_ext.models.fingerprint import fingerprint
    from trl_ext.scoring.last_layer import read_posterior
    from trl_ext.scoring.remote import local_files

    manifest = {
        "model": args.model,
        "model_sha256": fingerprint(Path(local_files(args.model)), args.base_model),
        "max_length": args.max_length,
        "aggregation": args.aggregation,
        "reduce": args.reduce,
        "reduce_kwargs": args.reduce_kwargs,
        "member_scores": args.member_scores,
        "prompt_column": args.prompt_column,
        "completion_column": args.completion_column,
        "steps_column": args.steps_column,
    }
    if args.uncertainty:
        posterior = read_posterior(local_files(args.model))
        manifest["uncertainty"] = None if posterior is None else posterior.digest()
    if args.shard is not None:
        manifest["shard"] = str(Part.parse(args.shard))
    if args.dataset_format is not None:
        manifest["dataset_format"] = args.dataset_format
    return RowFile(Path(args.output), manifest, SCORE_COLUMNS, places={"model": "model_sha256"})


# ------------------------------------------------------------------------------------------------------------- scoring
def make_scorer(args: ScoreArguments) -> "RewardScorer | RewardEnsemble":
    """Load the model, or the members of an ensemble."""
    from trl_ext import RewardScorer
    from trl_ext.scoring.ensemble import load_scorer
    from trl_ext.scoring.reducers import reducers, takes_weights

    options = {
        name: getattr(args, name) for name in ("batch_size", "max_length", "aggregation", "device", "base_model")
    }
    scorer = load_scorer(args.model, **options)
    if not isinstance(scorer, RewardScorer):
        if args.reduce is not None:
            weights = scorer.weights if takes_weights(reducers.get(args.reduce)) else None
            try:
                scorer.set_reducer(args.reduce, weights, **args.reduce_kwargs or {})
            except TypeError as error:
                raise ScoreError(f"--reduce {args.reduce} does not accept these --reduce_kwargs: {error}.") from error
        if args.uncertainty:
            raise ScoreError(
                f"{args.model} is an ensemble, which has no posterior of its last layer. --member_scores writes how "
                "much its members disagree."
            )
        return scorer
    for flag in ("member_scores", "reduce"):
        if getattr(args, flag):
            raise ScoreError(
                f"{args.model} has no reward_ensemble.json, so it is a single model. Leave out --{flag}, or give the "
                "folder of an ensemble."
            )
    if args.fit_uncertainty:
        print(f"Uncertainty: {json.dumps(scorer.fit_uncertainty(args.fit_uncertainty))}", file=sys.stderr)
    elif args.uncertainty:
        _ = scorer.posterior  # an error now if there is none
    return scorer


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    run(args)
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["score", *sys.argv[1:]]))
