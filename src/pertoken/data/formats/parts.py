"""A message's content as typed parts: OpenAI's `{"type": "text", "text"}`, LLaMA-Factory's `{"type", "value"}`."""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.calls import call_of
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.text import names, shown

__all__ = ["join_parts"]

_KINDS = {  # the types of parts, and which kind of the three they are
    **dict.fromkeys(("reasoning", "thinking"), "reasoning"),
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("tool_call", "tool_calls", "function_call"), "call"),
}
_ORDER = ("reasoning", "text", "call")  # in which templates write them
_MEDIA = ("image", "audio", "video", "file")
_VALUES = ("text", "value", "reasoning", "thinking", "tool_call", "function_call")
_HARMLESS = ("type", "cache_control", "annotations", "id", "index")


def join_parts(message: dict[str, Any], field: str) -> None:
    """Put the parts of a message's list `content` into its content, reasoning and calls. Raises RowProblem."""
    found: dict[str, list[Any]] = {kind: [] for kind in _ORDER}
    before = 0
    for i, part in enumerate(message["content"]):
        place = f"{field}.content[{i}]"
        kind, value = _part(part, place)
        if _ORDER.index(kind) < before:
            raise RowProblem(
                place, f"{kind} after a part that templates write later; put it first, or split the message"
            )
        before = _ORDER.index(kind)
        found[kind] += call_of(value, place) if kind == "call" else [value]
    if message["role"] != "assistant" and (found["reasoning"] or found["call"]):
        raise RowProblem(f"{field}.content", f"reasoning or a tool call in a {message['role']} message; give text")
    for kind, key in (("reasoning", "reasoning_content"), ("call", "tool_calls")):
        if found[kind] and message.get(key):
            raise RowProblem(f"{field}.{key}", "given in the parts of content too; keep one of the two")
    message["content"] = "".join(found["text"])
    if found["reasoning"]:
        message["reasoning_content"] = "".join(found["reasoning"])
    if found["call"]:
        message["tool_calls"] = found["call"]


def _part(part: Any, field: str) -> tuple[str, Any]:
    """(kind, value) of one part."""
    if not isinstance(part, dict):
        raise RowProblem(field, f'{kind_of(part)} found; give {{"type": "text", "text": ...}}')
    type_ = part.get("type")
    if isinstance(type_, str) and any(media in type_ for media in _MEDIA):
        raise RowProblem(field, f"a part of type {shown(type_)}; pertoken trains on text alone; remove the row")
    if not isinstance(type_, str) or type_ not in _KINDS:
        said = "missing" if type_ is None else f"unknown type {shown(type_)}"
        raise RowProblem(f"{field}.type", f"{said}; give one of {', '.join(_KINDS)}")
    values = [key for key in _VALUES if part.get(key) is not None]
    if others := [key for key, value in part.items() if value and key not in (*_VALUES, *_HARMLESS)]:
        raise RowProblem(f"{field}.{min(others)}", "a key of a part that nothing would be made of; remove it")
    if len(values) != 1:
        said = f"{' and '.join(values)} given" if values else f"no value, keys found: {names(part)}"
        raise RowProblem(field, f'{said}; give {{"type": {type_!r}, "value": ...}}')
    value = part[values[0]]
    if _KINDS[type_] != "call" and not isinstance(value, str):
        raise RowProblem(f"{field}.{values[0]}", f"{kind_of(value)} found; give text")
    return _KINDS[type_], value
