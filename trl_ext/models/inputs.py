"""What a model accepts as input: its tokenizer, the token ids that it has embeddings for, and its positions.

It knows models, tokenizers and processors of transformers. It knows nothing of data sets, training or scoring.
"""

import logging
import re
from datetime import datetime
from typing import NamedTuple

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_ext.models.heads import unwrap
from trl_ext.models.sidecar import vocab_size


logger = logging.getLogger(__name__)

# Names of the modules that hold absolute positions: GPT-2 and its kin, BERT and its kin, OPT and BART.
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


class InputLimits(NamedTuple):
    """
    The limits of a model's input rows.

    Args:
        vocab_size (`int`): the model has embeddings for token ids below this number.
        max_positions (`int`, *optional*): longest row in tokens; `None` for a family without a limit.
    """

    vocab_size: int
    max_positions: int | None

    @classmethod
    def of(cls, model: nn.Module) -> "InputLimits":
        """The limits of a model, which may be wrapped."""
        return cls(vocab_size(model), max_positions(unwrap(model)))


def max_positions(model: PreTrainedModel) -> int | None:
    """
    The longest row that a model's absolute positions allow, in tokens; `None` for families without such a limit.

    A rotary model runs beyond `max_position_embeddings`, so it has no limit here.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _POSITION_TABLES:
            # RoBERTa counts from padding_idx + 1; OPT's table has two entries more than its config says
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(module.num_embeddings - reserved, model.config.max_position_embeddings)
        table = dict(module.named_buffers(recurse=False)).get("embed_positions")
        if table is not None:  # GPT-J and CodeGen look their rotations up in a table
            return len(table)
    return None


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer for text; for a vision-language processor it is its tokenizer with the processor's template."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = processing_class.tokenizer
    if tokenizer.chat_template is None:
        # not every processor has a template
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    logger.warning(
        f"`processing_class` is a {type(processing_class).__name__}. trl_ext reads only text, so "
        f"its {type(tokenizer).__name__} is used."
    )
    return tokenizer


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a folder or Hub id. Raises `ValueError` if there is none."""
    needed = "Pass the tokenizer that it was trained with as `processing_class`."
    if not source:
        raise ValueError(f"An adapter in memory, or a model without a path, does not say its tokenizer. {needed}")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"No tokenizer for this model could be loaded from {source}: {error}. {needed}") from error


_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


def writes_a_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes today's date, so that a chat's token ids change every day."""
    return any(re.search(r"strftime_now\s*\(", template) for template in _templates(tokenizer).values())


def freeze_date(tokenizer: PreTrainedTokenizerBase, now: datetime | None = None) -> None:
    """
    Replace today's date by a fixed day in a tokenizer's chat template, if it writes the date (as Llama 3.1's does).

    The template is saved with the model, so training, scoring and servers make the same token ids on any day.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): if its `chat_template` must change, a warning is logged.
        now (`datetime`, *optional*): the day. Defaults to today.
    """
    if not writes_a_date(tokenizer):
        return
    day = now or datetime.now()
    frozen = {
        name: _DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), template)
        for name, template in _templates(tokenizer).items()
    }
    tokenizer.chat_template = frozen if isinstance(tokenizer.chat_template, dict) else frozen[""]
    if writes_a_date(tokenizer):  # a call without a plain format
        logger.warning("The chat template writes today's date into each chat, so token ids change from day to day.")
    else:
        logger.warning(
            f"The chat template writes today's date into each chat. It is frozen to {day:%Y-%m-%d} in the tokenizer "
            "that is saved with the model, so that chats have the same token ids on any day."
        )


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates of a tokenizer by name; a single one has the name ''."""
    template = getattr(tokenizer, "chat_template", None)  # tokenizers from outside transformers may have none
    return template if isinstance(template, dict) else {"": template or ""}


def use_known_pad_token(tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    """
    Make a tokenizer pad with a token that the model has an embedding for.

    `tokenizer.add_special_tokens({"pad_token": "[PAD]"})` without `resize_token_embeddings` gives a pad token that the
    model has no embedding for: a batch with it cannot run, and a config with it cannot be loaded. Padding is masked,
    so another token works as well. BOS is the first choice, because plain transformers finds the last token of a row
    by comparing ids with the pad id, and no text ends in BOS.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): if its pad token must change, a warning is logged.
        known (`int`): the model has embeddings for token ids below this number.

    Raises:
        ValueError: the tokenizer has no other special token that the model knows.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id < known:
        return
    unknown = f"The tokenizer's pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}"
    unknown += f", and the model has embeddings for ids below {known}"
    cure = "To give the pad token an embedding, call `model.resize_token_embeddings(len(tokenizer))`"
    names = [token for token in (tokenizer.bos_token, tokenizer.unk_token) if token != tokenizer.eos_token]
    for token in [*names, tokenizer.eos_token]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) < known:
            logger.warning(f"{unknown}. Padding is masked, so {token!r} is used instead. {cure} and pass the model.")
            tokenizer.pad_token = token
            return
    raise ValueError(f"{unknown}; it has no other special token that could pad. {cure} and pass the model.")
