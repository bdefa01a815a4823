"""Reads the stored samples of a run: as arrays for selecting, as `Sample`s, and the selected ones as rows.

It reads shard by shard. Memory holds only numbers of all samples, and texts are parsed only for prompts with a
selected sample. This module knows stores; `selection` makes the selection.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.pipelines.generation.generator import template_kwargs
from trl_ext.pipelines.generation.records import Sample, text_of, with_completion
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.rejection_sampling.generate_and_score import sample_of
from trl_ext.pipelines.rejection_sampling.prompts import NOT_KEPT, PromptFile
from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection, text_hash
from trl_ext.pipelines.reward_functions import weighted_total, weighted_totals
from trl_ext.pipelines.stages.store import ShardStore, StoreError


@dataclass
class Table:
    """
    All samples of a run as arrays.

    Args:
        scored ([`~trl_ext.pipelines.rejection_sampling.scored.Scored`]): the samples with their weighted totals.
        scores (`np.ndarray` of shape `(M, N)`): scores of each reward function; NaN for samples that it cannot score.
    """

    scored: Scored
    scores: np.ndarray


@dataclass
class StoredSamples:
    """
    Completions with their scores, in complete stores.

    Args:
        prompts ([`~trl_ext.pipelines.rejection_sampling.prompts.PromptFile`]): the run's prompts.
        rollouts ([`~trl_ext.pipelines.stages.store.ShardStore`]): their completions.
        scores (`dict[str, ShardStore]`): the scores of each reward function.
        weights (`dict[str, float]`): the weight of each function.
        num_generations (`int`): completions of each prompt.
        sampling ([`~trl_ext.pipelines.generation.sampling.Sampling`]): how they were sampled.
    """

    prompts: PromptFile
    rollouts: ShardStore
    scores: dict[str, ShardStore]
    weights: dict[str, float]
    num_generations: int
    sampling: Sampling

    def table(self) -> Table:
        """The arrays of all samples. Only the files of scores are read."""
        weights = np.array([self.weights[name] for name in self.scores])  # (M,)
        parts: list[list[np.ndarray]] = []
        by_function: list[np.ndarray] = []
        at = 0
        for shard, size in enumerate(self.prompts.sizes):
            columns = [list(store.read(shard)) for store in self.scores.values()]
            lines = columns[0]
            scores = np.array(
                [[score for line in column for score in line["scores"]] for column in columns], dtype=np.float64
            )  # (M, N)
            total = weighted_totals(scores, weights)  # (N,)
            by_function.append(scores)
            parts.append(
                [
                    np.repeat(np.arange(at, at + size), self.num_generations),
                    np.tile(np.arange(self.num_generations), size),
                    total,
                    np.array([value for line in lines for value in line["text_hash"]], dtype=np.uint64),
                    np.array([value for line in lines for value in line["length"]], dtype=np.int64),
                    np.array([value for line in lines for value in line["finished"]], dtype=bool),
                ]
            )
            at += size
        scored = Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return Table(scored, np.concatenate(by_function, axis=1))

    def samples(self) -> Iterator[list[Sample]]:
        """The samples of each prompt with their scores, in the order of the prompts. They are read one by one."""
        for shard, rows in self.prompts.shards(range(len(self.prompts.sizes))):
            scores = [store.read(shard) for store in self.scores.values()]
            for row, line, *lines in zip(rows, self.rollouts.read(shard), *scores, strict=True):
                self._check(shard, row, line, lines[0]["text_hash"])
                by_sample = zip(*(own["scores"] for own in lines), strict=True)
                yield [
                    self._sample(row, index, stored, own)
                    for index, (stored, own) in enumerate(zip(line["samples"], by_sample, strict=True))
                ]

    def rows(self, table: Table, chosen: Selection) -> Iterator[dict[str, Any]]:
        """A row for each selected sample, pair or group, in the order of the prompts."""
        if chosen.kind == "pairs":
            items: Sequence[np.ndarray] = np.stack([chosen.rows, chosen.rejected], axis=1)
        else:
            items = chosen.groups if chosen.kind == "groups" else chosen.rows[:, None]
        first = np.array([item[0] for item in items], dtype=np.int64)  # rows of the table: prompt after prompt
        order = np.argsort(first, kind="stable")
        prompt = first[order] // self.num_generations
        of_shard = np.split(order, np.searchsorted(prompt, np.cumsum(self.prompts.sizes)[:-1]))
        for shard, rows in self.prompts.shards([shard for shard, own in enumerate(of_shard) if len(own)]):
            own, start = of_shard[shard], shard * self.prompts.shard_size
            places, begins = np.unique(first[own] // self.num_generations - start, return_index=True)
            lines = self.rollouts.read(shard, places.tolist())
            for place, line, wanted in zip(places.tolist(), lines, np.split(own, begins[1:]), strict=True):
                at = (start + place) * self.num_generations  # the prompt's first row of the table
                hashes = table.scored.text_hash[at : at + self.num_generations].tolist()
                self._check(shard, rows[place], line, hashes)
                for item in wanted:
                    members = [
                        self._sample(rows[place], row - at, line["samples"][row - at], table.scores[:, row])
                        for row in items[item].tolist()
                    ]
                    yield _row(chosen.kind, members, self.sampling)

    def _check(self, shard: int, row: dict[str, Any], line: dict[str, Any], hashes: list[int]) -> None:
        if row["prompt_id"] != line["prompt_id"]:
            raise StoreError(
                f"{self.rollouts.path(shard)} holds the prompt {line['prompt_id']} instead of {row['prompt_id']}. "
                "Delete the file, and run the same command again."
            )
        texts = [text_of(with_completion(row["prompt"], sample["text"])[1]) for sample in line["samples"]]
        if list(map(text_hash, texts)) != hashes:
            raise StoreError(
                f"{next(iter(self.scores.values())).path(shard)} holds scores of other texts than those in "
                f"{self.rollouts.path(shard)}. Delete the scores, and run the same command again."
            )

    def _sample(
        self, row: dict[str, Any], index: int, stored: dict[str, Any], scores: Sequence[float | None]
    ) -> Sample:
        sample = sample_of(row, index, stored)
        sample.scores = {
            name: None if score is None or score != score else float(score)
            for name, score in zip(self.scores, scores, strict=True)
        }
        sample.score = weighted_total(sample.scores, self.weights)
        return sample


def _row(kind: str, members: list[Sample], sampling: Sampling) -> dict[str, Any]:
    best = members[0]
    row: dict[str, Any] = {"prompt": best.prompt}
    if kind == "pairs":
        row |= {"chosen": best.completion, "rejected": members[1].completion}
        row |= {"chosen_rating": best.score, "rejected_rating": members[1].score}
        row["score_margin"] = best.score - members[1].score
    elif kind == "groups":
        row |= {"completions": [item.completion for item in members], "ratings": [item.score for item in members]}
    else:
        row |= {"completion": best.completion, "score": best.score, "scores": best.scores}
        row |= {"sample_index": best.sample_index, "finish_reason": best.finish_reason}
    kept = {name: value for name, value in best.columns.items() if name not in NOT_KEPT}
    kwargs = template_kwargs(sampling, best.columns)
    if kwargs and not isinstance(best.prompt, str):  # training must see the prompt that was sampled from
        kept["chat_template_kwargs"] = kwargs
    return row | {"prompt_id": best.prompt_id} | kept
