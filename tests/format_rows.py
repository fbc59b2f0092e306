"""Rows read as conversations, for the tests of formats."""

from __future__ import annotations

from typing import Any

from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats import Conversation, KeyNames, read_row

__all__ = ["assistant", "conversation", "problem", "said", "system", "user"]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def conversation(row: Any, format: str = "auto", **keys: Any) -> tuple[str | None, Conversation]:
    """(the format's name, what the row is)."""
    read = read_row(Record("a.jsonl", 1, row, 0, 0), "conversation", format, KeyNames(**keys))
    assert not isinstance(read, BadRow), str(read)
    assert isinstance(read.value, Conversation)
    return read.format, read.value


def said(*messages: dict[str, Any], tools: Any = None, weights: Any = None) -> Conversation:
    return Conversation(list(messages), tools, weights)


def problem(row: Any, format: str = "auto", **keys: Any) -> str:
    """What is wrong with the row, from the field on."""
    read = read_row(Record("a.jsonl", 1, row, 0, 0), "conversation", format, KeyNames(**keys))
    assert isinstance(read, BadRow), read
    return str(read).removeprefix("a.jsonl:1: ")
