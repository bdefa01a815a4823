"""`trl-ext demo`: train and compare reward models of three kinds on the samples of a tiny policy, offline.

This module knows arguments, output folders and exit statuses. `trl_ext.demo` does the work.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from trl_ext.pipelines.stages.one_process import check_one_process


def make_parser(prog: str | None = "trl-ext demo") -> argparse.ArgumentParser:
    """The parser of the demo's options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a tiny policy to sort digits, and sample and rate its solutions. Train reward models on "
        "the rankings, on right and wrong answers, and on right and wrong lines. Reload the models, and compare the "
        "answers that they pick with a random pick, a majority vote and an oracle. Then fine-tune the policy on its "
        "own samples, chosen by the verifier and by the models, and train it by GRPO with and without the verdicts "
        "of the model of lines. The demo runs offline on two CPU cores in about eleven "
        "minutes. It writes a table, report.json, a plot (if matplotlib is installed) and offline runs of Weights & "
        "Biases.",
        epilog="Exit status: 0 if every reward model beat the random pick by more than the sampling error (1.96 "
        "standard errors of the paired difference) and scored the same after a reload, and the policy learnt more "
        "from the verifier's choice than from a random choice; otherwise 1, or 130 after an interrupt. A smoke run "
        "gives no verdict.",
    )
    parser.add_argument(
        "--output_dir", help="default: outputs/demo_seed<N>, for a smoke run outputs/demo_smoke_seed<N>"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, weights and samples (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="run a few steps of each stage, without a verdict")
    parser.add_argument("--fresh", action="store_true", help="run every stage again, even if its result is valid")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="stages that run at the same time, each in a process on one core (default: 2, or 1 on a single core). "
        "The figures do not depend on it",
    )
    return parser


# These variables stop the libraries of this process from looking anything up and from sending anything.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their values at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepare() -> None:
    """Prepare a process that runs stages: one thread, and no progress bars or warnings of libraries."""
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns that a kernel could be downloaded
    import datasets
    import torch
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hf_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # from TRL's and PEFT's calls of transformers
    torch.set_num_threads(1)  # measured on two busy cores: with so small a model, two threads take ten times as long


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1 is needed")
    check_one_process("demo")
    name = f"demo{'_smoke' if args.smoke else ''}_seed{args.seed}"
    output_dir = Path(args.output_dir or f"outputs/{name}").resolve()
    print(f"trl-ext demo: files go to {output_dir}", flush=True)
    with _environment(OFFLINE):
        return _run(output_dir, name, args.seed, args.smoke, args.fresh, args.workers)


def _run(output_dir: Path, name: str, seed: int, smoke: bool, fresh: bool, workers: int) -> int:
    start = time.monotonic()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print("loading torch, transformers and trl ...", flush=True)
    from trl_ext.demo.plan import plan
    from trl_ext.demo.report import format_table, make_report, save_plot, save_report
    from trl_ext.demo.tracking import stage_run
    from trl_ext.pipelines.stages.cached_stages import find_done, run_stages
    from trl_ext.pipelines.stages.progress import Progress, ended
    from trl_ext.pipelines.stages.runner import OwnProcesses, StageError

    stages = plan(seed, smoke)
    titles = {stage.name: stage.title for stage in stages}
    done = {} if fresh else find_done(stages, output_dir)
    expected = {stage.title: stage.seconds for stage in stages if stage.name not in done}
    needs = {stage.title: [titles[name] for name in stage.needs] for stage in stages}
    group = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with Progress(expected, needs, workers) as progress, OwnProcesses(workers, _prepare) as processes:
            outcomes = run_stages(
                stages,
                output_dir,
                fresh=fresh,
                on_start=lambda stage: progress.start(stage.title),
                on_progress=lambda stage, share: progress.update(stage.title, share),
                on_end=lambda stage, outcome: progress.finish(stage.title, ended(stage.title, outcome)),
                open_run=partial(stage_run, group=group, folder=output_dir),
                runner=processes,
            )
    except StageError as error:
        print(f"trl-ext demo: {error}", file=sys.stderr)
        return 1

    wandb_dir = output_dir / "wandb"
    seconds = time.monotonic() - start
    found = str(wandb_dir) if wandb_dir.is_dir() else None
    report = make_report(outcomes, seed=seed, smoke=smoke, seconds=seconds, wandb_dir=found)
    save_report(report, output_dir / "report.json")
    drawn = save_plot(report, output_dir / "plot.png")
    print(f"\n{format_table(report)}\n")
    print(f"  report:  {output_dir / 'report.json'}")
    plot = output_dir / "plot.png" if drawn else "none (matplotlib is not installed: pip install 'trl-ext[plots]')"
    print(f"  plot:    {plot}")
    print(f"  GRPO:    {output_dir / 'dense' / 'shaped' / 'policy.html'}")
    print(f"  W&B:     {found or 'no run was recorded'}{' (offline; wandb sync sends it)' if found else ''}")
    if smoke:
        print("\nSmoke run: everything ran. Its figures mean nothing, so there is no verdict.")
    elif report["passed"]:
        print("\nPassed: every reward model and the verifier's choice beat a random one by more than sampling error.")
    for failure in report["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["demo", *sys.argv[1:]]))
