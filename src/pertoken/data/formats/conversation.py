"""Conversations, and the checks that every format of conversations shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pertoken.data.files.json_text import parse_json
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.text import names, shown

__all__ = ["ROLES", "Conversation", "read_conversation", "read_messages", "read_tools", "require_assistant"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Every message has a `role` of ROLES and a text `content`; an assistant's may have a text `reasoning_content` and
    a list `tool_calls`. A message of weight 0 is read but not learned from.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: tuple[float, ...] | None = None  # how much each message's tokens count; None: 1 for the assistant's

    def weight(self, message: int) -> float:
        """How much the tokens of a message count in the loss, and in what it is divided by."""
        if self.messages[message]["role"] != "assistant":
            return 0.0
        return 1.0 if self.weights is None else self.weights[message]


def read_conversation(messages: Any, field: str, tools: Any) -> Conversation:
    """A list of messages under the key `field`, with at least one assistant turn.

    `tools` are those beside it; they may be on a message (the system's, most often) instead. Raises RowProblem.
    """
    checked, found = read_messages(messages, field), read_tools(tools, "tools")
    for i, message in enumerate(checked):
        own = read_tools(message.pop("tools", None), f"{field}[{i}].tools")
        if own and found:
            raise RowProblem(f"{field}[{i}].tools", "tools are given twice in this row; keep one of the lists")
        found = own or found
    require_assistant(checked, field)
    return Conversation(checked, found)


def read_messages(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of messages, each one checked. Raises RowProblem."""
    if not isinstance(value, list):
        raise RowProblem(field, f"{kind_of(value)} found; give a list of messages")
    if not value:
        raise RowProblem(field, "an empty conversation, so nothing would be trained; remove the row")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowProblem(field, f"{kind_of(value)} found; give an object with role and content")
    # Columnar files hold a null for every key that another row has, and templates print it as "None".
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role is None:
        raise RowProblem(f"{field}.role", f"missing, keys found: {names(message)}; give one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise RowProblem(f"{field}.role", f"unknown role {shown(role)}; give one of {', '.join(ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _json_list(message["tool_calls"], f"{field}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message:
        if "tool_calls" not in message:
            raise RowProblem(f"{field}.content", "missing; give text (an empty one is allowed)")
        message["content"] = ""
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise RowProblem(f"{field}.{key}", f"{kind_of(message[key])} found; give text")
    return message


def require_assistant(messages: list[dict[str, Any]], field: str) -> None:
    """Raises RowProblem where there is nothing to learn from."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem(field, "no assistant turn, so nothing would be trained; add one or remove the row")


def read_tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """A list of tools, or its JSON text; None where there is none. Raises RowProblem."""
    return (_json_list(value, field) or None) if value is not None else None


def _json_list(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of objects, given as it is or as JSON text. Empty text counts as none."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except ValueError as error:
            raise RowProblem(field, f"{error}; give a list or its JSON text") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(field, f"{kind_of(value)} found; give a list of objects or its JSON text")
    return value
