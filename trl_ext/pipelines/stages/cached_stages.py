"""Stages that depend on each other. Each has a folder, which is kept and reused.

The result of a stage is reused until something changes that it depends on: its settings, the versions of the
libraries, or (through their cache keys) the stages that it needs. This module does not know what a stage does.

    >>> two = Stage("two", "Two", lambda context: {"value": context.settings["value"]}, {"value": 2})
    >>> four = Stage("four", "Four", lambda context: {"value": 2 * context.results["two"]["value"]}, {}, ("two",))
    >>> outcomes = run_stages([two, four], output_dir="outputs/example")
    >>> outcomes["four"].result, outcomes["four"].cached
    ({'value': 4}, False)
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.cache_key import canonical, changes_between
from trl_ext.pipelines.stages.runner import JobRunner, StageError, ThisProcess


logger = logging.getLogger(__name__)

RECORD = "stage.json"
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class StageContext:
    """
    The inputs of a stage when it runs.

    Args:
        folder (`Path`):
            An empty folder for its files. It is moved when the stage is done, so no file in it may hold its path.
        settings (`Mapping[str, Any]`):
            The stage's settings.
        results (`Mapping[str, dict]`):
            The results of the stages that it needs, by name.
        folders (`Mapping[str, Path]`):
            The folders of these stages.
        report_to (`str`):
            The value for a trainer's `report_to`.
        progress (`Callable[[float], None]`):
            A function to call with the share that is done, in `[0, 1]`.
    """

    folder: Path
    settings: Mapping[str, Any]
    results: Mapping[str, dict[str, Any]]
    folders: Mapping[str, Path]
    report_to: str
    progress: Callable[[float], None]


@dataclass(frozen=True)
class Stage:
    """
    A step of a pipeline whose result is kept.

    Args:
        name (`str`):
            Name of the stage and of its folder.
        title (`str`):
            Name in the progress display.
        run (`Callable[[StageContext], dict]`):
            Does the work, writes its files into `context.folder`, and returns a result of JSON values.
        settings (`Mapping[str, Any]`):
            Everything that its result depends on, as JSON values. Convert the arguments of a trainer with
            [`~trl_ext.pipelines.stages.training_arguments.arguments_key`].
        needs (`tuple[str, ...]`, *optional*):
            Names of the stages whose results or folders it uses.
        seconds (`float`, *optional*, defaults to `10.0`):
            How long it takes on two CPU cores, for the estimate of the remaining time.
        trains (`bool`, *optional*, defaults to `False`):
            Whether it trains, and therefore has a separate run on Weights & Biases.
    """

    name: str
    title: str
    run: Callable[[StageContext], dict[str, Any]]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    seconds: float = 10.0
    trains: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage: result, folder, seconds, and whether the result was reused from an earlier run."""

    result: dict[str, Any]
    folder: Path
    seconds: float
    cached: bool
    title: str


def stage_keys(stages: Sequence[Stage]) -> dict[str, str]:
    """
    The cache key of each stage, by name.

    Raises:
        [`StageError`]: Two stages have one name, or a stage needs one that does not come before it.
    """
    versions = {name: version(name) for name in ("trl-ext", *LIBRARIES)}
    keys: dict[str, str] = {}
    for stage in stages:
        if stage.name in keys:
            raise StageError(f"two stages are called {stage.name!r}; names are folders and must differ")
        missing = [name for name in stage.needs if name not in keys]
        if missing:
            raise StageError(f"stage {stage.name!r} needs {missing}; put them before it. Before it are: {list(keys)}")
        content = {
            "name": stage.name,
            "settings": dict(stage.settings),
            "versions": versions,
            "needs": {name: keys[name] for name in stage.needs},
        }
        keys[stage.name] = hashlib.sha256(canonical(content)).hexdigest()
    return keys


def find_done(stages: Sequence[Stage], output_dir: str | Path) -> dict[str, Outcome]:
    """The stages whose folders in `output_dir` hold a result that is still valid, by name."""
    done = {}
    keys = stage_keys(stages)
    for stage in stages:
        folder = Path(output_dir) / stage.name
        record = _read_record(folder)
        if record is not None and record["key"] == keys[stage.name]:
            done[stage.name] = Outcome(record["result"], folder, record["seconds"], cached=True, title=stage.title)
        elif record is not None:
            changes = changes_between(record.get("settings", {}), json.loads(json.dumps(dict(stage.settings))))
            because = "; ".join(map(str, changes)) or "a library or a stage that it needs changed"
            logger.info(f"The stage {stage.name!r} runs again: {because}.")
    return done


def _no_run(stage: Stage) -> AbstractContextManager[str]:
    return nullcontext("none")


def run_stages(
    stages: Sequence[Stage],
    output_dir: str | Path,
    *,
    fresh: bool = False,
    on_start: Callable[[Stage], None] = lambda stage: None,
    on_progress: Callable[[Stage, float], None] = lambda stage, share: None,
    on_end: Callable[[Stage, Outcome], None] = lambda stage, outcome: None,
    open_run: Callable[[Stage], AbstractContextManager[str]] = _no_run,
    runner: JobRunner | None = None,
) -> dict[str, Outcome]:
    """
    Run the stages, except those whose result is still valid.

    A stage writes to `<name>.partial`, which is renamed to `<name>` when the stage is done, so an interrupted run
    leaves no folder that looks complete. Only folders that a stage of this name made are replaced.

    Args:
        stages (`Sequence[Stage]`):
            The stages; each comes after those that it needs.
        output_dir (`str` or `Path`):
            The folder that holds the stages' folders.
        fresh (`bool`, *optional*, defaults to `False`):
            Run all stages, even those with a valid result.
        on_start (`Callable[[Stage], None]`, *optional*):
            Called before each stage that runs.
        on_progress (`Callable[[Stage, float], None]`, *optional*):
            Called with a stage and the share of it that is done.
        on_end (`Callable[[Stage, Outcome], None]`, *optional*):
            Called after every stage, including reused ones.
        open_run (`Callable[[Stage], AbstractContextManager[str]]`, *optional*):
            Opens a stage's run on an experiment tracker and gives its `report_to`. It is closed when the stage ends.
        runner ([`~trl_ext.pipelines.stages.runner.JobRunner`], *optional*):
            Where stages run: by default one after the other in this process. With
            [`~trl_ext.pipelines.stages.runner.OwnProcesses`] they run side by side, each as soon as the stages that it
            needs are done and a process is free; `run` and `open_run` are then functions of a module.

    Returns:
        `dict[str, Outcome]`: By name, in order.

    Raises:
        [`StageError`]: see [`stage_keys`]; or JSON cannot represent a result; or a folder has a stage's name but was
            not made by a stage.
    """
    output_dir = Path(output_dir)
    keys = stage_keys(stages)
    by_name = {stage.name: stage for stage in stages}
    runner = ThisProcess() if runner is None else runner
    outcomes = {} if fresh else find_done(stages, output_dir)
    for name, outcome in outcomes.items():
        on_end(by_name[name], outcome)
    waiting = [stage for stage in stages if stage.name not in outcomes]
    while len(outcomes) < len(stages):
        ready = [stage for stage in waiting if all(name in outcomes for name in stage.needs)]
        for stage in ready[: runner.free]:
            waiting.remove(stage)
            on_start(stage)
            needed = {name: outcomes[name] for name in stage.needs}
            runner.start(stage.name, partial(_run, stage, keys[stage.name], output_dir, needed, open_run))
        name, outcome = runner.wait(lambda name, share: on_progress(by_name[name], share))
        outcomes[name] = outcome
        on_end(by_name[name], outcome)
    return {stage.name: outcomes[stage.name] for stage in stages}


def _run(
    stage: Stage,
    key: str,
    output_dir: Path,
    needed: Mapping[str, Outcome],
    open_run: Callable[[Stage], AbstractContextManager[str]],
    on_progress: Callable[[float], None],
) -> Outcome:
    folder, draft = output_dir / stage.name, output_dir / f"{stage.name}.partial"
    if folder.exists() and _read_record(folder) is None:
        raise StageError(
            f"{folder} exists but was not made by this stage (it has no {RECORD}), so it is not replaced. "
            "Move it away or choose another output folder."
        )
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    start = time.monotonic()
    with open_run(stage) as report_to:
        result = stage.run(
            StageContext(
                folder=draft,
                settings=stage.settings,
                results={name: outcome.result for name, outcome in needed.items()},
                folders={name: outcome.folder for name, outcome in needed.items()},
                report_to=report_to,
                progress=on_progress,
            )
        )
    seconds = time.monotonic() - start
    record = {"key": key, "settings": dict(stage.settings), "seconds": seconds, "result": result}
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StageError(f"the result of stage {stage.name!r} cannot be stored as JSON: {error}") from error
    (draft / RECORD).write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    # return what a later run will read: JSON turns tuples into lists
    return Outcome(json.loads(text)["result"], folder, seconds, cached=False, title=stage.title)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage; `None` if there is none or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and {"key", "seconds", "result"} <= record.keys() else None
