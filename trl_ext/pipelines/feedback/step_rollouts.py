"""Labels the steps of a chunk of solutions: rollouts of all open prefixes are generated together, and verified.

`step_methods` decides which prefixes need rollouts and what the labels are. This module knows generators and
verifiers. It does not know where solutions come from or where labels are kept.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.step_methods import StepSettings, Tally, labels_of, wanted
from trl_ext.pipelines.generation.generator import Generator, sample_seed, too_long
from trl_ext.pipelines.generation.records import Completion, Sample, with_completion
from trl_ext.pipelines.generation.sampling import Chat
from trl_ext.pipelines.rejection_sampling.generate_and_score import length_of
from trl_ext.pipelines.reward_functions import call_reward


@dataclass
class Solution:
    """
    A solution whose steps need labels.

    Args:
        row (`int`): index of its row in the data set, for errors.
        prompt_id (`str`): id of its prompt with the columns; solutions with one id share rollouts and the confidence.
        prompt (`str` or `list[dict]`): text or messages.
        columns (`dict`): the row's other columns, for the verifier and the chat template.
        steps (`list[str]`): the steps without their separator. An empty last step stands for the end.
        text (`str`): the whole solution.
        right (`bool`, *optional*): whether the verifier calls it right; `None` if it is not known yet, or if
            `omitted` says so.
        sampled (`bool`): whether the model itself wrote it in this run, so that it counts as a rollout.
        omitted (`str`, *optional*): why the solution gets no labels.
    """

    row: int
    prompt_id: str
    prompt: str | Chat
    columns: dict[str, Any]
    steps: list[str]
    text: str
    right: bool | None = None
    sampled: bool = False
    omitted: str | None = None


@dataclass(eq=False)
class Prefix:
    """A prefix of one or several solutions of a prompt, with its rollouts and what they cost."""

    text: str
    solution: Solution  # the first solution with it
    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    rollouts: int = 0
    truncated: int = 0
    too_long: bool | None = None  # whether it leaves no room for a rollout; None until it needs one


@dataclass(eq=False)
class _Open:
    """A solution with its prefixes: the root (no step), and those that end with a step before the last one."""

    solution: Solution
    root: Prefix
    prefixes: list[Prefix]
    places: list[int]  # the step with which each prefix ends
    owned: list[Prefix]  # the prefixes that no earlier solution has

    @property
    def tallies(self) -> list[Tally]:
        return [prefix.tally for prefix in self.prefixes]


class StepLabeller:
    """
    Labels chunks of solutions.

    Args:
        generator ([`~trl_ext.pipelines.generation.generator.Generator`]): samples rollouts.
        verifier (`Callable`): a loaded reward function, and `name` its name.
        settings ([`StepSettings`]): method, number of rollouts, kind of labels.
        separator (`str`): the text after each step.
        right_above (`float`): a score above it means that an answer is right.
        seed (`int`): seed of the rollouts.
    """

    def __init__(
        self,
        generator: Generator,
        verifier: Callable[..., Any],
        name: str,
        settings: StepSettings,
        separator: str,
        right_above: float,
        seed: int,
    ):
        self._generator = generator
        self._verifier = verifier
        self._name = name
        self._settings = settings
        self._separator = separator
        self._right_above = right_above
        self._seed = seed

    def __call__(self, solutions: Sequence[Solution]) -> list[dict[str, Any]]:
        """
        Label a chunk. The same chunk gets the same labels, if the backend supports seeds.

        Returns:
            `list[dict]`: one record a solution: `row`, `steps`, `labels` (`None` if it was `omitted`), `right`,
            `confidence`, the `tallies` of its steps as `[right, wrong, unscored]`, and the `cost` of the prefixes that
            no earlier solution of the chunk has.

        Raises:
            [`DataError`]: a prompt cannot be used; names its row. [`GenerationError`], [`RewardError`]: the backend or
                the verifier fails.
        """
        self._judge([solution for solution in solutions if solution.right is None and solution.omitted is None])
        states = self._open(solutions)
        number = 0
        while requests := self._requests(states):
            name = f"{states[0].solution.row} {states[0].solution.prompt_id}"  # a prompt may be in several chunks
            self._roll_out(requests, sample_seed(self._seed, name, number), states)
            number += 1
        return [self._record(state) for state in states]

    def _judge(self, solutions: list[Solution]) -> None:
        """Ask the verifier about whole solutions."""
        verdicts = self._verdicts([_sample(s, Completion(s.text, None, "stop", None, 0, 0.0)) for s in solutions])
        for solution, verdict in zip(solutions, verdicts, strict=True):
            solution.right = verdict
            if verdict is None:
                solution.omitted = "unscored_solution"

    def _verdicts(self, samples: list[Sample]) -> list[bool | None]:
        scores = call_reward(self._verifier, self._name, samples) if samples else []
        return [None if score is None else score > self._right_above for score in scores]

    def _open(self, solutions: Sequence[Solution]) -> list[_Open]:
        """The prefixes of all solutions. With `reuse`, solutions of one prompt share equal prefixes."""
        known: dict[tuple[Any, ...], Prefix] = {}
        states = []
        for index, solution in enumerate(solutions):
            texts = [""]
            for step in solution.steps:
                texts.append(texts[-1] + step + self._separator)
            # an empty step has no prefix of its own; the last step ends the whole solution
            places = [place for place, step in enumerate(solution.steps[:-1]) if step.strip()]
            owned = []
            found = []
            for place in (-1, *places):
                text = texts[place + 1]
                shared = self._settings.reuse or place == -1
                key = (solution.prompt_id, text) if shared else (solution.prompt_id, text, index)
                if key not in known:
                    known[key] = Prefix(text, solution)
                    owned.append(known[key])
                found.append(known[key])
            states.append(_Open(solution, found[0], found[1:], places, owned))
        for state in states:
            if state.solution.sampled and state.solution.omitted is None:
                state.root.tally.add(state.solution.right)
        if self._settings.reuse:
            below = _by_prompt(states)
            for solution in solutions:
                if solution.sampled and solution.omitted is None:
                    _credit(below[solution.prompt_id], "", solution.text, solution.right)
        return states

    def _requests(self, states: list[_Open]) -> dict[Prefix, int]:
        """How many rollouts each prefix needs now. Omits solutions of low confidence and those with long prefixes."""
        needs: list[tuple[_Open, dict[Prefix, int]]] = []
        settings = self._settings
        for state in states:
            if state.solution.omitted is not None:
                continue
            if settings.denoise:
                missing = settings.num_rollouts - state.root.tally.seen
                if missing > 0:
                    needs.append((state, {state.root: missing}))
                    continue
                if (state.root.tally.share or 0.0) <= settings.min_confidence:
                    state.solution.omitted = "low_confidence"
                    continue
            counts = wanted(state.tallies, state.solution.right, settings)
            needs.append((state, {state.prefixes[place]: count for place, count in counts.items()}))
        self._measure(dict.fromkeys(prefix for _, need in needs for prefix in need))
        requests: dict[Prefix, int] = defaultdict(int)
        for state, need in needs:
            if any(prefix.too_long for prefix in need):
                state.solution.omitted = "too_long_prefix"
                continue
            for prefix, count in need.items():
                requests[prefix] = max(requests[prefix], count)
        return dict(requests)

    def _measure(self, prefixes: Iterable[Prefix]) -> None:
        """Note which prefixes are too long. Where the prompt alone is, the generator says so and names the row."""
        new = [prefix for prefix in prefixes if prefix.too_long is None]
        for prefix, long in zip(new, self._too_long(new), strict=True):
            prefix.too_long = long
        found = [prefix for prefix in new if prefix.too_long]
        for prefix, long in zip(found, self._too_long([replace(prefix, text="") for prefix in found]), strict=True):
            prefix.too_long = not long

    def _too_long(self, prefixes: Sequence[Prefix]) -> list[bool]:
        if not prefixes:
            return []
        prompts, columns = _inputs(prefixes)
        with _rows_named(prefixes):
            return too_long(self._generator, prompts, columns=columns)

    def _roll_out(self, requests: dict[Prefix, int], seed: int, states: list[_Open]) -> None:
        """Generate and verify the rollouts of one round, and count them."""
        prefixes = list(requests)
        prompts, columns = _inputs(prefixes)
        with _rows_named(prefixes):
            found = self._generator.generate(prompts, list(requests.values()), seed, columns)
        pairs = [(prefix, rollout) for prefix, own in zip(prefixes, found, strict=True) for rollout in own]
        samples = [
            _sample(prefix.solution, replace(rollout, text=prefix.text + rollout.text, token_ids=None))
            for prefix, rollout in pairs
        ]
        below = _by_prompt(states) if self._settings.reuse else {}
        for (prefix, rollout), verdict in zip(pairs, self._verdicts(samples), strict=True):
            prefix.tally.add(verdict)
            prefix.rollouts += 1
            prefix.tokens += length_of(_sample(prefix.solution, rollout))
            prefix.truncated += rollout.finish_reason == "length"
            _credit(below.get(prefix.solution.prompt_id, ()), prefix.text, prefix.text + rollout.text, verdict)

    def _record(self, state: _Open) -> dict[str, Any]:
        solution = state.solution
        labels, confidence = None, None
        if solution.omitted is None:
            confidence = state.root.tally.share if self._settings.denoise else None
            found = labels_of(state.tallies, solution.right, self._settings, confidence)
            if found is None:
                solution.omitted = "unscored_prefix"
            else:
                labels = [None] * len(solution.steps)
                for place, label in zip([*state.places, len(solution.steps) - 1], found, strict=True):
                    labels[place] = label
        tested = [prefix for prefix in state.owned if prefix.tally.right + prefix.tally.wrong]
        return {
            "row": solution.row,
            "steps": solution.steps,
            "labels": labels,
            "omitted": solution.omitted,
            "right": solution.right,
            "confidence": confidence,
            "tallies": [[t.right, t.wrong, t.unscored] for t in state.tallies],
            "cost": {
                "prefixes": sum(prefix.rollouts > 0 for prefix in state.owned),
                "rollouts": sum(prefix.rollouts for prefix in state.owned),
                "rollout_tokens": sum(prefix.tokens for prefix in state.owned),
                "truncated_rollouts": sum(prefix.truncated for prefix in state.owned),
                "unscored_rollouts": sum(prefix.tally.unscored for prefix in state.owned),
                "prefixes_all_right": sum(not prefix.tally.wrong for prefix in tested),
                "prefixes_all_wrong": sum(not prefix.tally.right for prefix in tested),
            },
        }


def _by_prompt(states: Sequence[_Open]) -> dict[str, list[Prefix]]:
    """The different prefixes of each prompt, without the root."""
    found: dict[str, dict[int, Prefix]] = defaultdict(dict)
    for state in states:
        found[state.solution.prompt_id] |= {id(prefix): prefix for prefix in state.prefixes}
    return {name: list(prefixes.values()) for name, prefixes in found.items()}


def _credit(prefixes: Sequence[Prefix], start: str, text: str, verdict: bool | None) -> None:
    """Count a text that was sampled from `start` as a rollout of every longer prefix that it passes through."""
    for prefix in prefixes:
        if len(prefix.text) > len(start) and text.startswith(prefix.text):
            prefix.tally.add(verdict)


def _inputs(prefixes: Sequence[Prefix]) -> tuple[list[str | Chat], list[dict[str, Any]]]:
    """What a generator needs to continue each prefix: the prompts, and the columns of their rows."""
    prompts = [_begun(prefix.solution.prompt, prefix.text) for prefix in prefixes]
    return prompts, [prefix.solution.columns for prefix in prefixes]


@contextmanager
def _rows_named(prefixes: Sequence[Prefix]) -> Iterator[None]:
    """An error that names a prefix by its index names its row instead."""
    try:
        yield
    except DataError as error:
        row = prefixes[error.row].solution.row
        raise DataError(error.found, error.needed, error.fix, row=row, column=error.column) from None


def _begun(prompt: str | Chat, text: str) -> str | Chat:
    """The prompt after which a model continues `text`: in a chat, the text is a begun answer."""
    if isinstance(prompt, str):
        return prompt + text
    if not text:
        return prompt
    before, answer = with_completion(prompt, text)
    return [*before, *answer]


def _sample(solution: Solution, completion: Completion) -> Sample:
    return Sample.of(solution.prompt_id, 0, solution.prompt, solution.columns, completion)
