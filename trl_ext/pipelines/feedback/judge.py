"""A judge: a language model, a server or a function that is asked about completions.

It renders questions, asks them in batches or in parallel, and reads the answers. `judge_settings` declares its
settings, `judge_ratings` makes ratings of the answers. This module does not know data sets or where answers are kept.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.chat_templates import as_messages, content_text
from trl_ext.data.validation import DataError
from trl_ext.pipelines.feedback.judge_ratings import (
    Answer,
    Judgement,
    Question,
    judgement_of,
    read_label,
    read_order,
    shown_orders,
)
from trl_ext.pipelines.feedback.judge_settings import (
    IRRELEVANT,
    OF_SAMPLES,
    OF_THE_MODEL,
    OF_THE_QUESTIONS,
    JudgeSettings,
)
from trl_ext.pipelines.generation.backends import make_generator, model_of_backend
from trl_ext.pipelines.generation.generator import Generator, calls_together, sample_seed, too_long
from trl_ext.pipelines.generation.sampling import Chat, Sampling
from trl_ext.pipelines.stages.values import callable_key, plain


logger = logging.getLogger(__name__)

JudgeFunction = Callable[[list[Chat]], Sequence[str | Mapping[str, float] | None]]
JudgeModel = str | Path | PreTrainedModel | PeftModel | JudgeFunction

TOO_LONG = "the question is too long"
NO_LABEL = "the answer has no label"
NOT_LIKELY = "no label is among the likeliest tokens"

_PREFIX = "Answer:"  # before the label of a judge without a chat template
_SHORT = 16  # tokens of an answer without reasoning; a list gets as many for each three labels
_SMALLEST = 1e-9  # smaller probabilities that a function gives count as this much, so that log-odds stay finite
_FIRST_ANSWERS = 32  # if all of them lack a label, the judge is not asked further


class JudgeError(RuntimeError):
    """A judge cannot be used; the message says what was found and what to do."""


class Judge:
    """
    A judge with its settings. The model is loaded, or the server is asked for its model, at the first question.

    Args:
        judge (`str`, `Path`, `PreTrainedModel`, `PeftModel` or `Callable`):
            A causal language model: folder or Hub id, full model or adapter, or a model in memory. With a server
            backend the model's name there. Or a function from a list of chats (lists of messages) to an answer for
            each: a text, a mapping from labels to probabilities, or `None`.
        settings ([`~trl_ext.pipelines.feedback.judge_settings.JudgeSettings`]): what it is asked.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the judge's tokenizer; defaults to the model's.
    """

    def __init__(
        self,
        judge: JudgeModel,
        settings: JudgeSettings,
        processing_class: PreTrainedTokenizerBase | None = None,
    ):
        is_model = isinstance(judge, (str, Path, PreTrainedModel, PeftModel))
        if not is_model and not callable(judge):
            raise TypeError(
                f"The judge is a {type(judge).__name__}; needed: a model, its folder or Hub id, or a function from a "
                "list of chats to their answers."
            )
        self.settings = settings
        self._model = judge
        self._function: JudgeFunction | None = None if is_model else judge
        self._processing_class = processing_class
        self._answers = self._without_label = 0

    def identity(self) -> dict[str, Any]:
        """Everything that its answers depend on, except the questions, as JSON values."""
        without = {*IRRELEVANT, *OF_THE_QUESTIONS, *OF_THE_MODEL}
        if not self.settings.samples:
            without |= set(OF_SAMPLES)
        chosen = {name: value for name, value in asdict(self.settings).items() if name not in without}
        if self._function is not None:
            return {"judge": callable_key(self._function), **plain(chosen)}
        model = model_of_backend(self._model, self.settings.backend, self._init_kwargs(), self._processing_class)
        return {"judge": model, **plain(chosen)}

    def questions(self, prompt: Any, completions: Sequence[Any]) -> list[Question]:
        """The questions about the completions of one prompt. Texts and chats are both shown as text."""
        asked, texts = transcript(prompt), [transcript(completion, answer=True) for completion in completions]
        found = []
        for places in shown_orders(self.settings, len(texts), asked + "\0".join(texts)):
            labels = self.settings.labels_of(len(places))
            text = self.settings.render(asked, [texts[place] for place in places], labels)
            found.append(Question(text, tuple(labels), places))
        return found

    def jobs(self, questions: Sequence[Sequence[Question]]) -> dict[str, tuple[Question, int]]:
        """All samples of all questions, by key; equal questions are asked once."""
        samples = range(self.settings.num_samples)
        return {one.key(sample): (one, sample) for group in questions for one in group for sample in samples}

    def judge(self, groups: Sequence[tuple[Any, Sequence[Any]]]) -> list[Judgement]:
        """Judge several prompts with their completions, without keeping the answers."""
        questions = [self.questions(prompt, completions) for prompt, completions in groups]
        jobs = self.jobs(questions)
        keys, found = list(jobs), {}
        for place, answer in self.ask(list(jobs.values())):
            found[keys[place]] = answer
        return [
            self.judgement(len(completions), group, found)
            for (_, completions), group in zip(groups, questions, strict=True)
        ]

    def judgement(self, count: int, questions: Sequence[Question], answers: Mapping[str, Answer]) -> Judgement:
        """What the answers, by key, to the questions about one prompt say of its `count` completions."""
        samples = range(self.settings.num_samples)
        return judgement_of(
            self.settings, count, questions, [[answers[one.key(sample)] for sample in samples] for one in questions]
        )

    def ask(self, jobs: Sequence[tuple[Question, int]]) -> Iterator[tuple[int, Answer]]:
        """
        Ask questions, each with the number of its sample.

        Yields:
            `tuple[int, dict]`: index of the job and its answer, as soon as it is there.

        Raises:
            [`JudgeError`]: none of the first answers has a label, or a function gives something that is no answer.
            [`LabelError`]: a label is not a single token. [`GenerationError`]: the judge fails.
        """
        if not jobs:
            return
        batches = self._in_batches if self._function is not None or self._in_process else self._in_parallel
        for place, answer in batches(jobs):
            if answer.get("failed") != TOO_LONG:
                self._answers += 1
                self._without_label += "failed" in answer
            if self._answers == self._without_label == _FIRST_ANSWERS:
                shown = answer.get("text", answer["failed"])
                raise JudgeError(
                    f"None of the first {_FIRST_ANSWERS} answers has a label (the last one: {shown!r:.200}). Needed: "
                    f"one of {', '.join(jobs[place][0].labels)}. Each must be one token of the judge, and the "
                    "template must ask for them. A judge that thinks first needs reasoning=True, or a chat template "
                    "that switches its thinking off (chat_template_kwargs)."
                )
            yield place, answer

    @cached_property
    def _generator(self) -> Generator:
        settings = self.settings
        longest = settings.max_completion_length if settings.reasoning else _SHORT * max(1, len(settings.labels) // 3)
        sampling = Sampling(
            max_completion_length=longest,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=[settings.answer_prefix] if settings.reasoning and settings.read == "probability" else None,
            system_prompt=settings.system_prompt,
            chat_template_kwargs=settings.chat_template_kwargs,
        )
        if settings.backend == "transformers":
            kwargs: dict[str, Any] = {"generation_batch_size": settings.batch_size}
        else:
            names = ("server_base_url", "server_timeout", "max_concurrency", "max_retries", "api_key_variable")
            kwargs = {name: getattr(settings, name) for name in names}
        return make_generator(
            self._model,
            settings.backend,
            sampling,
            processing_class=self._processing_class,
            model_init_kwargs=self._init_kwargs(),
            **kwargs,
        )

    @property
    def _in_process(self) -> bool:
        return self.settings.backend == "transformers"

    def _init_kwargs(self) -> dict[str, Any]:
        settings = self.settings
        kwargs: dict[str, Any] = {"revision": settings.revision, "dtype": settings.dtype}
        kwargs["trust_remote_code"] = settings.trust_remote_code or None
        if settings.load_in_4bit:
            kwargs["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": settings.dtype or "bfloat16",
            }
        return {name: value for name, value in kwargs.items() if value is not None}

    def _in_batches(self, jobs: Sequence[tuple[Question, int]]) -> Iterator[tuple[int, Answer]]:
        # the two orders of a pair have about one length, so they share a batch
        order = sorted(range(len(jobs)), key=lambda place: -len(jobs[place][0].text))
        for first in range(0, len(order), self.settings.batch_size):
            batch = order[first : first + self.settings.batch_size]
            yield from zip(batch, self._answer([jobs[place] for place in batch]), strict=True)

    def _in_parallel(self, jobs: Sequence[tuple[Question, int]]) -> Iterator[tuple[int, Answer]]:
        generator = self._generator  # made once, before the threads need it
        with ThreadPoolExecutor(self.settings.max_concurrency) as pool, calls_together(generator):
            futures = {pool.submit(self._answer, [job]): place for place, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()[0]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _answer(self, jobs: Sequence[tuple[Question, int]]) -> list[Answer]:
        """The answer to each of some jobs."""
        if self._function is not None:
            return self._answer_of_function([question for question, _ in jobs])
        try:
            return self._answer_of_model(jobs)
        except DataError as error:  # its row is that of the batch
            raise JudgeError(
                f"The judge cannot read a question: found {error.found}; needed {error.needed}. {error.fix}"
            ) from error

    def _answer_of_model(self, jobs: Sequence[tuple[Question, int]]) -> list[Answer]:
        prompts = [self._prompt(question.text, self._begun) for question, _ in jobs]
        long = too_long(self._generator, prompts, self.settings.max_length)
        kept = [place for place, is_long in enumerate(long) if not is_long]
        answers: list[Answer] = [{"failed": TOO_LONG} for _ in jobs]
        if kept:
            found = self._ask_generator([jobs[place] for place in kept], [prompts[place] for place in kept])
            for place, answer in zip(kept, found, strict=True):
                answers[place] = answer
        return answers

    def _ask_generator(self, jobs: Sequence[tuple[Question, int]], prompts: list[str | Chat]) -> list[Answer]:
        settings, texts = self.settings, [None] * len(jobs)
        if settings.samples:
            seed = sample_seed(settings.seed, jobs[0][0].key(jobs[0][1]), jobs[0][1])
            texts = [found[0].text for found in self._generator.generate(prompts, 1, seed)]
        if settings.read == "share":
            pairs = zip(jobs, texts, strict=True)
            return [self._read(question, text, bool(self._begun)) for (question, _), text in pairs]
        if settings.reasoning:
            begun = [f"{text.strip()}\n\n{settings.answer_prefix}".lstrip() for text in texts]
            prompts = [self._prompt(job[0].text, start) for job, start in zip(jobs, begun, strict=True)]
        # the labels are the same for all questions but those of lists, whose labels are never read here
        logprobs = self._generator.label_logprobs(prompts, jobs[0][0].labels)
        more = [{} if text is None else {"text": text} for text in texts]
        return [
            ({"failed": NOT_LIKELY} if None in values else {"logprobs": values}) | text
            for values, text in zip(logprobs, more, strict=True)
        ]

    @property
    def _begun(self) -> str:
        """The text that the judge's first answer begins with."""
        if self.settings.reasoning:
            return ""  # the prefix comes after the reasoning
        return self.settings.answer_prefix or ("" if self._generator.chats else _PREFIX)

    def _prompt(self, text: str, begun: str) -> str | Chat:
        """A question as a chat or, for a judge without a chat template, as a text. Its answer begins with `begun`."""
        if self._generator.chats:
            answer = [{"role": "assistant", "content": begun}] if begun else []
            return [{"role": "user", "content": text}, *answer]
        system = f"{self.settings.system_prompt}\n\n" if self.settings.system_prompt else ""
        return f"{system}{text}\n\n{begun}"

    def _read(self, question: Question, text: str, begun: bool = False) -> Answer:
        """The answer that a text gives. With `begun` the prefix stands before the text."""
        prefix = self.settings.answer_prefix or _PREFIX
        whole = f"{prefix} {text}" if begun else text
        found: Any = read_label(whole, question.labels, prefix)
        name = "label"
        if self.settings.mode == "list":
            name, found = "order", read_order(whole, question.labels, prefix)
        return ({"failed": NO_LABEL} if found is None else {name: found}) | {"text": text}

    def _answer_of_function(self, questions: Sequence[Question]) -> list[Answer]:
        system = self.settings.system_prompt
        before = [{"role": "system", "content": system}] if system else []
        chats = [[*before, {"role": "user", "content": question.text}] for question in questions]
        given = self._function(chats)
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__") or len(given) != len(chats):
            found = f"{len(given)} answers" if isinstance(given, (list, tuple)) else f"a {type(given).__name__}"
            raise JudgeError(f"The judge gave {found} for {len(chats)} questions; needed: a list with one for each.")
        return [self._read_given(question, one) for question, one in zip(questions, given, strict=True)]

    def _read_given(self, question: Question, given: Any) -> Answer:
        if given is None:
            return {"failed": NO_LABEL}
        if isinstance(given, str):
            return self._read(question, given)
        if not isinstance(given, Mapping) or self.settings.mode == "list":
            raise JudgeError(
                f"The judge answered with a {type(given).__name__}; needed: a text, None, or (not for lists) a "
                "mapping from labels to probabilities."
            )
        values = [given.get(label, 0.0) for label in question.labels]
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise JudgeError(
                f"The judge gave the probabilities {dict(given)!r:.200}; needed: numbers from 0 to 1 for the labels "
                f"{', '.join(question.labels)}."
            )
        if not any(values):
            return {"failed": NO_LABEL}
        return {"logprobs": [math.log(max(value, _SMALLEST)) for value in values]}


def transcript(value: Any, answer: bool = False) -> str:
    """
    A prompt or a completion as text. Each message is shown with its role; a single answer is shown without one.

    Args:
        value (`str`, message, list of messages or `None`): a prompt or a completion.
        answer (`bool`): whether it is a completion: one message of the assistant is then only its text.

    Example:

    ```python
    >>> transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'User: Hi\\n\\nAssistant: Hello'
    ```
    """
    if value is None or isinstance(value, str):
        return value or ""
    turns = []
    for message in as_messages(value):
        text = content_text(message.get("content")) or ""
        if message.get("tool_calls"):
            text = f"{text}\n{message['tool_calls']}".strip()
        turns.append((str(message.get("role", "")).capitalize(), text))
    if answer and len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)
