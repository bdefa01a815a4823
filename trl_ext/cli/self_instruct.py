"""`trl-ext self-instruct`: let a model make up tasks from a few seeds, as rows for `SFTTrainer`. A rerun resumes.

This module maps flags to the arguments of [`~trl_ext.self_instruct`]. The command prints the report as JSON, with the
path of the rows.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import (
    WriterArguments,
    described,
    model_init_kwargs,
    sampling_kwargs,
    server_kwargs,
)
from trl_ext.cli.common.options import command_parser, parse


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


@dataclass(kw_only=True)
class SelfInstructArguments(WriterArguments):
    """Arguments of `trl-ext self-instruct`."""

    seed_tasks: str = field(
        metadata=described("JSONL file of seed tasks: instruction, output, and optionally input, is_classification")
    )
    output_dir: str = field(metadata=described("folder for the rounds, the rows and the report"))
    num_tasks: int = field(default=100, metadata=described("tasks to make; a finished run goes on with more"))
    style: Literal["completion", "chat"] = field(
        default="completion", metadata=described("completion: texts for a base model; chat: messages")
    )
    num_seed_demonstrations: int = field(default=6, metadata=described("seeds that a prompt for instructions shows"))
    num_generated_demonstrations: int = field(
        default=2, metadata=described("generated tasks that it shows; at first seeds stand in")
    )
    tasks_per_prompt: int = field(default=8, metadata=described("instructions that a prompt asks for"))
    prompts_per_round: int = field(default=16, metadata=described("prompts of a round, which is stored at a time"))
    max_rounds: int | None = field(
        default=None, metadata=described("most rounds (default: ten times those that could be enough)")
    )
    num_classification_examples: int = field(
        default=12, metadata=described("most classification seeds in the question for the kind of a task")
    )
    num_other_examples: int = field(default=19, metadata=described("most other seeds in that question"))
    num_instance_examples: int = field(
        default=8, metadata=described("most seeds in the question for an input and an output")
    )
    max_similarity: float = field(
        default=0.7, metadata=described("drop instructions whose ROUGE-L to another one reaches this")
    )
    min_words: int = field(default=4, metadata=described("drop shorter instructions"))
    max_words: int = field(default=150, metadata=described("drop longer instructions"))
    keywords: list[str] | None = field(
        default=None,
        metadata=described("drop instructions with one of these words (default: image, graph, video ...)"),
    )
    template_dir: str | None = field(
        default=None, metadata=described("folder with Jinja templates in place of those of the package")
    )
    report_to: Literal["none", "wandb"] = field(
        default="none", metadata=described("put the counts and a table of rows on a Weights & Biases run")
    )
    temperature: float = field(default=0.7, metadata=described("temperature of new instructions"))
    top_p: float = field(default=0.5, metadata=described("nucleus of new instructions; 1 switches it off"))


def make_parser(prog: str | None = "trl-ext self-instruct") -> "Parser":
    """The parser over `SelfInstructArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(SelfInstructArguments, prog, __doc__)


def run(args: SelfInstructArguments) -> dict[str, Any]:
    """Make the tasks. Returns the report, with the `path` of the rows."""
    from trl_ext import self_instruct

    options = server_kwargs(args) or {"generation_batch_size": args.generation_batch_size}
    if args.backend != "openai":
        options["model_init_kwargs"] = model_init_kwargs(args)
    own = {item.name for item in fields(SelfInstructArguments)} - {item.name for item in fields(WriterArguments)}
    arguments = {name: getattr(args, name) for name in own | {"seed", "backend"}} | sampling_kwargs(args)
    if args.keywords is None:
        del arguments["keywords"]
    self_instruct(args.model_name_or_path, backend_kwargs=options, **arguments)
    folder = Path(args.output_dir)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report | {"path": str(folder / "tasks.jsonl")}


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    print(json.dumps(run(args), indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["self-instruct", *sys.argv[1:]]))
