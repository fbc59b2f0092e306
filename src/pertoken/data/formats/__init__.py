"""Rows of the known formats become conversations or texts, or a `BadRow` that says why not.

A format is one file of this package and one line of `FORMATS`. Nothing of a row vanishes: each of its keys is read by
the format, or is among the unread keys that `read_row` returns, which are counted and said (`data/outcome.py`).
"""

from __future__ import annotations

from typing import Any

from pertoken.data.files.long_text import LongText
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats.conversation import ROLES, Conversation
from pertoken.data.formats.conversations import CONVERSATIONS
from pertoken.data.formats.format import Fields, Format, Gives, KeyNames
from pertoken.data.formats.messages import MESSAGES
from pertoken.data.formats.problem import RowProblem
from pertoken.data.formats.prompt_completion import PROMPT_COMPLETION
from pertoken.data.formats.text import TEXT
from pertoken.text import names

__all__ = [
    "FORMATS",
    "ROLES",
    "Conversation",
    "Format",
    "Gives",
    "KeyNames",
    "formats_that_give",
    "read_row",
    "to_conversation",
    "to_text",
]

FORMATS = {
    format.name: format
    for format in (
        MESSAGES,
        CONVERSATIONS,
        PROMPT_COMPLETION,
        TEXT,
    )
}


KEY_NAMES = KeyNames()  # the recipe's defaults


def read_row(
    record: Record, gives: Gives, format: str = "auto", keys: KeyNames = KEY_NAMES
) -> tuple[Conversation | str | LongText, tuple[str, ...]] | BadRow:
    """(what the row is, the keys of it that were not read). `format` is a key of FORMATS that gives this, or "auto".

    "auto" is the one format whose keys the row has; a BadRow where none or several fit. A text of a file without keys,
    a .txt, is a text in every format of texts, and in no other.
    """
    try:
        if isinstance(record.value, list):
            raise RowProblem("row", "a list, not an object; write one JSON object a line, or an array of objects")
        if not isinstance(record.value, dict):
            if gives == "text":
                return record.value, ()
            raise RowProblem("row", 'raw text has no turns; give .jsonl or .parquet, or train with stage = "pretrain"')
        chosen = _detect(record.value, gives, keys) if format == "auto" else FORMATS[format]
        fields = Fields(record.value)
        return chosen.read(fields, keys), fields.unread()
    except RowProblem as problem:
        return BadRow(record.file, record.line, problem.field, problem.problem)


def to_conversation(record: Record, format: str = "auto", keys: KeyNames = KEY_NAMES) -> Conversation | BadRow:
    """The conversation in a row. Its unread keys are nobody's concern here."""
    read = read_row(record, "conversation", format, keys)
    if isinstance(read, BadRow):
        return read
    assert isinstance(read[0], Conversation), format
    return read[0]


def to_text(record: Record, format: str = "auto", keys: KeyNames = KEY_NAMES) -> str | LongText | BadRow:
    """The document in a row: the whole of a .txt, or what a format of texts reads."""
    read = read_row(record, "text", format, keys)
    if isinstance(read, BadRow):
        return read
    assert not isinstance(read[0], Conversation), format
    return read[0]


def formats_that_give(gives: Gives) -> list[str]:
    """The names of the formats of conversations, or of texts."""
    return [name for name, format in FORMATS.items() if format.gives == gives]


def _detect(row: dict[str, Any], gives: Gives, keys: KeyNames) -> Format:
    formats = [format for format in FORMATS.values() if format.gives == gives]
    if len(formats) == 1:
        return formats[0]
    fitting = [format for format in formats if all(row.get(key) is not None for key in format.keys(keys))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        fit = " and ".join(format.name for format in fitting)
        raise RowProblem("row", f"fits the formats {fit}; choose with data.format")
    known = ", ".join(f"{format.name} ({' and '.join(format.keys(keys))})" for format in formats)
    raise RowProblem("row", f"unknown format, keys found: {names(row)}; known: {known}; set data.format and its keys")
