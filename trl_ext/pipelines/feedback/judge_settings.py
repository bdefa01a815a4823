"""The settings of a judge, declared and checked in one place: what it is asked, how it answers, and where it runs.

The command line, `judge.yaml` and the Python functions take the same names. This module imports neither torch nor
transformers, so that `--help` is fast. It knows no models, servers or rows.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import TemplateError

from trl_ext.pipelines.feedback.templates import FOLDER, PromptTemplate
from trl_ext.pipelines.generation.sampling import BACKENDS, described
from trl_ext.pipelines.user_functions import did_you_mean


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The template of each mode, and the fields that it must use.
_TEMPLATES = {
    "compare": ("compare.jinja", {"prompt", "completions"}),
    "rank": ("compare.jinja", {"prompt", "completions"}),
    "list": ("list.jinja", {"prompt", "completions"}),
    "score": ("score.jinja", {"prompt", "completion"}),
}
_OPTIONAL = {"labels", "all_labels", "criteria", "rubric", "few_shot", "reasoning", "answer_prefix"}


@dataclass(kw_only=True)
class JudgeFields:
    """The settings of a judge; [`JudgeSettings`] explains and checks them."""

    mode: Literal["compare", "rank", "list", "score"] = described(
        "compare",
        "compare two completions, rank K by comparing all pairs, list K from best to worst in one answer, or score "
        "each on a scale.",
    )
    labels: list[str] | None = described(
        None, "The answers to choose from, each one token of the judge (default: A B; to score 1 2 3 4 5)."
    )
    values: list[float] | None = described(None, "To score: the value of each label (default: the label as a number).")
    template: str | None = described(None, "Jinja file of the question, in place of the template of the mode.")
    criteria: str | None = described(None, "What makes an answer good, in a sentence or two.")
    rubric: str | None = described(
        None, "Longer instructions, such as the meaning of each grade, or their file (.txt, .md)."
    )
    few_shot: str | None = described(
        None, "JSONL file of solved examples: prompt, completions (or completion), label, and maybe reasoning."
    )
    system_prompt: str | None = described(None, "System message of the judge.")
    answer_prefix: str | None = described(
        None, "Text before the label: the judge's answer begins with it (default: none; with reasoning 'Answer:')."
    )
    reasoning: bool = described(False, "Let the judge reason first and give its label at the end.")
    num_samples: int = described(1, "Sampled answers to each question (self-consistency).")
    read: Literal["probability", "share"] | None = described(
        None,
        "Read the probability of the labels from the distribution of the next token, or the share of each label among "
        "the answers (default: probability; share for the mode list).",
    )
    orders: Literal["both", "one"] = described(
        "both", "Ask in both orders of two completions, or in one that is drawn at random."
    )
    average: Literal["log_odds", "probability"] | None = described(
        None, "What is averaged over the two orders (default: log_odds; probability where labels are counted)."
    )
    max_completion_length: int = described(512, "Longest reasoning in tokens.")
    temperature: float | None = described(None, "Temperature of sampled answers (default: 1; 0 for a single sample).")
    top_p: float = described(1.0, "Nucleus of sampled answers.")
    max_length: int | None = described(None, "Longest question in tokens; rows with a longer one are left out.")
    chat_template_kwargs: dict[str, Any] | str | None = described(
        None, "Arguments of the judge's chat template, as JSON, such as '{\"enable_thinking\": false}'."
    )
    seed: int = described(0, "Seed of sampled answers and of the order, where one is drawn.")

    backend: Literal["transformers", "vllm", "openai"] = described(
        "transformers", "The judge runs in this process, on a vLLM server, or on any OpenAI-compatible server."
    )
    batch_size: int = described(16, "Questions in a batch, in this process.")
    dtype: str | None = described(None, "dtype of the judge, e.g. bfloat16 (default: as saved).")
    revision: str | None = described(None, "Revision of the judge on the Hub.")
    trust_remote_code: bool = described(False, "Run code that comes with the judge.")
    load_in_4bit: bool = described(False, "Load the judge in NF4 with bitsandbytes.")
    server_base_url: str = described("http://localhost:8000", "URL of the server; separate several with commas.")
    server_timeout: float = described(240.0, "Seconds to wait for the server to start, and for each answer.")
    max_concurrency: int = described(64, "Requests in flight at a time, over all servers.")
    max_retries: int = described(6, "How often a failed request is repeated.")
    api_key_variable: str | None = described(None, "Environment variable that holds the server's key.")


# Settings that the answers do not depend on.
IRRELEVANT = ("batch_size", "server_base_url", "server_timeout", "max_concurrency", "max_retries", "api_key_variable")
# Settings that only change what is made of the answers, or which questions are asked; a question's key covers it.
OF_THE_QUESTIONS = ("mode", "template", "criteria", "rubric", "few_shot", "labels", "values", "num_samples")
OF_THE_QUESTIONS += ("orders", "average", "max_length")
# Settings that are in the key of the model, and those that only sampled answers depend on.
OF_THE_MODEL = ("dtype", "revision", "trust_remote_code", "load_in_4bit")
OF_SAMPLES = ("temperature", "top_p", "max_completion_length", "seed")


@dataclass(kw_only=True)
class JudgeSettings(JudgeFields):
    """
    What a judge is asked, how it answers, and where it runs.

    Args:
        mode (`str`, *optional*, defaults to `"compare"`):
            `"compare"` asks which of two completions is better. `"rank"` compares all pairs of K completions;
            the rating of each is its mean probability to win. `"list"` asks for one order of K completions. `"score"`
            asks for a grade of each completion; the rating is the expected value of the labels.
        labels (`list[str]`, *optional*):
            The answers to choose from, each a single token of the judge. Two for comparisons (default A and B), at
            least two for scores (default 1 to 5), at least K for lists (default A, B, C ...).
        values (`list[float]`, *optional*): with `"score"` the value of each label; defaults to the label as a number.
        template (`str`, *optional*):
            A Jinja file, or the text of one. It gets `prompt` (text), `completions` (a list, each with `label` and
            `text`; with `"score"` it is `completion`, a text), `labels` (of the completions that it shows),
            `all_labels`, `criteria`, `rubric`, `few_shot`, `reasoning` and `answer_prefix`.
        criteria (`str`, *optional*): what makes an answer good.
        rubric (`str`, *optional*): longer instructions, or the path of a file (`.txt` or `.md`).
        few_shot (`list[dict]` or `str`, *optional*):
            Solved examples, or the path of a JSONL file: `prompt`, `completions` (`completion` with `"score"`),
            `label`, and `reasoning` if you like.
        system_prompt (`str`, *optional*): the judge's system message.
        answer_prefix (`str`, *optional*):
            The judge's answer begins with this text, and the label follows. Defaults to none; with `reasoning`, and
            for a judge without a chat template, to `"Answer:"`.
        reasoning (`bool`, *optional*, defaults to `False`): let the judge reason first (chain of thought).
        num_samples (`int`, *optional*, defaults to `1`):
            Sampled answers to each question (self-consistency). Their probabilities, or their labels, are averaged.
        read (`str`, *optional*):
            `"probability"` (default) reads the probability of the labels from the distribution of the next token,
            without sampling, or with `reasoning` after it. `"share"` counts the labels in sampled answers; it is the
            only way for lists.
        orders (`str`, *optional*, defaults to `"both"`):
            `"both"` asks each comparison in both orders, so that a preference for the first place cancels. `"one"`
            draws an order for each comparison.
        average (`str`, *optional*):
            What is averaged over the two orders. `"log_odds"` removes a bias that adds a constant to the log-odds
            exactly; it is the default where probabilities are read. `"probability"` is the default for shares, whose
            log-odds may be infinite, and is used for functions that answer with texts.
        max_completion_length (`int`, *optional*, defaults to `512`): longest reasoning in tokens.
        temperature (`float`, *optional*): of sampled answers; defaults to 1, and to 0 for a single sample.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus of sampled answers.
        max_length (`int`, *optional*):
            Longest question in tokens. Rows with a longer one are left out and counted. The backend `"openai"` has no
            tokenizer here, so it takes no limit.
        chat_template_kwargs (`dict`, *optional*): arguments of the judge's chat template.
        seed (`int`, *optional*, defaults to `0`): of sampled answers, and of the order with `orders="one"`.
        backend (`str`, *optional*, defaults to `"transformers"`):
            Where the judge runs; see [`~trl_ext.pipelines.generation.backends.make_generator`], which also explains
            `server_base_url`, `server_timeout`, `max_concurrency`, `max_retries` and `api_key_variable`.
        batch_size (`int`, *optional*, defaults to `16`): questions in a batch, in this process.
        dtype, revision, trust_remote_code, load_in_4bit: how the judge is loaded in this process.

    Raises:
        ValueError: a setting is out of its range, or two settings do not go together; the template lacks a field.
        FileNotFoundError: there is no such template, rubric or file of examples.
    """

    def __post_init__(self) -> None:
        self.few_shot = _examples(self.few_shot)
        if self.rubric is not None and "\n" not in self.rubric and self.rubric.endswith((".txt", ".md")):
            self.rubric = Path(self.rubric).read_text(encoding="utf-8").strip()
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        self._check_ranges()
        if self.mode == "list" and self.read == "probability":
            raise ValueError(
                "read='probability' needs one label, and a list has K. Leave out read, or use mode='rank'."
            )
        self.read = self.read or ("share" if self.mode == "list" else "probability")
        if not self.samples and self.num_samples > 1:
            raise ValueError(
                f"num_samples={self.num_samples}, but the probability of the labels is read without sampling. Set "
                "reasoning=True or read='share', or leave out num_samples."
            )
        if self.temperature is None:
            self.temperature = 0.0 if self.num_samples == 1 else 1.0
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature=0 gives the same answer {self.num_samples} times. Raise it, or set num_samples=1."
            )
        if self.average == "log_odds" and self.read == "share":
            raise ValueError(
                "average='log_odds' needs probabilities, and the share of a label may be 0 or 1. Leave out average."
            )
        self.average = self.average or ("log_odds" if self.read == "probability" else "probability")
        if self.answer_prefix is None and self.reasoning:
            self.answer_prefix = "Answer:"
        self._check_labels()
        self._check_few_shot()
        self.question = self._read_template()

    @classmethod
    def of(cls, **settings: Any) -> "JudgeSettings":
        """Build from keyword arguments. An unknown one raises `TypeError`, which names the nearest."""
        known = [item.name for item in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                hint = did_you_mean(name, known)
                raise TypeError(f"Unknown setting of a judge: {name!r}.{hint} Known: {', '.join(known)}.")
        return cls(**settings)

    @property
    def samples(self) -> bool:
        """Whether the judge generates text, which it does to reason or where labels are counted."""
        return self.reasoning or self.read == "share"

    @property
    def compares(self) -> bool:
        """Whether the judge compares two completions at a time."""
        return self.mode in ("compare", "rank")

    @property
    def shows_several(self) -> bool:
        """Whether a question shows several completions, so that their order matters."""
        return self.mode != "score"

    def labels_of(self, count: int) -> list[str]:
        """The labels of a question with `count` completions."""
        return list(self.labels[:count]) if self.mode == "list" else list(self.labels)

    def _check_ranges(self) -> None:
        checks = {
            "mode": (self.mode in _TEMPLATES, f"one of {', '.join(_TEMPLATES)}"),
            "backend": (self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            "read": (self.read in (None, "probability", "share"), "'probability' or 'share'"),
            "orders": (self.orders in ("both", "one"), "'both' or 'one'"),
            "average": (self.average in (None, "log_odds", "probability"), "'log_odds' or 'probability'"),
            "num_samples": (self.num_samples >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "max_completion_length": (self.max_completion_length >= 1, "a number of tokens >= 1"),
            "max_length": (self.max_length is None or self.max_length >= 1, "a number of tokens >= 1"),
            "temperature": (self.temperature is None or 0 <= self.temperature < math.inf, "0 or a positive number"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and up to 1"),
        }
        for name, (fine, needed) in checks.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r}; needed: {needed}.")
        if self.max_length is not None and self.backend == "openai":
            raise ValueError(
                "max_length is counted with the judge's tokenizer, which the backend 'openai' does not have. Shorten "
                "the rows, or use backend='vllm'."
            )

    def _check_labels(self) -> None:
        usual = {"score": list("12345"), "list": list(LETTERS)}
        self.labels = [str(label) for label in self.labels or usual.get(self.mode, ["A", "B"])]
        if any(not label.strip() or label != label.strip() for label in self.labels):
            raise ValueError(f"labels={self.labels}; needed: texts without spaces around them.")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) < 2:
            raise ValueError(f"labels={self.labels}; needed: at least two, all different.")
        nested = [(a, b) for a in self.labels for b in self.labels if a != b and b.startswith(a)]
        if nested and self.backend == "openai" and self.read == "probability":
            raise ValueError(
                f"The label {nested[0][1]!r} begins with the label {nested[0][0]!r}, and the first token of an answer "
                "may be both. Give other labels, or use backend='vllm', which knows the tokens."
            )
        if self.compares and len(self.labels) != 2:
            raise ValueError(f"labels={self.labels}; needed: two, for the first and the second completion.")
        if self.mode != "score":
            if self.values is not None:
                raise ValueError(f"values={self.values} are for mode='score'. Leave them out.")
            return
        if self.values is None:
            try:
                self.values = [float(label) for label in self.labels]
            except ValueError as error:
                raise ValueError(
                    f"labels={self.labels} are not numbers, so they need values=[...], one for each label."
                ) from error
        if len(self.values) != len(self.labels) or not all(map(math.isfinite, self.values)):
            raise ValueError(f"values={self.values}; needed: {len(self.labels)} finite numbers, one for each label.")

    def _read_template(self) -> PromptTemplate:
        file, needed = _TEMPLATES[self.mode]
        optional = _OPTIONAL - needed
        given = {name for name in ("criteria", "rubric", "few_shot") if getattr(self, name)}
        source = FOLDER / file if self.template is None else self.template
        if isinstance(source, str) and "{" not in source and not os.path.isfile(source):
            raise FileNotFoundError(f"There is no template {source}. Give the path of a Jinja file, or its text.")
        question = PromptTemplate.read(source, needed=needed | given, optional=optional - given)
        labels, texts = self.labels, ["text-of-one"]
        if self.shows_several:
            labels, texts = self.labels[:2], ["text-of-one", "text-of-two"]
        try:
            shown = self.render("text-of-prompt", texts, labels, question)
        except TemplateError as error:
            raise ValueError(f"{question.name} cannot be filled in: {error}.") from error
        for text in ("text-of-prompt", *texts):
            if text not in shown:
                part = "the prompt" if text == "text-of-prompt" else "the text of every completion"
                raise ValueError(f"{question.name} does not show {part}. Needed: {_USE[self.mode]}.")
        if any(label not in shown for label in labels):
            raise ValueError(f"{question.name} does not name the labels {labels}. Needed: {{{{ labels }}}}.")
        return question

    def render(
        self, prompt: str, completions: list[str], labels: list[str], question: PromptTemplate | None = None
    ) -> str:
        """The question about these completions, which are shown in this order, as text."""
        shown: dict[str, Any] = {"completion": completions[0]}
        if self.shows_several:
            pairs = zip(labels, completions, strict=True)
            shown = {"completions": [{"label": label, "text": text} for label, text in pairs]}
        return (
            (question or self.question)
            .render(
                prompt=prompt,
                labels=labels,
                all_labels=self.labels,
                criteria=self.criteria,
                rubric=self.rubric,
                few_shot=self.few_shot or [],
                reasoning=self.reasoning,
                answer_prefix=self.answer_prefix or "",
                **shown,
            )
            .strip()
        )

    def _check_few_shot(self) -> None:
        field = "completions" if self.shows_several else "completion"
        for number, example in enumerate(self.few_shot or []):
            if not isinstance(example, Mapping) or not {"prompt", field, "label"} <= set(example):
                found = sorted(example) if isinstance(example, Mapping) else f"a {type(example).__name__}"
                raise ValueError(f"few_shot[{number}] has {found}; needed: 'prompt', '{field}' and 'label'.")
            if self.mode != "list" and str(example["label"]) not in self.labels:
                raise ValueError(
                    f"few_shot[{number}] has the label {example['label']!r}; needed: one of {', '.join(self.labels)}."
                )
        self.few_shot = [{"reasoning": None, **example} for example in self.few_shot or []] or None


def reward_settings(**settings: Any) -> JudgeSettings:
    """The settings of a judge that is a reward function: `mode` is `"score"` unless you give another."""
    checked = JudgeSettings.of(**{"mode": "score", **settings})
    if checked.mode == "compare":
        raise ValueError(
            "mode='compare' says which of two completions is better, and not how good one is. Needed: 'score', or "
            "'rank' or 'list' for the completions of one prompt."
        )
    return checked


def read_judge_file(path: str | Path) -> tuple[str, dict[str, Any]]:
    """
    Read a judge that is a reward function from a YAML file, and check it.

    Returns:
        `tuple[str, dict]`: the judge (a folder, a Hub id, or the name on a server) and its settings.

    Raises:
        ValueError: the file is no mapping with `judge`, or a setting is unknown or out of its range.
        FileNotFoundError: there is no such file.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("judge"), str):
        raise ValueError(f"{path} has no key 'judge'; needed: the judge's folder, Hub id, or name on a server.")
    judge = settings.pop("judge")
    try:
        reward_settings(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return judge, settings


_USE = {
    "compare": "{{ prompt }}, and {{ one.label }} and {{ one.text }} for each `one` in `completions`",
    "score": "{{ prompt }} and {{ completion }}",
}
_USE |= {"rank": _USE["compare"], "list": _USE["compare"]}


def _examples(given: Any) -> list[dict[str, Any]] | None:
    """The few-shot examples, read from their file if a path is given."""
    if given is None or isinstance(given, (list, tuple)):
        return None if given is None else list(given)
    lines = Path(given).read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"few_shot: {given} is not a JSONL file ({error}). Needed: a JSON object a line.") from error
