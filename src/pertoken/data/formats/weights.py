"""How much a message counts: `weight`, `loss`, `train` and `loss_weight`, and `data.supervise`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.problem import RowProblem
from pertoken.text import shown

__all__ = ["WEIGHT_KEYS", "supervised", "take_weight"]

WEIGHT_KEYS = ("weight", "loss", "train", "loss_weight")


def take_weight(message: dict[str, Any], field: str) -> float | None:
    """The weight of an assistant's message, removed from it; None where it says none. Raises RowProblem."""
    found = {key: _weight(message.pop(key), f"{field}.{key}") for key in WEIGHT_KEYS if key in message}
    if not found:
        return None
    key, weight = next(iter(found.items()))
    if other := next((name for name, value in found.items() if value != weight), None):
        said = f"{shown(found[other])}, but {key} says {shown(weight)}"
        raise RowProblem(f"{field}.{other}", f"{said}; keep one of the two")
    if weight and message["role"] != "assistant":
        raise RowProblem(
            f"{field}.{key}",
            f"{shown(weight)} on a {message['role']} message, but only the assistant's are learned; set it to 0, or "
            "remove it",
        )
    return weight


def _weight(value: Any, field: str) -> float:
    number = value if isinstance(value, int | float) else math.nan
    if not 0 <= number < math.inf:
        raise RowProblem(field, f"{shown(value)} is no weight; give 0, 1, another number above 0, true or false")
    return float(number)


def supervised(chat: Conversation, field: str, which: Literal["all", "last"]) -> Conversation:
    """The conversation with `data.supervise` applied. Raises RowProblem where nothing of it would be learned."""
    last = max((i for i, message in enumerate(chat.messages) if message["role"] == "assistant"), default=-1)
    if which == "last":
        weights = tuple(chat.weight(i) if i == last else 0.0 for i in range(len(chat.messages)))
        if any(chat.weight(i) for i in range(last)):
            chat = replace(chat, weights=weights)
    if not any(chat.weight(i) for i in range(len(chat.messages))):
        turns = "the last assistant turn has" if which == "last" else "all assistant turns have"
        raise RowProblem(field, f"{turns} weight 0, so nothing would be trained; give one a weight or remove the row")
    return chat
