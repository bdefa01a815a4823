"""`trl-ext best-of-n`: the best of n completions for each row of a JSONL file, in order, resumable.

It knows arguments, and files of rows. The picks are those of [`~trl_ext.best_of_n`]. A row has a `prompt` (text or
messages), and columns that the reward functions may want; it gets `completion`, `score` and `sample_index`, and on
request `answer` and `candidates`.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._train import parse


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_ext.pipelines.best_of_n import Best


CHUNK_ROWS = 64  # rows that are completed at a time with a seed of their own, and what an interruption costs


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class BestOfNArguments:
    """Arguments of `trl-ext best-of-n`."""

    model_name_or_path: str = field(metadata=_help("folder or Hub id of what completes; for openai its name there"))
    reward_funcs: list[str] = field(
        metadata=_help("folders or Hub ids of reward models, names of trl.rewards, dotted paths of functions")
    )
    input: str = field(metadata=_help("JSONL file of rows with a prompt"))
    output: str = field(metadata=_help("JSONL file to write; if it is there already, it is gone on with"))
    n: int = field(default=16, metadata=_help("completions of each prompt"))
    reward_weights: list[float] | None = field(default=None, metadata=_help("one for each of them (default: 1)"))
    vote: Literal["majority", "weighted", "softmax"] | None = field(
        default=None,
        metadata=_help("count answers: each as one, by scores, or by their softmax (default: no vote)"),
    )
    answers: Literal["math", "number", "line"] = field(
        default="math", metadata=_help("how a vote reads answers: by math-verify, the last number, the last line")
    )
    return_candidates: bool = field(default=False, metadata=_help("write all completions with their scores too"))

    max_completion_length: int = field(default=512, metadata=_help("longest completion in tokens"))
    temperature: float = field(default=1.0, metadata=_help("of the sampling"))
    top_p: float = field(default=1.0, metadata=_help("nucleus; 1: off"))
    top_k: int = field(default=0, metadata=_help("most likely tokens to keep; 0: off"))
    min_p: float | None = field(default=None, metadata=_help("least probability, scaled by the likeliest token's"))
    stop: list[str] | None = field(default=None, metadata=_help("texts that end a completion"))
    system_prompt: str | None = field(default=None, metadata=_help("put before chats without a system message"))
    seed: int = field(default=0, metadata=_help("of the generation"))

    backend: Literal["transformers", "vllm", "openai"] = field(
        default="transformers",
        metadata=_help("in this process, a vLLM server through TRL's client, or any OpenAI-compatible server"),
    )
    generation_batch_size: int = field(default=32, metadata=_help("completions in a batch, in this process"))
    model_revision: str | None = field(default=None, metadata=_help("revision of the model on the Hub"))
    dtype: str | None = field(default=None, metadata=_help("of the model, e.g. bfloat16 (default: as saved)"))
    attn_implementation: str | None = field(default=None, metadata=_help("e.g. sdpa, flash_attention_2"))
    load_in_4bit: bool = field(default=False, metadata=_help("load the model in NF4 with bitsandbytes"))
    trust_remote_code: bool = field(default=False, metadata=_help("run code that comes with the model"))
    server_base_url: str = field(default="http://localhost:8000", metadata=_help("where the server is"))


_SAMPLING = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "stop", "system_prompt")
_FREE = ("input", "output", "generation_batch_size", "server_base_url")  # what may change when it goes on


def make_parser(prog: str | None = "trl-ext best-of-n") -> "TrlParser":
    """TRL's parser over `BestOfNArguments`: flags, or `--config x.yaml` with the same names."""
    from trl import TrlParser

    return TrlParser(BestOfNArguments, prog=prog, allow_abbrev=False, description=__doc__.split("\n\n")[0])


def run(args: BestOfNArguments) -> dict[str, Any]:
    """
    Complete the rows that have no completion yet. Returns how many there are, and how many could not be scored.

    Raises:
        ValueError: a line is no JSON object, or the output was made of other rows or with other arguments.
    """
    from trl_ext.cli.rejection_sample import model_init_kwargs
    from trl_ext.pipelines.best_of_n import Picker, as_rows

    rows = as_rows(read_rows(args.input))
    output = Path(args.output)
    done = _resume(args, output, rows)
    unscored = 0
    if done < len(rows):
        in_process = args.backend == "transformers"
        kwargs = {"generation_batch_size": args.generation_batch_size} if in_process else {}
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
            backend_kwargs=kwargs if in_process else {**kwargs, "server_base_url": args.server_base_url},
            **{name: getattr(args, name) for name in _SAMPLING},
        )
        with output.open("ab") as file:
            for first in range(done, len(rows), CHUNK_ROWS):
                chunk = rows[first : first + CHUNK_ROWS]
                picks = picker(chunk, seed=args.seed + first)
                unscored += sum(pick.score is None for pick in picks)
                lines = [_line(row, pick, args) for row, pick in zip(chunk, picks, strict=True)]
                file.write("".join(lines).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
                print(f"{first + len(chunk)} of {len(rows)} rows", file=sys.stderr)
    return {"rows": len(rows), "earlier": done, "without_score": unscored, "output": str(output)}


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    rows = []
    # split at line feeds only: a text may hold other characters that Python takes for the end of a line
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds a {type(row).__name__}; needed: an object with a prompt.")
        rows.append(row)
    return rows


def _resume(args: BestOfNArguments, output: Path, rows: list[dict[str, Any]]) -> int:
    """How many rows are done; what was written of an unfinished chunk is cut off."""
    settings = {name: value for name, value in asdict(args).items() if name not in _FREE}
    manifest = output.with_name(output.name + ".args.json")
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return 0
    there = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    different = [name for name, value in settings.items() if there.get(name) != value]
    if different:
        raise ValueError(
            f"{output} is there and was made with other arguments ({', '.join(different)}), or by something else. "
            "Give another output, or delete it."
        )
    lines = [line for line in output.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    done = len(lines) if len(lines) == len(rows) else len(lines) // CHUNK_ROWS * CHUNK_ROWS
    for number, (line, row) in enumerate(zip(lines[:done], rows, strict=False), start=1):
        if json.loads(line)["prompt"] != row["prompt"]:
            raise ValueError(f"{output}, line {number} has another prompt than the input. Give another output.")
    if done > len(rows):
        raise ValueError(f"{output} has {done} rows, and the input {len(rows)}. Give another output.")
    with output.open("r+b") as file:
        file.truncate(sum(map(len, lines[:done])))
    return done


def _line(row: dict[str, Any], pick: "Best", args: BestOfNArguments) -> str:
    found = {"completion": pick.completion, "score": pick.score, "sample_index": pick.sample_index}
    if args.vote is not None:
        found["answer"] = pick.answer
    if pick.candidates is not None:
        kept = ("completion", "score", "scores", "finish_reason")
        found["candidates"] = [{name: getattr(item, name) for name in kept} for item in pick.candidates]
    return json.dumps({**row, **found}, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    print(json.dumps(run(args), indent=2))
    return 0


if __name__ == "__main__":
    from .main import main as trl_ext

    sys.exit(trl_ext(["best-of-n", *sys.argv[1:]]))
