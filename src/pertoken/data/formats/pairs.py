"""`pairs`: under `conversation` a list of {human, assistant} (ms-swift) or of {input, output} (XTuner).

A list of messages under that name is read as one.
"""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.calls import read_tools
from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.data.formats.turns import first_item, read_list, with_system
from pertoken.text import names

__all__ = ["PAIRS"]

_NAMES = (("human", "assistant"), ("input", "output"))


def _read(fields: Fields) -> Conversation:
    field, value = fields.name("conversation"), fields.need("conversation")
    first = first_item(value)
    if "role" in first or "from" in first:
        return read_list(fields, "conversation")
    if not isinstance(value, list) or not value:
        raise RowProblem(field, f"{'an empty list' if value == [] else kind_of(value)} found; give a list of pairs")
    system, messages = fields.text("system"), list[dict[str, Any]]()
    for i, pair in enumerate(value):
        messages += _pair(pair, f"{field}[{i}]", is_first=not i)
    if messages[0]["role"] == "system" and system and messages[0]["content"] != system:
        raise RowProblem("system", "the first pair has another system prompt; keep one of the two")
    return Conversation(with_system(messages, system), read_tools(fields.get("tools"), "tools"))


def _pair(pair: Any, field: str, *, is_first: bool) -> list[dict[str, Any]]:
    if not isinstance(pair, dict):
        raise RowProblem(field, f"{kind_of(pair)} found; give an object with human and assistant")
    given = {key: value for key, value in pair.items() if value is not None}
    both = [two for two in _NAMES if two[0] in given and two[1] in given]
    if len(both) != 1:
        raise RowProblem(field, f"keys found: {names(given)}; give human and assistant, or input and output")
    question, answer = both[0]
    others = sorted(given.keys() - {question, answer, *(["system"] if is_first else [])})
    if others:
        raise RowProblem(f"{field}.{others[0]}", "a key of a pair that nothing would be made of; remove it")
    for key, value in given.items():
        if not isinstance(value, str):
            raise RowProblem(f"{field}.{key}", f"{kind_of(value)} found; give text")
    turns = [{"role": "user", "content": given[question]}, {"role": "assistant", "content": given[answer]}]
    return [{"role": "system", "content": given["system"]}, *turns] if given.get("system") else turns


PAIRS = Format("pairs", "conversation", ("conversation",), _read, ("system", "tools"))
