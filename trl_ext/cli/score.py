"""`trl-ext score`: score the rows of a JSONL file with a reward model, in order, in a stream, resumable.

It knows files of rows and where it stopped. The scores are those of [`~trl_ext.RewardScorer`], and of
[`~trl_ext.RewardEnsemble`] for the folder of an ensemble.

A row has `prompt` (optional) and one of: `completion`, and gets `score`; `completions` (a list), and gets `scores`; or
`chosen` and `rejected`, and gets `chosen_score` and `rejected_score`. Every other column is kept. An ensemble writes
on request `<column>_members` and `<column>_disagreement` beside each of these.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ._train import parse


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_ext import RewardEnsemble, RewardScorer


CHUNK_ROWS = 256  # rows that are scored and written at a time, and so the most that an interruption costs
PLAIN_COLUMNS = ("score", "scores", "chosen_score", "rejected_score")
SCORE_COLUMNS = tuple(f"{name}{what}" for name in PLAIN_COLUMNS for what in ("", "_members", "_disagreement"))

Row = dict[str, Any]


class ScoreError(Exception):
    """The command cannot go on; the message says what was found, what was needed and what to do."""


@dataclass
class ScoreArguments:
    """Arguments of `trl-ext score`."""

    model: str = field(metadata={"help": "folder or Hub id of the reward model (full or adapter) or ensemble"})
    input: str = field(metadata={"help": "JSONL file of rows; - for standard input"})
    output: str = field(
        metadata={
            "help": "JSONL file to write: the same rows in the same order, with their scores. If it is there already, "
            "scoring goes on after its last row. - for standard output"
        }
    )
    batch_size: str = field(default="auto", metadata={"help": "rows of a batch, or auto: by tokens"})
    max_length: int | None = field(default=None, metadata={"help": "cut rows to so many tokens (default: no limit)"})
    aggregation: str | None = field(
        default=None,
        metadata={
            "help": "how a token-level model gives one number a completion: min, prod, last, mean, sum ...; or, of a "
            """segment model, weights of the categories as JSON: '{"factuality": 0.5, "relevance": 0.3}'"""
        },
    )
    member_scores: bool = field(
        default=False,
        metadata={"help": "of an ensemble, also write the score by each member and their standard deviation"},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "text or messages; may be missing from a row"})
    completion_column: str = field(
        default="completion", metadata={"help": "text or messages, or a list of several texts or of several dialogues"}
    )
    device: str | None = field(
        default=None, metadata={"help": "e.g. cpu or cuda:1 (default: the GPU if there is one)"}
    )

    def __post_init__(self):
        if self.batch_size != "auto":
            if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
                raise ValueError(f"--batch_size is {self.batch_size!r}; needed: auto, or a number of rows >= 1.")
            self.batch_size = int(self.batch_size)
        if isinstance(self.aggregation, str) and self.aggregation.lstrip().startswith("{"):
            try:
                self.aggregation = json.loads(self.aggregation)
            except ValueError as error:
                raise ValueError(
                    f"--aggregation is {self.aggregation!r}, which is not JSON ({error}). Needed: the name of an "
                    "aggregator, or a weight for each category."
                ) from error


def make_parser(prog: str | None = "trl-ext score") -> "TrlParser":
    """TRL's parser over `ScoreArguments`: flags, or `--config x.yaml` with the same names."""
    from trl import TrlParser

    return TrlParser(ScoreArguments, prog=prog, allow_abbrev=False, description=__doc__.split("\n\n")[0])


def run(args: ScoreArguments) -> int:
    """
    Score the rows that the output does not hold yet.

    Returns:
        `int`: number of rows scored by this call.

    Raises:
        [`ScoreError`]: a bad line of the input; an output that another model, other options or other rows made.
    """
    from tqdm import tqdm

    to_file = args.output != "-"
    if to_file and args.input != "-" and Path(args.output).exists() and os.path.samefile(args.input, args.output):
        raise ScoreError(f"--output is the input file {args.input}. Give another file: rows are not written in place.")
    with ExitStack() as stack:
        source = sys.stdin.buffer if args.input == "-" else stack.enter_context(open(args.input, "rb"))
        rows = read_rows(source, args.input)
        done = 0
        if to_file:
            check_manifest(args)
            done = resume(Path(args.output), rows, args.input)
        sink = stack.enter_context(open(args.output, "ab")) if to_file else sys.stdout.buffer
        total = None if args.input == "-" else count_lines(args.input)
        scored = truncated = 0
        scorer = None
        with tqdm(total=total, initial=done, unit=" rows", desc="Scoring", file=sys.stderr) as bar:
            for chunk in chunks(rows, CHUNK_ROWS):
                if scorer is None:  # nothing is loaded when nothing is left to do
                    scorer, judges_steps = make_scorer(args), is_process_model(args.model)
                add_scores(scorer, chunk, args, judges_steps)
                sink.write(b"".join(_line(row) for _, row in chunk))
                sink.flush()
                if to_file:
                    os.fsync(sink.fileno())
                scored += len(chunk)
                truncated = scorer.num_truncated
                bar.update(len(chunk))
    cut = f", {truncated} completions cut to max_length={args.max_length}" if truncated else ""
    print(f"Scored {scored} rows{f' after {done} that were there' if done else ''}{cut}.", file=sys.stderr)
    return scored


# ------------------------------------------------------------------------------------------------------------- reading
def read_rows(source: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """Line number (from 1) and row of each line that is not blank. Raises [`ScoreError`] at one that is no row."""
    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ScoreError(
                f"{name}, line {number}: not valid JSON ({error}). Correct or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise ScoreError(
                f"{name}, line {number}: found a {type(row).__name__}; needed: a JSON object with columns."
            )
        yield number, row


def chunks(rows: Iterator[tuple[int, Row]], size: int) -> Iterator[list[tuple[int, Row]]]:
    """Lists of up to `size` rows. A bad line is raised after the good rows before it have been handed out."""
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


def count_lines(path: str) -> int:
    """Number of lines, for the progress bar."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


# ------------------------------------------------------------------------------------------------------------ resuming
def manifest_path(output: Path) -> Path:
    """The file beside the output that says what made it."""
    return output.with_name(output.name + ".manifest.json")


def check_manifest(args: ScoreArguments) -> None:
    """Refuse an output that was made by another model or with other options; claim a new one."""
    from trl_ext.models.fingerprint import fingerprint
    from trl_ext.models.loading import local_folder

    output = Path(args.output)
    path = manifest_path(output)
    now = {
        "model": args.model,
        "model_sha256": fingerprint(Path(local_folder(args.model, None))),
        "max_length": args.max_length,
        "aggregation": args.aggregation,
        "member_scores": args.member_scores,
        "prompt_column": args.prompt_column,
        "completion_column": args.completion_column,
    }
    if output.exists() and output.stat().st_size > 0:
        if not path.is_file():
            raise ScoreError(f"{output} holds data that this command did not write ({path.name} is missing). {_FIX}")
        before = json.loads(path.read_text(encoding="utf-8"))
        # a model that was moved is still the same model
        changed = [key for key in now if key != "model" and before.get(key) != now[key]]
        if changed:
            said = "; ".join(
                f"another model at {before.get('model')}, now {args.model}"
                if key == "model_sha256"
                else f"{key}={before.get(key)}, now {now[key]}"
                for key in changed
            )
            raise ScoreError(f"{output} was made with {said}. Its scores cannot be continued. {_FIX}")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, path)


def resume(output: Path, rows: Iterator[tuple[int, Row]], name: str) -> int:
    """
    Cut a torn last line off the output, and move `rows` behind those that it holds.

    The rows in the output are compared with those of the input one by one, so that an input to which lines were added
    is continued and another one is refused.

    Returns:
        `int`: number of rows that the output holds.
    """
    if not output.exists():
        return 0
    done = end = 0
    with open(output, "r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                written = json.loads(line)
            except ValueError as error:
                raise ScoreError(f"{output}, line {number}: not valid JSON ({error}). {_FIX}") from error
            at, row = next(rows, (None, None))
            if row is None or _identity(row) != _identity(_without_scores(written)):
                where = f"line {at} of {name}" if row is not None else f"any line of {name}, which is shorter"
                raise ScoreError(
                    f"{output}, line {number}: this row is not {where}. It was made from other rows. {_FIX}"
                )
            done += 1
            end += len(line)
        file.truncate(end)
    return done


def _without_scores(row: Row) -> Row:
    return {column: value for column, value in row.items() if column not in SCORE_COLUMNS}


def _identity(row: Row) -> str:
    return json.dumps(row, sort_keys=True)  # NaN equals NaN here


_FIX = "Give another --output, or delete this one to start again."


# ------------------------------------------------------------------------------------------------------------- scoring
def make_scorer(args: ScoreArguments) -> "RewardScorer | RewardEnsemble":
    """Load the model, or the members of an ensemble."""
    from trl_ext import RewardScorer
    from trl_ext.scoring.ensemble import load_scorer

    options = {name: getattr(args, name) for name in ("batch_size", "max_length", "aggregation", "device")}
    scorer = load_scorer(args.model, **options)
    if args.member_scores and isinstance(scorer, RewardScorer):
        raise ScoreError(
            f"{args.model} has no reward_ensemble.json, so it is one model. Leave --member_scores out, or give the "
            "folder of an ensemble."
        )
    return scorer


def is_process_model(path: str) -> bool:
    """Whether `reward_model.json` says that the model judges steps."""
    from trl_ext.models.loading import local_folder
    from trl_ext.models.sidecar import read_sidecar

    sidecar = read_sidecar(local_folder(path, None))
    return sidecar is not None and sidecar.kind == "process"


def add_scores(
    scorer: "RewardScorer | RewardEnsemble", chunk: list[tuple[int, Row]], args: ScoreArguments, judges_steps: bool
) -> None:
    """Score the candidates of all rows in one call and write the scores into the rows."""
    from trl_ext.data.validation import DataError

    candidates: list[Any] = []
    owners: list[tuple[int, Row]] = []  # line and row of each candidate
    targets: list[tuple[tuple[str, ...], int]] = []  # columns and number of scores of each row
    for number, row in chunk:
        try:
            columns, found = _candidates(row, args.completion_column)
            if judges_steps and columns == ("scores",) and isinstance(row.get("labels"), list):
                raise ScoreError(
                    "found `completions` beside `labels`, as in rows of steps, and each would be scored as a "
                    "completion of its own; needed: the steps joined in one `completion`, each with its separator. "
                    "Join them, or call RewardScorer.score_steps; if they are candidates, rename `labels`."
                )
        except ScoreError as error:
            raise ScoreError(f"{args.input}, line {number}: {error}") from None
        candidates.extend(found)
        owners.extend([(number, row)] * len(found))
        targets.append((columns, len(found)))
    rows = {
        "prompts": [row.get(args.prompt_column) for _, row in owners],
        "completions": candidates,
        "tools": [row.get("tools") for _, row in owners],
        "chat_template_kwargs": [row.get("chat_template_kwargs") for _, row in owners],
    }
    try:
        if args.member_scores:
            members = scorer.score_members(**rows)
            values = {
                "": scorer.combine(members),
                "_members": members,
                "_disagreement": scorer.disagreement(members),
            }
        else:
            values = {"": scorer(**rows)}
    except DataError as error:
        line = owners[error.row][0]
        raise ScoreError(
            f"{args.input}, line {line}: found {error.found}; needed {error.needed}. {error.fix}"
        ) from error
    for what, found in values.items():
        remaining = iter(found)
        for (_, row), (columns, count) in zip(chunk, targets, strict=True):
            own = list(islice(remaining, count))
            names = [f"{column}{what}" for column in columns]
            row.update({names[0]: own} if columns == ("scores",) else zip(names, own, strict=True))


def _line(row: Row) -> bytes:
    # half a surrogate pair, which a JSON escape can hold and UTF-8 cannot, is written as its escape again
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _candidates(row: Row, completion_column: str) -> tuple[tuple[str, ...], list[Any]]:
    """The columns to write and the completions to score."""
    taken = [column for column in SCORE_COLUMNS if column in row]
    if taken:
        raise ScoreError(f"found a column {taken[0]!r}, where the score would go. Rename or remove it.")
    for column in (completion_column, "completions"):
        if column in row:
            value = row[column]
            several = isinstance(value, list) and (
                column == "completions" or any(not isinstance(item, dict) for item in value)
            )
            if column == "completions" and not several:
                raise ScoreError(f"found a {type(value).__name__} in 'completions'; needed: a list of completions.")
            return (("scores",), value) if several else (("score",), [value])
    if "chosen" in row and "rejected" in row:
        return ("chosen_score", "rejected_score"), [row["chosen"], row["rejected"]]
    raise ScoreError(
        f"found the columns {sorted(row)}; needed: {completion_column!r}, 'completions', or 'chosen' and 'rejected'. "
        "Name the column with --completion_column."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    run(args)
    return 0


if __name__ == "__main__":
    from .main import main as trl_ext

    sys.exit(trl_ext(["score", *sys.argv[1:]]))
