"""`trl-ext rejection-sample`: generate completions, score them, and keep the best. A rerun resumes.

This module maps flags to the arguments of [`~trl_ext.rejection_sample`]; `--stage` runs one stage alone, and `--shard`
one part of the prompts. The command prints a JSON report with the path of the selected rows, once for all processes.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import (
    GenerationArguments,
    described,
    json_object,
    model_init_kwargs,
    sampling_kwargs,
    server_kwargs,
)
from trl_ext.cli.common.options import command_parser, parse
from trl_ext.pipelines.stages.parts import Part


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


@dataclass(kw_only=True)
class RejectionSampleArguments(GenerationArguments):
    """Arguments of `trl-ext rejection-sample`."""

    dataset_name: str = field(metadata=described("Hub id, folder or file of rows with a prompt"))
    dataset_config: str | None = field(default=None, metadata=described("configuration of a Hub dataset"))
    dataset_split: str = field(default="train", metadata=described("split of the dataset"))
    output_dir: str = field(metadata=described("folder for completions, scores and selected rows"))
    stage: Literal["all", "generate", "score", "select"] = field(
        default="all", metadata=described("run one stage alone; it needs the results of the stages before it")
    )
    shard: str | None = field(
        default=None,
        metadata=described(
            "i/n: make the i-th of n parts, for n machines with the same arguments; they share output_dir, or each "
            "has its own and --shards_from merges them. Nothing is selected"
        ),
    )
    shards_from: list[str] | None = field(
        default=None,
        metadata=described(
            "the output_dir of every part: copy their completions and scores (with --stage generate only their "
            "completions), check that none is missing, and go on"
        ),
    )
    num_generations: int = field(default=8, metadata=described("completions of each prompt"))
    shard_size: int = field(default=64, metadata=described("prompts that are generated and stored at a time"))
    selection: str = field(
        default="top_per_prompt", metadata=described("name of a selector; trl-ext plugins lists them")
    )
    selection_kwargs: dict | str | None = field(default=None, metadata=described("options of the selector, as JSON"))
    drop_truncated: bool = field(
        default=False, metadata=described("never select a completion that was cut at max_completion_length")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.selection_kwargs = json_object("selection_kwargs", self.selection_kwargs)
        if self.reward_funcs is None and self.stage != "generate":
            raise ValueError(f"--stage {self.stage} needs --reward_funcs.")
        Part.parse(self.shard)
        if self.shard is not None and (self.stage == "select" or self.shards_from):
            other = "--stage select" if self.stage == "select" else "--shards_from"
            raise ValueError(f"--shard {self.shard} makes one part, and {other} needs all. Leave out --shard.")


def make_parser(prog: str | None = "trl-ext rejection-sample") -> "Parser":
    """The parser over `RejectionSampleArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(RejectionSampleArguments, prog, __doc__)


def run(args: RejectionSampleArguments) -> dict[str, Any] | None:
    """Run the stages of `--stage`. Returns the report of the selection or of the part, `None` if there is none."""
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
    from trl_ext.pipelines.rejection_sampling.selection import check_selection

    if args.stage in ("all", "select"):  # fail before anything is generated
        check_selection(args.selection, args.selection_kwargs)
    splits = load_source(args.dataset_name, args.dataset_config)
    sampler = RejectionSampler(
        args.model_name_or_path,
        args.reward_funcs,
        select_split(splits, args.dataset_split, "--dataset_split"),
        args.output_dir,
        args.num_generations,
        args.seed,
        args.backend,
        reward_weights=args.reward_weights,
        shard_size=args.shard_size,
        generation_batch_size=args.generation_batch_size,
        model_init_kwargs=model_init_kwargs(args),
        server=server_kwargs(args),
        shard=args.shard,
        **sampling_kwargs(args),
    )
    if args.shards_from:
        sampler.merge(args.shards_from, scores=args.stage != "generate")
    if args.stage in ("all", "generate"):
        sampler.generate()
    if args.stage in ("all", "score"):
        sampler.score()
    if args.shard is not None:
        return {"shard": args.shard, "output_dir": args.output_dir}
    if args.stage in ("all", "select"):
        selected = sampler.select(args.selection, args.selection_kwargs, args.drop_truncated)
        return selected.report | {"path": str(selected.path)}
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    from trl_ext.pipelines.rejection_sampling.generate_and_score import Workers

    report = run(args)
    if report is not None and Workers.here().rank == 0:  # one report from all processes of a launcher
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["rejection-sample", *sys.argv[1:]]))
