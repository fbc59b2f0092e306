"""Tools and calls of tools, given as they are or as JSON text."""

from __future__ import annotations

from typing import Any

from pertoken.data.files.json_text import parse_json
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.text import names

__all__ = ["call_of", "read_calls", "read_tools"]


def read_tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """A list of tools, or its JSON text; None where there is none. Raises RowProblem."""
    return (_json_list(value, field) or None) if value is not None else None


def read_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of calls, or its JSON text, with arguments that are objects or null. Raises RowProblem."""
    return [_call(call, f"{field}[{i}]") for i, call in enumerate(_json_list(value, field))]


def call_of(value: Any, field: str) -> list[dict[str, Any]]:
    """The call, or the calls, of `{"name": ..., "arguments": ...}`, given as it is or as its JSON text."""
    found = _parsed(value, field, '{"name": ..., "arguments": {...}}') if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            said = f"keys found: {names(call)}" if isinstance(call, dict) else f"{kind_of(call)} found"
            raise RowProblem(field, f'{said}; give a call as {{"name": ..., "arguments": {{...}}}} or its JSON text')
    if not calls:
        raise RowProblem(field, "no call in it; give one, or remove the message")
    return [_call({"type": "function", "function": call}, field) for call in calls]


def _call(call: dict[str, Any], field: str) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _call(function, f"{field}.function")}
    if "arguments" not in call or call["arguments"] is None or isinstance(call["arguments"], dict):
        return call
    arguments, field = call["arguments"], f"{field}.arguments"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, field, "an object") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise RowProblem(field, f"{kind_of(arguments)} found; give an object or its JSON text")
    return {**call, "arguments": arguments}


def _json_list(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of objects, given as it is or as JSON text. Empty text counts as none."""
    if isinstance(value, str):
        value = _parsed(value, field, "a list") if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(field, f"{kind_of(value)} found; give a list of objects or its JSON text")
    return value


def _parsed(text: str, field: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowProblem(field, f"{error}; give {what} or its JSON text") from None
