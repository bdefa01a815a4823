"""`trl-ext best-of-n`: the best of n completions for each row of a JSONL file, in order, resumable.

[`~trl_ext.best_of_n`] makes the picks; this file knows arguments and files of rows. A row has a `prompt` (text or
messages) and columns for the reward functions. The output adds `completion`, `score` and `sample_index`, and on
request `answer` and `candidates`.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli._generation import (
    SERVER,
    GenerationArguments,
    described,
    model_init_kwargs,
    read_rows,
    sampling_kwargs,
    server_kwargs,
)
from trl_ext.cli._options import command_parser, parse
from trl_ext.pipelines.stages.row_file import RowFile


if TYPE_CHECKING:
    from trl_ext.pipelines.best_of_n import Best
    from trl_ext.trainers.common.command_line import Parser


CHUNK_ROWS = 64  # rows that are completed at a time with a seed of their own, and what an interruption costs


@dataclass(kw_only=True)
class BestOfNArguments(GenerationArguments):
    """Arguments of `trl-ext best-of-n`."""

    input: str = field(metadata=described("JSONL file of rows with a prompt"))
    output: str = field(metadata=described("JSONL file to write; a file that is there already is continued"))
    n: int = field(default=16, metadata=described("completions of each prompt"))
    vote: Literal["majority", "weighted", "softmax"] | None = field(
        default=None,
        metadata=described("pick by a vote of answers: each counts 1, its score, or its softmax (default: no vote)"),
    )
    answers: Literal["math", "number", "line"] = field(
        default="math",
        metadata=described("how a vote reads answers: by math-verify (extra math), the last number, the last line"),
    )
    return_candidates: bool = field(default=False, metadata=described("write all completions and their scores"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_funcs is None:
            raise ValueError("best-of-n needs --reward_funcs.")


_FREE = ("input", "output", "generation_batch_size", *SERVER)  # what may change when a run is continued
_ADDED = ("completion", "score", "sample_index", "answer", "candidates")


def make_parser(prog: str | None = "trl-ext best-of-n") -> "Parser":
    """The parser over `BestOfNArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(BestOfNArguments, prog, __doc__)


def run(args: BestOfNArguments) -> dict[str, Any]:
    """
    Complete the rows that have no completion yet. Returns how many rows there are, and how many have no score.

    Raises:
        ValueError: a line is not a JSON object, a row has a column that would be overwritten, or the output was made
            from other rows or with other arguments.
    """
    from trl_ext.pipelines.best_of_n import Picker, as_rows
    from trl_ext.pipelines.generation.records import with_completion

    rows = as_rows(read_rows(args.input))
    added = [name for name in _ADDED if {"answer": args.vote, "candidates": args.return_candidates}.get(name, True)]
    for number, row in enumerate(rows, start=1):
        taken = [name for name in added if name in row]
        if taken:
            raise ValueError(
                f"{args.input}, row {number} has a column {taken[0]!r}, which would be written over. Rename or remove "
                "it."
            )
    output = output_file(args)
    as_written = [{**row, "prompt": with_completion(row["prompt"], "")[0]} for row in rows]
    done = output.resume(enumerate(as_written, start=1), args.input, total=len(rows))
    unscored = 0
    if done < len(rows):
        kwargs = server_kwargs(args) or {"generation_batch_size": args.generation_batch_size}
        if args.backend != "openai":
            kwargs["model_init_kwargs"] = model_init_kwargs(args)
        picker = Picker(
            args.model_name_or_path,
            args.reward_funcs,
            args.n,
            reward_weights=args.reward_weights,
            vote=args.vote,
            answers=args.answers,
            return_candidates=args.return_candidates,
            backend=args.backend,
            backend_kwargs=kwargs,
            **sampling_kwargs(args),
        )
        for first in range(done, len(rows), CHUNK_ROWS):
            chunk = rows[first : first + CHUNK_ROWS]
            picks = picker(chunk, seed=args.seed + first)
            unscored += sum(pick.score is None for pick in picks)
            output.append(row | _found(pick, args) for row, pick in zip(chunk, picks, strict=True))
            print(f"{first + len(chunk)} of {len(rows)} rows", file=sys.stderr)
    return {"rows": len(rows), "earlier": done, "without_score": unscored, "output": args.output}


def output_file(args: BestOfNArguments) -> RowFile:
    """The output, with everything that its completions depend on beside the rows."""
    from trl_ext.pipelines.generation.sampling import Sampling

    settings = {name: value for name, value in asdict(args).items() if name not in _FREE} | _identities(args)
    settings |= asdict(Sampling.of(**sampling_kwargs(args)))  # what files hold, not how they are called
    return RowFile(Path(args.output), settings, _ADDED, block=CHUNK_ROWS)


def _identities(args: BestOfNArguments) -> dict[str, Any]:
    """What the results depend on beside the arguments: contents of the policy and of the reward functions."""
    from trl_ext.pipelines.generation.backends import model_of_backend
    from trl_ext.pipelines.reward_functions import reward_identity

    policy = model_of_backend(args.model_name_or_path, args.backend, model_init_kwargs(args))
    return {"policy": policy, "rewards": [reward_identity(name) for name in args.reward_funcs]}


def _found(pick: "Best", args: BestOfNArguments) -> dict[str, Any]:
    found = {
        "prompt": pick.prompt,
        "completion": pick.completion,
        "score": pick.score,
        "sample_index": pick.sample_index,
    }
    if args.vote is not None:
        found["answer"] = pick.answer
    if pick.candidates is not None:
        kept = ("completion", "score", "scores", "finish_reason")
        found["candidates"] = [{name: getattr(item, name) for name in kept} for item in pick.candidates]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    print(json.dumps(run(args), indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["best-of-n", *sys.argv[1:]]))
