"""Conversations: what a chat template is given, and what of it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["ROLES", "Conversation"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Every message has a `role` of ROLES and a text `content`; an assistant's may have a text `reasoning_content` and
    a list `tool_calls`, whose arguments are objects or null. A message of weight 0 is read but not learned from.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: tuple[float, ...] | None = None  # how much each message's tokens count; None: 1 for the assistant's

    def findings(self) -> dict[str, int]:
        """Kinds of findings (`data/findings.py`) on roles and contents: no mistakes, but seldom what was meant."""
        roles = [message["role"] for message in self.messages if message["role"] != "system"]
        found = {}
        if any(role == follows != "tool" for role, follows in pairwise(roles)):
            found["roles_out_of_order"] = 1
        if roles[:1] == ["assistant"]:
            found["assistant_first"] = 1
        if any(message["role"] in ("system", "user") and not message["content"].strip() for message in self.messages):
            found["empty_message"] = 1
        return found

    def weight(self, message: int) -> float:
        """How much the tokens of a message count in the loss, and in what it is divided by."""
        if self.messages[message]["role"] != "assistant":
            return 0.0
        return 1.0 if self.weights is None else self.weights[message]
