"""Weights & Biases for the demo: one offline run for each stage that trains, all in one group; nothing is sent.

It knows stages, runs and folders, and nothing of trainers. Only these runs are offline; the environment stays as it
is. A stage goes on where Weights & Biases is missing, switched off or fails, and a warning says so.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from transformers.integrations import is_wandb_available

from trl_ext.pipelines.stages.cached_stages import Stage


logger = logging.getLogger(__name__)

PROJECT = "trl-ext-demo"


def stage_run(stage: Stage, group: str, folder: str | Path) -> AbstractContextManager[str]:
    """[`offline_run`] for a stage that trains; for one that does not, `"none"` and no run."""
    return offline_run(stage.name, group, folder) if stage.trains else nullcontext("none")


@contextmanager
def offline_run(name: str, group: str, folder: str | Path) -> Iterator[str]:
    """
    Opens an offline run, closes it at the end, and gives the `report_to` for trainers, which use the open run.

    Where a run is open already, it is used and stays open.

    Args:
        name (`str`):
            Name of the run.
        group (`str`):
            Group that it belongs to.
        folder (`str` or `Path`):
            Where the folder `wandb` with the run's files goes.

    Yields:
        `str`: `"wandb"`, or `"none"` where no run could be opened.
    """
    if not is_wandb_available():
        logger.warning("Weights & Biases is not installed or switched off (WANDB_DISABLED): no run is recorded.")
        yield "none"
        return
    import wandb

    if wandb.run is not None:
        yield "wandb"
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        run = wandb.init(project=PROJECT, name=name, group=group, dir=str(folder), mode="offline", settings=settings)
    except Exception as error:  # a full disk, a service that does not start: no reason to stop
        logger.warning(f"Weights & Biases could not be started, no run is recorded: {error!r}")
        yield "none"
        return
    try:
        yield "wandb"
    finally:
        try:
            run.finish()
        except Exception as error:
            logger.warning(f"Weights & Biases could not finish the run {name!r}: {error!r}")
