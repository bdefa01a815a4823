"""`trl-ext label-steps`: label the steps of solutions by rollouts that a verifier judges. A rerun resumes.

This module maps flags to the arguments of [`~trl_ext.label_steps`]. The command prints a JSON report with the path of
the rows, which `trl-ext prm` trains on.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import (
    WriterArguments,
    described,
    model_init_kwargs,
    sampling_kwargs,
    server_kwargs,
)
from trl_ext.cli.common.options import command_parser, parse, report_to_wandb


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


@dataclass(kw_only=True)
class LabelStepsArguments(WriterArguments):
    """Arguments of `trl-ext label-steps`. `--reward_funcs` names the verifier."""

    dataset_name: str = field(
        metadata=described("Hub id, folder or file of rows with a prompt, and with completions (steps) if they exist")
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata=described(
            "the verifier, exactly one: a folder or Hub id of a reward model, a name of trl.rewards (accuracy_reward "
            "...), a judge (judge.yaml), or a function: package.module.function or file.py:function"
        ),
    )
    dataset_config: str | None = field(default=None, metadata=described("configuration of a Hub dataset"))
    dataset_split: str = field(default="train", metadata=described("split of the dataset"))
    output_dir: str = field(metadata=described("folder for solutions, rollouts and labelled rows"))
    method: Literal["full", "binary", "adaptive"] = field(
        default="full",
        metadata=described(
            "rollouts from every step; a binary search for the first wrong one; or that search with rollouts only "
            "until they decide"
        ),
    )
    num_rollouts: int = field(default=8, metadata=described("rollouts of a prefix, with adaptive at most"))
    labels: Literal["soft", "hard"] | None = field(
        default=None,
        metadata=described("the share of right rollouts, or 0 and 1 (default: soft for full, hard for the others)"),
    )
    threshold: float = field(
        default=0.0, metadata=described("hard labels: share of right rollouts above which a step is right; 0: any")
    )
    error: float = field(
        default=0.1,
        metadata=described("adaptive with a threshold above 0: error of the confidence sequence that stops a prefix"),
    )
    right_above: float = field(default=0.5, metadata=described("a score above it means a right answer"))
    reuse: bool = field(
        default=True, metadata=described("share rollouts of equal prefixes, and count them for prefixes on their way")
    )
    denoise: bool = field(default=False, metadata=described("denoise labels by the policy's confidence (SCAN)"))
    min_confidence: float = field(
        default=0.0, metadata=described("denoise: leave out prompts with at most this share of right solutions")
    )
    tolerance: int = field(default=2, metadata=described("denoise: soft labels for so many steps before an error"))
    num_solutions: int = field(default=4, metadata=described("solutions to generate for each prompt without steps"))
    step_separator: str = field(default="\n", metadata=described("text after each step (a line break), as for prm"))
    segmenter: str = field(default="steps", metadata=described("how generated solutions are split into steps"))
    label_end: bool = field(
        default=False, metadata=described("add an empty step for the end of each generated solution")
    )
    chunk_size: int = field(
        default=64, metadata=described("prompts, or given solutions, that are labelled together and stored at a time")
    )
    report_to: Literal["none", "wandb"] = field(
        default="none", metadata=described("wandb: put numbers and a table of rows on a run")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_funcs is None or len(self.reward_funcs) != 1:
            raise ValueError(f"--reward_funcs is {self.reward_funcs}; needed: one reward function, the verifier.")


# Arguments that reach `label_steps_with_report` under their own name.
_SAME = ("method", "num_rollouts", "labels", "threshold", "error", "right_above", "reuse", "denoise", "min_confidence")
_SAME += ("tolerance", "num_solutions", "step_separator", "segmenter", "label_end", "chunk_size", "seed", "backend")
_SAME += ("generation_batch_size",)


def make_parser(prog: str | None = "trl-ext label-steps") -> "Parser":
    """The parser over `LabelStepsArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(LabelStepsArguments, prog, __doc__)


def run(args: LabelStepsArguments) -> dict[str, Any]:
    """Label what is missing. Returns the report, with the path of the rows."""
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.feedback.step_labels import label_steps_with_report

    splits = load_source(args.dataset_name, args.dataset_config)
    found = label_steps_with_report(
        args.model_name_or_path,
        select_split(splits, args.dataset_split, "--dataset_split"),
        args.reward_funcs[0],
        args.output_dir,
        model_init_kwargs=model_init_kwargs(args),
        server=server_kwargs(args),
        **{name: getattr(args, name) for name in _SAME},
        **sampling_kwargs(args),
    )
    report_to_wandb("label-steps", args, found.log_to_wandb)
    return found.report


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    print(json.dumps(run(args), indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["label-steps", *sys.argv[1:]]))
