"""The backend `transformers`: `model.generate` in this process, in batches of prompts of similar length.

This module knows models and tokens, and nothing of shards or scores.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_ext.models.adapters import check_policy_adapter
from trl_ext.models.building import as_dtype, attention_at_hand
from trl_ext.models.inputs import text_tokenizer
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import vocab_size
from trl_ext.pipelines.generation.generator import Columns, GenerationError, PromptEncoder, number_for_each
from trl_ext.pipelines.generation.records import Completion
from trl_ext.pipelines.generation.sampling import Chat, Sampling
from trl_ext.pipelines.user_functions import did_you_mean


class TransformersGenerator:
    """
    Completes prompts with a model in this process; see [`~trl_ext.pipelines.generation.generator.Generator`].

    Every completion is a row of a batch, and rows are sorted by the length of their prompts, so any `num_generations`
    works with any batch size. The prompts of one call and its seed determine all samples.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        sampling: Sampling,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"generation_batch_size={batch_size}; needed: a number of completions >= 1.")
        init = model_init_kwargs or {}
        if isinstance(model, (str, Path)):
            source = local_folder(model, init.get("revision"))  # the tokenizer comes from the same revision
            model = load_policy(source, init)
            if processing_class is None:
                remote_code = init.get("trust_remote_code", False)
                processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=remote_code)
        elif processing_class is None:
            processing_class = tokenizer_in_memory(model, init)
        processing_class = text_tokenizer(processing_class)
        self.model = model
        self._sampling = sampling
        self._encoder = PromptEncoder(processing_class, sampling)
        self._batch_size = batch_size
        declared = model.generation_config.eos_token_id
        # every end token that the model declares ends a completion
        ends = {*([declared] if isinstance(declared, int) else declared or ()), processing_class.eos_token_id} - {None}
        self._ends = ends
        self._known = vocab_size(model)
        # not every family has a limit, and some have it under another name (GPT-2's n_positions)
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        pad = processing_class.pad_token_id
        # padding is masked, so any token that the model knows will do
        self._pad = pad if pad is not None and pad < self._known else min(ends, default=0)
        self._config = self._generation_config()

    def _generation_config(self) -> GenerationConfig:
        sampling = self._sampling
        arguments: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            arguments = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
            }
        arguments |= {
            "max_new_tokens": sampling.max_completion_length,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_strings": sampling.stop,
            "bos_token_id": self._encoder.tokenizer.bos_token_id,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": self._pad,
        }
        known = GenerationConfig().to_dict()
        for name in sampling.generation_kwargs or {}:
            if name == "num_return_sequences":
                raise ValueError("generation_kwargs has 'num_return_sequences'. Set num_generations (n) instead.")
            if name not in known:
                raise ValueError(
                    f"generation_kwargs has {name!r}, which GenerationConfig does not know.{did_you_mean(name, known)}"
                )
        return GenerationConfig(**(arguments | (sampling.generation_kwargs or {})))

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int | Sequence[int],
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]."""
        prompts = list(prompts)
        encoded = self._encoder.ids(prompts, columns)
        self._encoder.check_tokens(encoded, self._known)
        self._encoder.check_lengths(encoded, self._config.max_new_tokens, self._positions)
        order = sorted(
            range(len(prompts)), key=lambda row: (-len(encoded[row]), row)
        )  # the longest first, so that a batch that is too large fails at once
        numbers = number_for_each(prompts, num_generations)
        rows = [row for row in order for _ in range(numbers[row])]
        found: list[list[Completion]] = [[] for _ in prompts]
        with self._ready(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for first in range(0, len(rows), self._batch_size):
                batch = rows[first : first + self._batch_size]
                started = time.perf_counter()
                outputs = self._run([encoded[row] for row in batch])
                latency = time.perf_counter() - started
                for row, ids in zip(batch, outputs, strict=True):
                    text, ids, reason = self._encoder.finished(
                        prompts[row], encoded[row], ids, self._ends, self._config.max_new_tokens
                    )
                    found[row].append(Completion(text, ids, reason, None, seed, latency))
        return found

    @property
    def chats(self) -> bool:
        """Whether prompts can be chats: the tokenizer has a chat template."""
        given = self._sampling.chat_template or getattr(self._encoder.tokenizer, "chat_template", None)
        return bool(given)  # tokenizers from outside transformers may not have the attribute

    def prompt_lengths(self, prompts: Sequence[str | Chat], columns: Sequence[Columns] | None = None) -> list[int]:
        """How many tokens each prompt has."""
        return [len(ids) for ids in self._encoder.ids(prompts, columns)]

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens that a prompt may have beside the longest completion; `None` without a limit."""
        return None if self._positions is None else self._positions - self._config.max_new_tokens

    def label_logprobs(self, prompts: Sequence[str | Chat], labels: Sequence[str]) -> list[list[float | None]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]. The values are exact, so none is `None`."""
        prompts = list(prompts)
        encoded = self._encoder.ids(prompts, None)
        tokens = [self._encoder.label_tokens(prompt, labels) for prompt in prompts]
        self._encoder.check_tokens([[token for ids in row for token in ids] for row in tokens], self._known)
        self._encoder.check_tokens(encoded, self._known)
        order = sorted(range(len(prompts)), key=lambda row: (-len(encoded[row]), row))
        config = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=self._pad,
            output_logits=True,  # before any processor changes them
            return_dict_in_generate=True,
        )
        found: list[list[float | None]] = [[] for _ in prompts]
        with self._ready():
            for first in range(0, len(order), self._batch_size):
                batch = order[first : first + self._batch_size]
                output, _ = self._call([encoded[row] for row in batch], config)
                logprobs = output.logits[0].float().log_softmax(-1)  # (B, V)
                for place, row in enumerate(batch):
                    found[row] = [logprobs[place, ids].logsumexp(0).item() for ids in tokens[row]]
        return found

    def _run(self, encoded: list[list[int]]) -> list[list[int]]:
        output, width = self._call(encoded, self._config, tokenizer=self._encoder.tokenizer)
        return [self._without_padding(row) for row in output[:, width:].tolist()]  # (B, T + new)

    def _call(self, encoded: list[list[int]], config: GenerationConfig, **kwargs: Any) -> tuple[Any, int]:
        """What `model.generate` returns for prompts that are padded on the left, and their padded length."""
        width = max(map(len, encoded))
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in encoded])  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])  # (B, T)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        try:
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **kwargs)
        except torch.OutOfMemoryError as error:
            raise GenerationError(
                f"The GPU has not enough memory for {len(encoded)} completions at a time, with prompts of up to "
                f"{width} tokens and {config.max_new_tokens} new ones. Lower generation_batch_size, or the "
                f"batch_size of a judge. ({error})"
            ) from error
        return output, width

    def _without_padding(self, ids: list[int]) -> list[int]:
        if self._pad in self._ends:
            return ids  # padding follows the first end token, and the ids are cut there
        end = len(ids)
        while end and ids[end - 1] == self._pad:
            end -= 1
        return ids[:end]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Switch to eval mode without the checkpoint's sampling defaults, and back afterwards."""
        model, was_training, kept = self.model, self.model.training, self.model.generation_config
        model.eval()
        model.generation_config = GenerationConfig()  # else the checkpoint's would replace every None in ours
        try:
            with torch.inference_mode():
                yield
        finally:
            model.generation_config = kept
            model.train(was_training)


def tokenizer_in_memory(
    model: PreTrainedModel | PeftModel, model_init_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder that a model in memory was loaded from. Raises `ValueError` for an adapter."""
    if isinstance(model, PeftModel):
        raise ValueError("An adapter in memory does not say its tokenizer. Pass `processing_class`.")
    remote_code = (model_init_kwargs or {}).get("trust_remote_code", False)
    return text_tokenizer(AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=remote_code))


def load_policy(path: str | Path, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel | PeftModel:
    """
    Load a language model from a folder or Hub id, an adapter on its base. `dtype` defaults to the saved one.

    Raises `ValueError` for an adapter that would load as another one than was trained.
    """
    kwargs = {"dtype": "auto", "device_map": {"": PartialState().device}} | (model_init_kwargs or {})
    kwargs["dtype"] = as_dtype(kwargs["dtype"])
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    quantization = kwargs.get("quantization_config")
    if isinstance(quantization, dict):
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(dict(quantization))
    folder = local_folder(path, kwargs.get("revision"))
    with attention_at_hand(kwargs.get("attn_implementation")):
        if not Path(folder, "adapter_config.json").is_file():
            return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        check_policy_adapter(PeftConfig.from_pretrained(folder))
        kwargs.pop("revision", None)  # it belongs to the adapter; the base has another
        return AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs)
