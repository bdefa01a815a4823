"""`trl-ext best-of-n`: write the best of n completions for each row of a JSONL file. A rerun resumes.

This file knows arguments and files of rows; [`~trl_ext.best_of_n`] picks the completions. A row has a `prompt` (text
or messages) and the columns that the reward functions need. The output keeps the order of the rows and adds
`completion`, `score` and `sample_index`; `--vote` adds `answer`, `--return_candidates` adds `candidates`.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import (
    SERVER,
    GenerationArguments,
    described,
    model_init_kwargs,
    sampling_kwargs,
    server_kwargs,
)
from trl_ext.cli.common.options import command_parser, parse
from trl_ext.pipelines.stages.one_process import SERVERS, check_one_process
from trl_ext.pipelines.stages.row_file import RowFile, read_rows


if TYPE_CHECKING:
    from trl_ext.pipelines.best_of_n import Best
    from trl_ext.trainers.common.command_line import Parser


CHUNK_ROWS = 64  # rows that are completed together with one seed; an interruption loses at most this many


@dataclass(kw_only=True)
class BestOfNArguments(GenerationArguments):
    """Arguments of `trl-ext best-of-n`."""

    input: str = field(metadata=described("JSONL file of rows with a prompt"))
    output: str = field(metadata=described("JSONL file to write; an existing file is continued"))
    n: int = field(default=16, metadata=described("completions of each prompt"))
    vote: Literal["majority", "weighted", "softmax"] | None = field(
        default=None,
        metadata=described(
            "pick by a vote of answers that counts each 1, its score, or its softmax (default: no vote)"
        ),
    )
    answers: Literal["math", "number", "line"] = field(
        default="math",
        metadata=described("how a vote finds the answer: math-verify (extra math), the last number, or the last line"),
    )
    return_candidates: bool = field(default=False, metadata=described("write all completions and their scores"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_funcs is None:
            raise ValueError("best-of-n needs --reward_funcs.")


_FREE = ("input", "output", "generation_batch_size", *SERVER)  # arguments that may change when a run is continued
_ADDED = ("completion", "score", "sample_index", "answer", "candidates")


def make_parser(prog: str | None = "trl-ext best-of-n") -> "Parser":
    """The parser over `BestOfNArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(BestOfNArguments, prog, __doc__)


def run(args: BestOfNArguments) -> dict[str, Any]:
    """
    Complete the rows that have no completion yet.

    Returns:
        `dict` with `rows` (number of rows), `earlier` (rows completed by earlier runs), `without_score` (new rows
        whose pick has no score) and `output` (the path).

    Raises:
        ValueError: if a line is not a JSON object, a row already has one of the output's columns, the existing
            output was made from other rows or with other arguments, or a launcher started several processes.
    """
    check_one_process("best-of-n", SERVERS)
    from trl_ext.pipelines.best_of_n import Picker, as_rows
    from trl_ext.pipelines.generation.records import with_completion
    from trl_ext.pipelines.reward_functions import warn_of_unseen

    rows = as_rows(read_rows(args.input))
    added = [name for name in _ADDED if {"answer": args.vote, "candidates": args.return_candidates}.get(name, True)]
    for number, row in enumerate(rows, start=1):
        taken = [name for name in added if name in row]
        if taken:
            raise ValueError(
                f"{args.input}, row {number} has a column {taken[0]!r}, which the output would overwrite. Rename or "
                "remove it."
            )
    output = output_file(args)
    as_written = [{**row, "prompt": with_completion(row["prompt"], "")[0]} for row in rows]
    done = output.resume(enumerate(as_written, start=1), args.input, total=len(rows))
    if done:
        for identity in output.manifest["rewards"]:
            warn_of_unseen(identity, f"The scores of {identity['name']} in {args.output} are", "give another --output")
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
    """The output file; its settings are everything except the rows that the completions depend on."""
    from trl_ext.pipelines.generation.sampling import Sampling

    settings = {name: value for name, value in asdict(args).items() if name not in _FREE} | _identities(args)
    settings |= asdict(Sampling.of(**sampling_kwargs(args)))  # the content of the files counts, not their names
    return RowFile(Path(args.output), settings, _ADDED, block=CHUNK_ROWS)


def _identities(args: BestOfNArguments) -> dict[str, Any]:
    """The cache keys of the policy and of the reward functions, which cover their contents."""
    from trl_ext.pipelines.generation.backends import model_of_backend
    from trl_ext.pipelines.reward_functions import identity_in_run

    policy = model_of_backend(args.model_name_or_path, args.backend, model_init_kwargs(args))
    return {"policy": policy, "rewards": [identity_in_run(name) for name in args.reward_funcs]}


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
