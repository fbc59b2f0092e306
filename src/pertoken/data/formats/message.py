"""One message, whatever it calls its role, its content, its reasoning and its calls."""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.calls import call_of, read_calls
from pertoken.data.formats.carriers import refuse_message_keys
from pertoken.data.formats.conversation import ROLES
from pertoken.data.formats.parts import join_parts
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.data.formats.weights import take_weight
from pertoken.text import names, shown

__all__ = ["read_message"]

_CALLER = "function_call"  # the assistant, its content being the JSON text of a call
_NAMES = {  # what files call the roles
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), _CALLER),
    **dict.fromkeys(("function", "observation", "tool_response"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_message(value: Any, field: str) -> tuple[dict[str, Any], float | None]:
    """A message for a chat template, and its weight where it says one. Raises RowProblem."""
    if not isinstance(value, dict):
        raise RowProblem(field, f"{kind_of(value)} found; give an object with role and content")
    # Columnar files hold a null for every key that another row has, and templates print it as "None".
    given = {key: item for key, item in value.items() if item is not None}
    role, calls_itself = _role(given, field)
    message: dict[str, Any] = {"role": role}
    message |= {key: item for key, item in given.items() if key not in (calls_itself, "role")}
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if role == _CALLER:
        _content_is_call(message, field)
    elif isinstance(message.get("content"), list):
        join_parts(message, field)
    weight = take_weight(message, field)
    _take_reasoning(message, field)
    _take_calls(message, field)
    refuse_message_keys(message, field)
    if "content" not in message:
        if "tool_calls" not in message:
            raise RowProblem(f"{field}.content", "missing; give text (an empty one is allowed)")
        message["content"] = ""
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise RowProblem(f"{field}.{key}", f"{kind_of(message[key])} found; give text")
    return message, weight


def _role(message: dict[str, Any], field: str) -> tuple[str, str]:
    """(its role, the key that says so)."""
    key = "role" if "role" in message else "from"
    found = message.get(key)
    if found is None:
        raise RowProblem(f"{field}.role", f"missing, keys found: {names(message)}; give one of {', '.join(ROLES)}")
    role = _NAMES.get(found.lower()) if isinstance(found, str) else None
    if role is None:
        raise RowProblem(f"{field}.{key}", f"unknown role {shown(found)}; give one of {', '.join(ROLES)}")
    return role, key


def _content_is_call(message: dict[str, Any], field: str) -> None:
    if message.get("tool_calls"):
        raise RowProblem(f"{field}.tool_calls", "given beside a role that is a call itself; keep one of the two")
    message["tool_calls"] = call_of(message.get("content"), f"{field}.content")
    message["role"], message["content"] = "assistant", ""


def _take_reasoning(message: dict[str, Any], field: str) -> None:
    """Reasoning is `reasoning_content`, as most templates name it."""
    found = [key for key in _REASONING if key in message]
    said = [key for key in found if message[key]]
    if said and message["role"] != "assistant":
        raise RowProblem(
            f"{field}.{said[0]}", f"reasoning on a {message['role']} message; only the assistant's is read"
        )
    if any(message[key] != message[said[0]] for key in said):
        raise RowProblem(f"{field}.{said[1]}", f"differs from {said[0]}; keep one of the two")
    values = {key: message.pop(key) for key in found if key != "reasoning_content"}
    for key in said:
        message.setdefault("reasoning_content", values.get(key))
        message["reasoning_content"] = message["reasoning_content"] or values[key]


def _take_calls(message: dict[str, Any], field: str) -> None:
    """Calls are the list `tool_calls`; the earlier `function_call` is one of them."""
    if "tool_calls" in message:
        message["tool_calls"] = read_calls(message["tool_calls"], f"{field}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if (call := message.pop("function_call", None)) in (None, "", {}):
        return
    if "tool_calls" in message:
        raise RowProblem(f"{field}.function_call", "tool_calls is given too; keep one of the two")
    message["tool_calls"] = call_of(call, f"{field}.function_call")
    if message["role"] != "assistant":
        raise RowProblem(f"{field}.function_call", f"a call in a {message['role']} message; only the assistant calls")
