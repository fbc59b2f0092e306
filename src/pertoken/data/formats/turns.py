"""Lists of messages, and questions with their answers, as conversations."""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.calls import read_tools
from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields
from pertoken.data.formats.message import read_message
from pertoken.data.formats.problem import RowProblem, kind_of

__all__ = [
    "answered",
    "first_item",
    "list_of_messages",
    "read_list",
    "read_messages",
    "require_assistant",
    "with_system",
]


def read_list(fields: Fields, key: str) -> Conversation:
    """The list of messages under `key`, with the `system` and `tools` beside it. Raises RowProblem."""
    name = fields.name(key)
    return list_of_messages(fields.need(key), name, fields.get("tools"), fields.text("system"))


def list_of_messages(value: Any, field: str, tools: Any = None, system: str = "") -> Conversation:
    """A list of messages with at least one assistant turn.

    `tools` are those beside it; they may be on a message (the system's, most often) instead. Raises RowProblem.
    """
    messages, weights = read_messages(value, field)
    found = read_tools(tools, "tools")
    for i, message in enumerate(messages):
        own = read_tools(message.pop("tools", None), f"{field}[{i}].tools")
        if own and found:
            raise RowProblem(f"{field}[{i}].tools", "tools are given twice in this row; keep one of the lists")
        found = own or found
    require_assistant(messages, field)
    added = with_system(messages, system)
    before: list[float | None] = [None] * (len(added) - len(messages))
    return Conversation(added, found, _weights(added, before + weights))


def read_messages(value: Any, field: str) -> tuple[list[dict[str, Any]], list[float | None]]:
    """A list of messages, each one checked, and the weights that they say. Raises RowProblem."""
    if not isinstance(value, list):
        raise RowProblem(field, f"{kind_of(value)} found; give a list of messages")
    if not value:
        raise RowProblem(field, "an empty conversation, so nothing would be trained; remove the row")
    read = [read_message(message, f"{field}[{i}]") for i, message in enumerate(value)]
    return [message for message, _ in read], [weight for _, weight in read]


def _weights(messages: list[dict[str, Any]], said: list[float | None]) -> tuple[float, ...] | None:
    """None where every assistant turn counts 1."""
    usual = [float(message["role"] == "assistant") for message in messages]
    weights = [usual[i] if weight is None else weight for i, weight in enumerate(said)]
    return None if weights == usual else tuple(weights)


def with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """The messages after the system prompt of a column, if there is one. Raises RowProblem where there are two."""
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise RowProblem("system", "the first message is another system prompt; keep one of the two")
    return messages


def require_assistant(messages: list[dict[str, Any]], field: str) -> None:
    """Raises RowProblem where there is nothing to learn from."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem(field, "no assistant turn, so nothing would be trained; add one or remove the row")


def answered(fields: Fields, question: str, answer: str) -> Conversation:
    """A question and its answer, after the row's `system` and `history` and with its `tools`. Raises RowProblem."""
    messages: list[dict[str, Any]] = []
    name, pairs = fields.name("history"), fields.get("history")
    for i, pair in enumerate(_history(pairs, name)):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowProblem(f"{name}[{i}]", f"{kind_of(pair)} found; give [question, answer], two texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(with_system(messages, fields.text("system")), read_tools(fields.get("tools"), "tools"))


def _history(value: Any, field: str) -> list[Any]:
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise RowProblem(field, f"{kind_of(value)} found; give a list of [question, answer]")
    return value


def first_item(value: Any) -> dict[str, Any]:
    """The first object of a list, an empty one for anything else."""
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
