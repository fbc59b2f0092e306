"""The mistakes that people make with JSON, told from what a parser says of them."""

from __future__ import annotations

import json
import re

__all__ = ["json_mistake"]

_QUOTED_KEY = re.compile(r'"(?:[^"\\]|\\.)*"\s*:')
_PYTHON_NAMES = re.compile(r"(None|True|False)\b")
_PART_OF_AN_OBJECT = ("}", "]")


def json_mistake(text: str, *, is_line: bool = True) -> str | None:
    """What is wrong and what to do, for a text that is not JSON; None for a mistake that has no name here.

    `is_line`: the text is a line of its own, else an item of an array.
    """
    try:
        json.loads(text)
        return None
    except json.JSONDecodeError as error:
        at = error.pos
    except (RecursionError, ValueError):
        return None
    where, rest = _where(text, at), text[at:].lstrip()
    if text[at : at + 1] == "'":
        return f"single quotes {where}, as Python prints a dict; write the row with json.dumps"
    if name := _PYTHON_NAMES.match(text, at):
        plain = {"None": "null", "True": "true", "False": "false"}[name[1]]
        return f"Python's {name[1]} {where}; write {plain}, or the row with json.dumps"
    if (comma := _trailing_comma(text, at)) is not None:
        return f"a comma {_where(text, comma)} with nothing behind it; remove it"
    if is_line and _is_whole(text[:at]) and rest[:1] in ("{", "["):
        return f"several objects on one line, the second {where}; write one JSON object a line"
    if is_line and _is_piece(text, rest):
        return "one object over several lines; write one JSON object a line, or put them into one JSON array"
    return None


def _where(text: str, at: int) -> str:
    line = text.count("\n", 0, at)
    return f"in its line {line + 1}" if line else f"at column {at + 1}"


def _trailing_comma(text: str, at: int) -> int | None:
    """Where it is. The parser may point at the comma, or at what is behind it."""
    comma = at if text[at : at + 1] == "," else len(text[:at].rstrip()) - 1
    behind = text[comma + 1 :].lstrip()[:1]
    return comma if comma >= 0 and text[comma] == "," and behind in ("}", "]") else None


def _is_whole(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (RecursionError, ValueError):
        return False


def _is_piece(text: str, rest: str) -> bool:
    """Whether the line is one of a pretty-printed object: it opens something, it is `"key": value`, or it closes."""
    text = text.strip()
    if text.startswith("{") and not rest and text[-1:] in ("{", "[", ","):
        return True
    return bool(_QUOTED_KEY.match(text)) or text.rstrip(",") in _PART_OF_AN_OBJECT
