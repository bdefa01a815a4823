"""The model card of a language model that a trainer of ours has trained: `policy_card`.

It knows Markdown and facts of a run. `model_card` has the parts that it shares with the cards of reward models.
"""

from collections.abc import Sequence
from typing import Any

from trl_ext.trainers.common.model_card import (
    card_text,
    local_folders,
    metadata_of,
    python_block,
    trained_by,
    training_section,
)


def policy_card(
    trainer: Any,
    facts: dict[str, str],
    metrics: Sequence[str],
    name: str,
    base: str,
    is_adapter: bool,
    what: str,
    dataset_name: str | None = None,
    **metadata: Any,
) -> str:
    """
    The card of a policy.

    Args:
        trainer: its class, and its tags if it has any, are named.
        facts (`dict[str, str]`): what the run was, see `run_facts`.
        metrics (sequence of `str`): heading and table, see `metrics_section`.
        name (`str`): the model's folder or Hub id, as it stands in the example.
        base (`str`): Hub id or folder of the model that training started from; empty for one in memory.
        is_adapter (`bool`): whether the folder holds an adapter.
        what (`str`): the first sentence.
        dataset_name (`str`, *optional*): Hub id or file of the training data.
        **metadata: for the head of the card, such as `license`, `language` and `tags`.
    """
    kind = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    imports = f"from transformers import {kind}, AutoTokenizer"
    if is_adapter:
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer"
    code = f"""{imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}").eval()
inputs = tokenizer("2 + 2 =", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
    head = metadata_of(trainer, base, is_adapter, dataset_name, name, {"pipeline_tag": "text-generation", **metadata})
    sentence = f"{what} {trained_by(trainer, base, dataset_name)}"
    sections = [sentence, *training_section(facts), *metrics, "## Use", python_block(code)]
    return card_text(name, head, sections, local_folders(trainer, base, facts.get("teacher"), dataset_name))


def rounds_section(history: Sequence[dict[str, Any]]) -> list[str]:
    """Heading and table of the rounds of an expert iteration; round 0 is the policy before training."""
    wanted = ("round", "rows", "train_loss", "eval_reward", "eval_reward_error", "eval_verifier", "eval_length")
    names = [name for name in wanted if any(name in entry for entry in history)]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(f"{entry[name]:.4g}" if name in entry else "" for name in names) for entry in history]
    return ["## Metrics", "Round 0 is the policy before training.", "\n".join(f"| {line} |" for line in lines)]


def sampling_section(trainer: Any) -> list[str]:
    """Heading and table of the completions that were sampled in training: the first and the last logged figures."""
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    if not entries:
        return ["## Metrics", "Nothing was logged yet."]
    first, last = entries[0], entries[-1]
    names = [
        name
        for name in last
        if name in ("reward", "kl", "completions/mean_length", "completions/clipped_ratio")
        or name.startswith("rewards/")
        and name.endswith("/mean")
    ]
    lines = [f"| {name} | {first.get(name, float('nan')):.4g} | {last[name]:.4g} |" for name in names]
    head = f"| metric | step {first.get('step')} | step {last.get('step')} |"
    return [
        "## Metrics",
        "Of the completions that were sampled in training.",
        "\n".join([head, "| --- | --- | --- |", *lines]),
    ]
