"""What a server says about the models that it serves: `/v1/models` of an OpenAI-compatible server, vLLM's above all.

This module reads answers. It sends no request.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


Card = dict[str, Any]
"""What a server says about one model: `id` is its name; vLLM adds `root` (its folder) and `max_model_len`."""


def cards_of(answer: Any) -> list[Card]:
    """The models in an answer to `/v1/models`; none where the answer is something else."""
    found = answer.get("data") if isinstance(answer, dict) else None
    return [card for card in found or [] if isinstance(card, dict) and card.get("id")]


def find_card(cards: Sequence[Card], model: str) -> Card | None:
    """
    The model with this name, or from this folder.

    ```python
    >>> find_card([{"id": "base"}, {"id": "helpful"}], "outputs/helpful")
    {'id': 'helpful'}
    ```
    """
    given = (model, str(Path(model).resolve()), Path(model).name)
    for names in (given[:2], given[2:]):  # a whole name or folder before the last part of one
        for card in cards:
            if card["id"] in names or str(card.get("root") or "").rstrip("/") in given[:2]:
                return card
    return None


def longest_text(card: Card, cards: Sequence[Card]) -> int | None:
    """The longest text in tokens that a model takes, by its card or, of an adapter, by that of its base."""
    limits = [one["max_model_len"] for one in (card, *cards) if one.get("max_model_len")]
    return limits[0] if limits else None


def names_of(cards: Sequence[Card]) -> str:
    """The names of all models, for messages."""
    return ", ".join(card["id"] for card in cards)
