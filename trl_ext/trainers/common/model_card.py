"""`README.md` beside what our trainers save: what the model is, how good it is, and how to score with it.

It knows facts of a run, sidecars, metrics and Markdown. Trainers decide when a card is written.
"""

import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import Trainer

from trl_ext.models.sidecar import Sidecar


CARD_NAME = "README.md"
PACKAGES = ("trl-ext", "trl", "transformers", "peft", "datasets", "torch")
# A section between these lines is kept when the card is written again.
EVALUATION_BEGINS, EVALUATION_ENDS = "<!-- trl-ext evaluation begins -->", "<!-- trl-ext evaluation ends -->"

KINDS = {
    "scalar": "A reward model that gives a score to a completion; higher is better.",
    "outcome": "An outcome reward model: how likely the answer is right.",
    "process": "A process reward model: how likely each step is right.",
    "segment": "A reward model that rates segments of a completion.",
}
# Of an entry of the evaluation, what is no quality of the model.
NO_QUALITY = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")
RANDOM = {
    "accuracy": "0.5 at random",
    "kendall_tau": "0 at random",
    "balanced_accuracy": "0.5 at random",
    "auc": "0.5 at random",
    "question_auc": "0.5 at random",
    "right_wrong_accuracy": "0.5 at random",
    "r2": "0 for the mean label",
    "spearman": "0 at random",
}
# Metrics that are a baseline for another one.
BASELINES = ("length_accuracy", "step_index_auc")


def name_in_card(trainer: Any, folder: str | Path) -> str:
    """What the examples of a card load: the repository that is pushed to, or the folder under its final name.

    A stage writes into `<name>.partial`, which is renamed to `<name>` when the stage is done.
    """
    # set where `push_to_hub` is called or asked for
    pushed = getattr(trainer, "hub_model_id", None)
    return pushed or str(Path(*(part.removesuffix(".partial") for part in Path(folder).parts)))


def write_card(folder: str | Path, text: str) -> None:
    """Write the card into a folder; the section of an evaluation that is there stays."""
    path = Path(folder, CARD_NAME)
    kept = evaluation_of(path.read_text(encoding="utf-8")) if path.is_file() else None
    path.write_text(text if kept is None else _with_section(text, kept), encoding="utf-8")


def put_evaluation(folder: str | Path, markdown: str) -> None:
    """
    Put the results of an evaluation into the model card of a folder, in place of those of an earlier one.

    Args:
        folder (`str` or `Path`): the folder of a model. A card is made if there is none.
        markdown (`str`): the section's content, without a heading of the first or second level.
    """
    path = Path(folder, CARD_NAME)
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {Path(folder).resolve().name}\n"
    section = f"{EVALUATION_BEGINS}\n## Evaluation\n\n{markdown.strip()}\n{EVALUATION_ENDS}"
    path.write_text(_with_section(text, section), encoding="utf-8")


def evaluation_of(card: str) -> str | None:
    """The section of an evaluation in a card, with its marks; `None` where there is none."""
    start, end = card.find(EVALUATION_BEGINS), card.find(EVALUATION_ENDS)
    return card[start : end + len(EVALUATION_ENDS)] if 0 <= start < end else None


def _with_section(card: str, section: str) -> str:
    there = evaluation_of(card)
    return card.replace(there, section) if there is not None else f"{card.rstrip()}\n\n{section}\n"


def reward_card(
    trainer: Trainer,
    sidecar: Sidecar,
    facts: dict[str, str],
    name: str,
    **metadata: Any,
) -> str:
    """
    The card of a reward model.

    Args:
        trainer (`Trainer`): for its arguments, class, `dataset_name` and latest evaluation.
        sidecar ([`Sidecar`]): what the model is.
        facts (`dict[str, str]`): those of the run, see `run_facts`.
        name (`str`): the model's folder or Hub id, as it stands in the examples.
        **metadata: for the head of the card, such as `license`, `language` and `tags`.
    """
    what = KINDS[sidecar.kind]
    return card_text(
        name,
        metadata_of(trainer, sidecar.base.id, sidecar.is_adapter, trainer.dataset_name, name, metadata),
        [
            f"{what} {trained_by(trainer, sidecar.base.id, trainer.dataset_name)}",
            *training_section(facts | run_length(trainer)),
            *metrics_section(trainer, sidecar.kind, sidecar.loss_type),
            "## Score with trl_ext",
            _ours(sidecar, name),
            "## Score with plain transformers",
            _plain(sidecar, name),
        ],
        local_folders(trainer, sidecar.base.id, trainer.dataset_name),
    )


def ensemble_card(
    trainer: Trainer,
    sidecar: Sidecar,
    facts: dict[str, str],
    name: str,
    members: int,
    **metadata: Any,
) -> str:
    """The card of an ensemble, whose members have cards of their own. The arguments are those of [`reward_card`]."""
    code = f'from trl_ext import RewardEnsemble\n\nensemble = RewardEnsemble("{name}")\n'
    code += 'ensemble(prompts=["2 + 2?"], completions=["4"])  # [score]'
    return card_text(
        name,
        metadata_of(trainer, sidecar.base.id, True, trainer.dataset_name, name, metadata),
        [
            f"An ensemble of {members} reward models on one base, each in a folder of its own (`member-0`, ...). "
            f"{trained_by(trainer, sidecar.base.id, trainer.dataset_name)}",
            *training_section(facts | run_length(trainer)),
            *metrics_section(trainer, sidecar.kind, sidecar.loss_type),
            "## Score with trl_ext",
            python_block(code),
            "## Score with plain transformers",
            "Each member is an ordinary adapter: its card says how.",
        ],
        local_folders(trainer, sidecar.base.id, trainer.dataset_name),
    )


# ---------------------------------------------------------------------------------------------------- sections
def card_text(name: str, head: str, sections: list[str], hidden: Iterable[str] = ()) -> str:
    """A card from its YAML and its sections, with the versions at its end; `hidden` folders get a placeholder."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    body = "\n\n".join([f"# {Path(name).name}", *sections, "## Versions", versions])
    for folder in hidden:
        placeholder = f"path/to/{Path(folder).name}"
        body = body.replace(folder, placeholder)
        body += f"\n\n`{placeholder}` was a folder of the machine that trained the model."
    return f"---\n{head}\n---\n\n{body}\n"


def local_folders(trainer: Any, *names: str | None) -> list[str]:
    """Which of some models and data sets are local paths that a card on the Hub must not show; none for a local card.

    A card that stays on this machine keeps the paths, so that its examples run.
    """
    pushed = getattr(trainer, "hub_model_id", None)
    found = [name for name in names if name and Path(name).is_absolute()] if pushed else []
    return sorted(set(found), key=len, reverse=True)  # a folder before the folder that holds it


def metadata_of(
    trainer: Any, base: str, is_adapter: bool, dataset_name: str | None, name: str, more: Mapping[str, Any]
) -> str:
    """The YAML at the head of a card."""
    # `transformers.Trainer` has no `_tag_names`; ours and TRL's do
    tags = [*getattr(trainer, "_tag_names", []), "trl-ext"]
    given = more.get("tags") or []
    tags = list(dict.fromkeys([*tags, *([given] if isinstance(given, str) else given)]))
    values = {
        "base_model": base if _is_hub_id(base) else None,
        "datasets": dataset_name if dataset_name and _is_hub_id(dataset_name) else None,
        "library_name": "peft" if is_adapter else "transformers",
        "model_name": Path(name).name,
        "pipeline_tag": "text-classification",
        **{key: value for key, value in more.items() if key in ("license", "language", "pipeline_tag") and value},
        "tags": tags,
    }
    return ModelCardData(**{key: value for key, value in values.items() if value is not None}).to_yaml()


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def trained_by(trainer: Any, base: str, dataset_name: str | None) -> str:
    """A sentence: from what, on what and with which trainer."""
    start = f"`{base}`" if base else "a model in memory"
    data = f" on `{dataset_name}`" if dataset_name else ""
    return f"Trained from {start}{data} with `{type(trainer).__name__}` of trl_ext, an extension of TRL."


def run_length(trainer: Trainer) -> dict[str, str]:
    """Facts that are known after training only, and the arguments that matter most."""
    args, state = trainer.args, trainer.state
    # only trainers that read texts have the argument
    limit = getattr(args, "max_length", None)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return {
        "length": f"{state.global_step} steps, {state.epoch or 0:.4g} epochs",
        "learning rate": f"{args.learning_rate:g} ({schedule})",
        "longest row": f"{limit} tokens" if limit else "",
        "seed": str(args.seed),
    }


def training_section(facts: Mapping[str, str]) -> list[str]:
    """Heading and table of what the run was."""
    lines = [f"| {name} | {_cell(text)} |" for name, text in facts.items() if text and name != "metrics"]
    return ["## Training", "\n".join(["| | |", "| --- | --- |", *lines])]


def metrics_section(trainer: Trainer, kind: str | None, loss_type: str | None) -> list[str]:
    """Heading and table of the latest evaluation, with what a model that knows nothing would reach."""
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    if not entries:
        return ["## Metrics", "The run had no evaluation. (`eval_strategy` and an `eval_dataset` give one.)"]
    metrics = {
        name.removeprefix("eval_"): value
        for name, value in entries[-1].items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(NO_QUALITY)
    }
    lines = [
        f"| {name} | {value:.4g} | {_baseline(name, metrics, kind, loss_type)} |" for name, value in metrics.items()
    ]
    step = entries[-1].get("step", trainer.state.global_step)
    table = "\n".join(["| metric | value | compare with |", "| --- | --- | --- |", *lines])
    return ["## Metrics", f"On the evaluation data, after step {step}.", table]


def _baseline(name: str, metrics: Mapping[str, float], kind: str | None, loss_type: str | None) -> str:
    """What a model that has learned nothing would reach, where that is known."""
    if name == "loss" and loss_type in ("bradley_terry", "bce"):
        return f"{math.log(2):.4g} for a model that is never sure"
    if name == "accuracy" and "length_accuracy" in metrics:
        return f"0.5 at random; {metrics['length_accuracy']:.4g} if the longer answer won"
    if name == "accuracy" and {"wrong_rate", "right_rate"} <= metrics.keys():
        return f"{max(metrics['wrong_rate'], metrics['right_rate']):.4g} for the more frequent class"
    if name == "best_of_n" and "mean_of_n" in metrics:
        return f"{metrics['mean_of_n']:.4g} for a random one; {metrics.get('oracle_of_n', 1):.4g} at most"
    if name == "auc_to_first_error" and "step_index_auc" in metrics:
        return f"{metrics['step_index_auc']:.4g} for the number of the step alone"
    if name == "accuracy" and kind != "scalar":
        return ""
    # of one of several categories or data sets: `factuality_auc`
    ends = [text for known, text in RANDOM.items() if known != "accuracy" and name.endswith(f"_{known}")]
    return RANDOM.get(name, ends[0] if ends and name not in BASELINES else "")


def _ours(sidecar: Sidecar, name: str) -> str:
    calls = {
        "process": 'scorer.score_steps(["2 + 2?"], [["2 + 2 = 4", "So 4."]])  # [[P(right) of each step]]',
        "segment": 'scorer.score_segments(["2 + 2?"], ["It is 4."], [[(0, 8)]])  # characters of each segment',
    }
    call = 'scorer(prompts=["2 + 2?"], completions=["4"])  # [score]'
    lines = ["from trl_ext import RewardScorer", "", f'scorer = RewardScorer("{name}")', call]
    lines += [calls[sidecar.kind]] if sidecar.kind in calls else []
    return python_block("\n".join(lines))


def _plain(sidecar: Sidecar, name: str) -> str:
    """Code without trl_ext that gives the raw scores."""
    of_tokens = sidecar.head_class == "token"
    kind = f"AutoModelFor{'Token' if of_tokens else 'Sequence'}Classification"
    lines = ["import torch", *(["from peft import PeftModel"] if sidecar.is_adapter else [])]
    lines += [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if sidecar.is_adapter:
        lines += [
            f'base = {kind}.from_pretrained("{sidecar.base.id}", num_labels={sidecar.num_labels}, '
            f'dtype="{sidecar.base.dtype}")',
            f'model = PeftModel.from_pretrained(base, "{name}").eval()',
        ]
    else:
        lines += [f'model = {kind}.from_pretrained("{name}").eval()']
    lines += _input_lines(sidecar)
    if sidecar.kind in ("scalar", "outcome"):
        lines += ["with torch.no_grad():"]
        lines += [
            "    score = model(**inputs).logits[0, -1, 0]" if of_tokens else "    score = model(**inputs).logits[0, 0]"
        ]
    elif of_tokens:
        lines += ["with torch.no_grad():", "    outputs = model(**inputs).logits[0]  # (tokens, outputs)"]
    else:  # the class of transformers keeps the last token only: read the head's output before that
        head = sidecar.head_modules[-1]
        lines += [
            "seen = []",
            f'head = next(part for name, part in model.named_modules() if name.endswith("{head}"))',
            "head.register_forward_hook(lambda module, args, output: seen.append(output))",
            "with torch.no_grad():",
            "    model(**inputs)",
            "outputs = seen[-1][0]  # (tokens, outputs)",
        ]
    notes = ["Scores are raw: a normaliser in `reward_model.json` is not applied."] if sidecar.normalizer else []
    if sidecar.base.quantization:
        notes += ["The base was quantized in training; `reward_model.json` says how. Load it so for the same scores."]
    if sidecar.kind in ("process", "segment"):
        place = {"last": "its last token", "all": "all its tokens", "before": "the token before it"}
        where = place.get(sidecar.label_placement or "last", sidecar.label_placement)
        what = f"a step (with {sidecar.step_separator!r} behind it)" if sidecar.kind == "process" else "a segment"
        notes += [f"The output of {what} is that at {where}. Outputs: {sidecar.label_meaning}."]
    return "\n\n".join([python_block("\n".join(lines)), *notes])


def _input_lines(sidecar: Sidecar) -> list[str]:
    settings = sidecar.token_policy
    text = '"2 + 2?" + "4"' + (" + tokenizer.eos_token" if settings.get("append_eos") else "")
    special = "" if settings.get("adds_special_tokens", True) else ", add_special_tokens=False"
    lines = [
        "# one text at a time; of a chat pass what tokenizer.apply_chat_template(messages, tokenize=False) gives,"
    ]
    lines += ["# with add_special_tokens=False and without another EOS"]
    if sidecar.pad_is_eos and sidecar.head_class == "sequence":
        lines += ["model.config.pad_token_id = None  # it is EOS, and transformers would not see the last token"]
    return [*lines, f'inputs = tokenizer({text}, return_tensors="pt"{special})']


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def python_block(code: str) -> str:
    """A block of Python in Markdown."""
    return f"```python\n{code}\n```"
