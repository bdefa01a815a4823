"""Weights & Biases for the demo: one offline run for each stage that trains, all in one group. Nothing is sent.

It knows stages, runs and folders. It knows nothing of trainers. It makes only these runs offline, and changes no
environment variable. If Weights & Biases is missing, switched off or fails, a warning is logged and the stage goes on.
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
    """Opens [`offline_run`] for a stage that trains. For any other stage it opens no run and gives `"none"`."""
    return offline_run(stage.name, group, folder) if stage.trains else nullcontext("none")


@contextmanager
def offline_run(name: str, group: str, folder: str | Path) -> Iterator[str]:
    """
    Opens an offline run and closes it at the end. It gives the `report_to` for trainers, which then use the open run.

    If a run is open already, the trainers use that run, and it stays open.

    Args:
        name (`str`):
            Name of the run.
        group (`str`):
            Group of the run.
        folder (`str` or `Path`):
            The folder `wandb` with the run's files is created in here.

    Yields:
        `str`: `"wandb"`, or `"none"` if no run could be opened.
    """
    if not is_wandb_available():
        logger.warning("Weights & Biases is not installed, or WANDB_DISABLED switches it off. No run is recorded.")
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
    except Exception as error:  # a full disk or a service that does not start must not stop the demo
        logger.warning(f"Weights & Biases could not be started, so no run is recorded: {error!r}")
        yield "none"
        return
    try:
        yield "wandb"
    finally:
        try:
            run.finish()
        except Exception as error:
            logger.warning(f"Weights & Biases could not finish the run {name!r}: {error!r}")
