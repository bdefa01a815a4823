"""The rounds of a run on disk: finds those that are done, deletes unneeded policies, and compares settings on a rerun.

    rounds/settings.json     the settings that every round depends on
    rounds/initial/          the first policy, if it was passed as a model in memory
    rounds/0/round.json      the policy before training, evaluated
    rounds/1/samples/        completions, scores and selections
    rounds/1/selection.json  the metrics of the selection
    rounds/1/rows.jsonl      the selected rows
    rounds/1/sft/            checkpoints of the fine-tuning, while it runs
    rounds/1/policy/         the trained policy
    rounds/1/round.json      its metrics; written last

This module knows folders and numbers. It does not know models, trainers or samples.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.store import check_manifest, write_json, write_lines


class Rounds:
    """
    The folder of a run's rounds.

    Args:
        folder (`Path`): the folder, which need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def clear(self) -> None:
        """Delete all rounds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, settings: dict[str, Any]) -> None:
        """
        Store the settings, or compare them with those of the stored rounds.

        Raises:
            [`~trl_ext.pipelines.stages.cache_key.StaleError`]: the settings differ; it names the differences.
        """
        check_manifest(
            self.folder / "settings.json",
            settings,
            f"The rounds in {self.folder} were",
            "Continue with the old settings, give another output_dir, or start over with "
            "train(resume_from_checkpoint=False).",
        )

    def history(self) -> list[dict[str, Any]]:
        """The metrics of the rounds that are done, from round 0 on."""
        done = []
        while (path := self.of(len(done)) / "round.json").is_file():
            done.append(json.loads(path.read_text(encoding="utf-8")))
        return done

    def record(self, metrics: dict[str, Any]) -> None:
        """Mark a round as done."""
        write_json(self.of(metrics["round"]) / "round.json", metrics)
        shutil.rmtree(self.of(metrics["round"]) / "sft", ignore_errors=True)

    def of(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / str(number)

    def policy(self, number: int) -> Path:
        """The folder of the policy that a round trained."""
        return self.of(number) / "policy"

    def finish_selection(self, number: int, rows: Iterable[dict[str, Any]], metrics: dict[str, Any]) -> None:
        """Store the rows that a round selected, unless it has some, and their metrics."""
        write_json(self.of(number) / "selection.json", metrics)
        if not self.rows(number).is_file():
            write_lines(self.rows(number), rows, checksums=False)

    def rows(self, number: int) -> Path:
        """The file of the rows that a round selected."""
        return self.of(number) / "rows.jsonl"

    def selected(self, number: int) -> dict[str, Any] | None:
        """The metrics that [`~Rounds.finish_selection`] stored; `None` for a round that has selected nothing yet."""
        path = self.of(number) / "selection.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and self.rows(number).is_file() else None

    def finish_training(self, number: int, output: dict[str, Any]) -> None:
        """Move the trained policy to its place and store the output of its training."""
        write_json(self.of(number) / "training.json", output)
        os.replace(self.of(number) / "policy.partial", self.policy(number))

    def trained(self, number: int) -> dict[str, Any]:
        """The output that [`~Rounds.finish_training`] stored."""
        return json.loads((self.of(number) / "training.json").read_text(encoding="utf-8"))

    def keep(self, numbers: set[int]) -> None:
        """Delete the policies of all other rounds."""
        for path in self.folder.glob("*/policy"):
            if int(path.parent.name) not in numbers:
                shutil.rmtree(path)

    def last_checkpoint(self, number: int) -> str | None:
        """The newest complete checkpoint of a round's fine-tuning. It has a trainer state, which is written last."""
        found = []
        for path in (self.of(number) / "sft").glob("checkpoint-*"):
            try:
                json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            found.append(path)
        return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def best_round(history: list[dict[str, Any]]) -> int:
    """The round whose policy is kept: the best by verifier, else by reward, else the last. A tie keeps the first."""
    for name in ("eval_verifier", "eval_reward"):
        rated = [row for row in history if row["round"] > 0 and name in row]
        if rated:
            return max(rated, key=lambda row: row[name])["round"]
    return history[-1]["round"]
