"""`JudgeReward`: a judge as a TRL reward function, which grades each completion or ranks those of one prompt.

It works wherever a reward function does: in GRPO, rejection sampling, best of n and evaluation. From the command line,
`--reward_funcs judge.yaml` names a file with its arguments. This module does not know what a score is used for.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_ext.pipelines.feedback.judge import Judge, JudgeModel
from trl_ext.pipelines.feedback.judge_settings import OF_THE_QUESTIONS, read_judge_file, reward_settings


logger = logging.getLogger(__name__)


class JudgeReward:
    """
    A judge as a reward function: `(prompts, completions, **columns) -> list[float | None]`.

    - `mode="score"` (the default) grades each completion alone. The reward is the expected value of the labels: with
      the labels 1 to 5 a number from 1 to 5.
    - `mode="rank"` compares all pairs of the completions that a call has for one prompt. The reward is the mean
      probability to win, from 0 to 1, and costs K (K - 1) questions in both orders.
    - `mode="list"` asks for an order of these completions in one answer, twice for both orders. The reward is the
      share of the other completions that are listed below, from 0 to 1.

    A completion without a readable answer gets `None`, never 0, and so does one that has no other to be compared with.
    With several processes, GRPO calls the function in each of them with its own completions; use multiples of
    `num_generations` as the batch size of a device, so that the completions of a prompt stay together.

    Args:
        judge (`str`, `Path`, `PreTrainedModel`, `PeftModel` or `Callable`):
            As for [`label_preferences`]: a model in this process, a server's model, or a function.
        name (`str`, *optional*, defaults to `"judge"`): name of the reward in logs; also its `__name__`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the judge's tokenizer; defaults to the model's.
        **settings: of [`~trl_ext.pipelines.feedback.judge_settings.JudgeSettings`].

    Attributes:
        counts (`dict[str, int]`): completions that were `judged`, and those `without_score`, since it was made.

    Raises:
        ValueError, TypeError: a setting is out of its range; a template lacks a field; `mode="compare"`.
        [`LabelError`], [`JudgeError`], [`GenerationError`]: in a call, as for [`label_preferences`].

    Example:

    ```python
    >>> judge = JudgeReward("Qwen/Qwen3-8B", backend="vllm", criteria="Is the answer polite?")
    >>> judge(prompts=["Hi!"], completions=["Hello, how can I help you?"])
    [4.6]
    ```
    """

    def __init__(
        self,
        judge: JudgeModel,
        *,
        name: str = "judge",
        processing_class: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ):
        self.__name__ = name
        self.counts = {"judged": 0, "without_score": 0}
        self._judge = Judge(judge, reward_settings(**settings), processing_class)

    @classmethod
    def from_file(cls, path: str | Path) -> "JudgeReward":
        """
        Make a judge from a YAML file; see [`~trl_ext.pipelines.feedback.judge_settings.read_judge_file`].

        Its `name` is that of the file.
        """
        judge, settings = read_judge_file(path)
        return cls(judge, name=Path(path).stem, **settings)

    def identity(self) -> dict[str, Any]:
        """Everything that the scores depend on, for cache keys."""
        settings = self._judge.settings
        made_of = [name for name in OF_THE_QUESTIONS if name != "template"]  # its text is in the key
        if settings.shows_several and settings.orders == "one":
            made_of.append("seed")  # draws the order
        made = {name: getattr(settings, name) for name in made_of}
        judge = self._judge.identity()
        unseen = judge["judge"].get("unseen")  # of a function; the pipelines warn about it
        return {**judge, **made, "question": settings.question.text} | ({"unseen": unseen} if unseen else {})

    def __call__(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """
        Score completions.

        Args:
            prompts (sequence of `str` or lists of messages, *optional*): one for each completion.
            completions (sequence of `str` or lists of messages): what is judged.
            **columns: not shown to the judge. If TRL gives `log_metric`, the share without a score is logged.

        Returns:
            `list[float | None]`: one for each completion, in order.
        """
        prompts = [None] * len(completions) if prompts is None else list(prompts)
        if len(prompts) != len(completions):
            raise ValueError(f"Found {len(prompts)} prompts for {len(completions)} completions; needed: one for each.")
        groups: dict[str, list[int]] = {}
        alone = self._judge.settings.mode == "score"
        for place, prompt in enumerate(prompts):
            key = str(place) if alone else json.dumps(prompt, sort_keys=True, default=str)
            groups.setdefault(key, []).append(place)
        limit = 1 if alone else len(self._judge.settings.labels) if self._judge.settings.mode == "list" else None
        judged = [places for places in groups.values() if alone or len(places) > 1]
        for places in judged:
            if limit is not None and len(places) > limit:
                raise ValueError(
                    f"A prompt has {len(places)} completions, and mode='list' has {limit} labels. Give more labels, "
                    "or use mode='rank'."
                )
        scores: list[float | None] = [None] * len(completions)
        asked = [(prompts[places[0]], [completions[place] for place in places]) for places in judged]
        for places, judgement in zip(judged, self._judge.judge(asked), strict=True):
            for place, rating in zip(places, judgement.ratings, strict=True):
                scores[place] = rating
        missing = scores.count(None)
        if missing and not self.counts["without_score"]:
            logger.warning(
                f"{missing} of {len(scores)} completions have no score, because the judge's answer has no label"
                + (", or a prompt has only one completion." if not alone else ".")
                + " They get None. This is said once; `counts` has the numbers."
            )
        self.counts["judged"] += len(scores)
        self.counts["without_score"] += missing
        log_metric = columns.get("log_metric")  # of TRL's trainers
        if log_metric is not None and scores:
            log_metric(f"{self.__name__}/without_score", missing / len(scores))
        return scores
