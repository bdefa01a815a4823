"""The supervised fine-tuning of one round: it chooses the rows, and trains the policy on disk into a new one on disk.

A plain `trl.SFTTrainer` trains, with a new optimizer in each round. After a kill it resumes from its last checkpoint.
Nothing stays in memory afterwards. This module reads what was selected. It does not sample, score or evaluate.
"""

import copy
import gc
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from trl_ext.data.tokenization import TextRow, TokenizationSettings, encode_batch
from trl_ext.models.adapters import check_policy_adapter
from trl_ext.models.bases import check_base_is_saved
from trl_ext.models.inputs import use_known_pad_token
from trl_ext.models.sidecar import vocab_size
from trl_ext.pipelines.generation.transformers_backend import load_policy
from trl_ext.pipelines.rejection_sampling.config import RejectionSamplingConfig
from trl_ext.pipelines.rejection_sampling.rounds import Rounds
from trl_ext.pipelines.rejection_sampling.sampler import Selected
from trl_ext.pipelines.stages.cache_key import canonical
from trl_ext.pipelines.stages.row_dataset import dataset_of_rows
from trl_ext.trainers.common.setup import is_template_file
from trl_ext.trainers.common.summary import log_start, run_facts
from trl_ext.trainers.common.tracking import open_run, use_safe_callback


logger = logging.getLogger(__name__)


def rows_to_learn_from(rounds: Rounds, number: int, accumulate: bool) -> Dataset:
    """The rows that a round selected; with `accumulate` also those of earlier rounds, each once."""
    rows = dataset_of_rows(rounds.rows(number))
    wanted = {"prompt", "completion", "tools", "chat_template_kwargs"}
    rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    if not accumulate or number == 1:
        return rows
    before = [dataset_of_rows(rounds.rows(earlier)) for earlier in range(1, number)]
    both = concatenate_datasets([rows, *(item.select_columns(rows.column_names) for item in reversed(before))])
    seen: set[bytes] = set()
    first = []
    for place, row in enumerate(both):
        digest = hashlib.sha256(canonical([row["prompt"], row["completion"]])).digest()
        if digest not in seen:
            seen.add(digest)
            first.append(place)
    return both.select(first)


def rows_that_fit(
    rows: Dataset, number: int, args: RejectionSamplingConfig, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """
    The rows that SFT does not cut at `max_length`, if `mask_truncated_completions` is set; else all, and a warning.

    Raises:
        ValueError: no row is left.
    """
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):  # the others cut nothing away
        return rows
    texts = [
        TextRow(row["prompt"], row["completion"], row.get("tools"), row.get("chat_template_kwargs")) for row in rows
    ]
    settings = TokenizationSettings(append_eos=tokenizer.eos_token is not None)
    lengths = [len(encoded.ids) for encoded in encode_batch(tokenizer, texts, settings)]
    fitting = [place for place, length in enumerate(lengths) if length <= args.max_length]
    if len(fitting) == len(rows):
        return rows
    found = (
        f"Round {number}: {len(rows) - len(fitting)} of {len(rows)} selected completions are longer than "
        f"max_length={args.max_length} tokens together with their prompts (the longest {max(lengths)})."
    )
    fix = "Raise max_length, or set it to None."
    if not args.mask_truncated_completions:
        fix = f"SFT cuts them there, without an EOS. {fix} Or set mask_truncated_completions=True to leave them out."
    elif not fitting:
        raise ValueError(f"{found} There is nothing left to fine-tune on. {fix}")
    else:
        rows, fix = rows.select(fitting), f"They are left out. {fix}"
    if PartialState().is_main_process:
        logger.warning(f"{found} {fix}")
    return rows


def check_selected(number: int, selected: Selected, args: RejectionSamplingConfig) -> None:
    """Raise `ValueError` for pairs and groups, and warn of completions that were cut at `max_completion_length`."""
    if selected.selection.kind != "rows":
        raise ValueError(
            f"selection={args.selection!r} gives {selected.selection.kind}, which supervised fine-tuning cannot use. "
            "Use a selector of samples here, and rejection_sample(...) for pairs and groups."
        )
    finished = selected.scored.finished[selected.selection.rows]
    if not finished.all() and PartialState().is_main_process:
        logger.warning(
            f"Round {number}: {int((~finished).sum())} of {len(finished)} selected completions were cut at "
            f"max_completion_length={args.max_completion_length}. SFT appends an EOS to them, so the policy learns to "
            "stop there. Set mask_truncated_completions=True, or raise max_completion_length."
        )


def fine_tune(
    rounds: Rounds,
    number: int,
    source: str | Path,
    rows: Dataset,
    args: trl.SFTConfig,
    processing_class: PreTrainedTokenizerBase,
    model_init_kwargs: dict[str, Any],
    peft_config: PeftConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """
    Train the policy of a round and move it to its place, unless that is done already.

    Args:
        rounds ([`~trl_ext.pipelines.rejection_sampling.rounds.Rounds`]): the rounds of the run.
        number (`int`): the number of this round.
        source (`str` or `Path`): the policy to start from, full or adapter.
        rows (`Dataset`): rows with `prompt` and `completion`.
        args (`trl.SFTConfig`): the run's arguments; the round's seed, run name and folder are derived from them.
        processing_class (`PreTrainedTokenizerBase`): the policy's tokenizer.
        model_init_kwargs (`dict`): arguments of `from_pretrained`.
        peft_config (`PeftConfig`, *optional*): config of a new adapter.
        callbacks (`list[TrainerCallback]`, *optional*): callbacks of the trainer.
    """
    folder = rounds.of(number)
    if rounds.policy(number).is_dir():
        return
    run_name = f"{args.run_name or Path(args.output_dir).name}-round-{number}"
    args = copy.deepcopy(args)
    args.output_dir, args.run_name, args.seed = str(folder / "sft"), run_name, args.seed + number
    args.eval_strategy, args.load_best_model_at_end, args.model_init_kwargs = "no", False, None
    set_seed(args.seed)  # a new adapter has random weights
    adapted = Path(source, "adapter_config.json").is_file()
    model = load_policy(source, model_init_kwargs | ({"is_trainable": True} if adapted else {}))
    use_known_pad_token(processing_class, vocab_size(model))
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=processing_class,
        callbacks=callbacks,
        peft_config=copy.deepcopy(peft_config),  # PEFT changes it
    )
    use_safe_callback(trainer)
    open_run(trainer)
    log_start(trainer, run_facts(trainer, "cross-entropy to the selected completions", round=str(number)))
    output = trainer.train(resume_from_checkpoint=rounds.last_checkpoint(number))
    trainer.save_model(str(folder / "policy.partial"))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        rounds.finish_training(number, {"steps": output.global_step, "loss": output.training_loss})
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chat_template_of(args: trl.SFTConfig) -> str | None:
    """The template of `chat_template_path`, which the first policy must sample with. Only a file can be read here."""
    path = args.chat_template_path
    if path is None:
        return None
    if not is_template_file(path):
        raise ValueError(
            f"chat_template_path={path!r} is no .jinja or .j2 file. The first policy samples with the template that "
            "it is trained with; needed: such a file, or a model and a processing_class that have the template and "
            "its tokens already."
        )
    return Path(path).read_text(encoding="utf-8")


def check_policy(model: Any, peft_config: PeftConfig | None) -> None:
    """Raise an error for an adapter that the rounds could not load again as it is."""
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError("Found a PeftModel and a peft_config; give one of them.")
    check_policy_adapter(peft_config, initialised=False)
    if isinstance(model, PeftModel):  # only its adapter is saved for the rounds
        check_policy_adapter(model.active_peft_config)
        check_base_is_saved(model)


def check_rounds_on_server(args: RejectionSamplingConfig, model: Any, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` for several rounds on a vLLM server with weights that it cannot load while it runs."""
    if not args.use_vllm or args.num_rounds == 1:
        return
    if isinstance(model, PeftModel):
        peft_config = model.active_peft_config
    is_adapter = isinstance(model, (str, Path)) and Path(model, "adapter_config.json").is_file()
    if isinstance(peft_config, LoraConfig) or (peft_config is None and is_adapter):
        return
    policy = Path(args.output_dir) / "rounds" / "1" / "policy"
    raise ValueError(
        f"use_vllm=True with num_rounds={args.num_rounds} and full weights: the server would keep sampling from the "
        f"weights that it was started with. Run one round, start the server again with `vllm serve {policy}`, and run "
        "the next one. Or give a LoRA peft_config: the server then loads the adapter of each round."
    )
