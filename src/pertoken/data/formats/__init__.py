"""Rows of the known formats become conversations or texts, or a `BadRow` that says why not.

A format is one file of this package and one line of `FORMATS`. Nothing of a row vanishes: each of its keys is read by
the format, or refused where it carries content in some format (`carriers.py`), or is among the unread keys that
`read_row` returns, which are counted and said (`data/outcome.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pertoken.data.files.long_text import LongText
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats.alpaca import ALPACA
from pertoken.data.formats.carriers import refuse_other_training, refuse_row_keys
from pertoken.data.formats.conversation import ROLES, Conversation
from pertoken.data.formats.conversations import CONVERSATIONS
from pertoken.data.formats.detect import detect
from pertoken.data.formats.dolly import DOLLY
from pertoken.data.formats.format import Fields, Format, Gives, KeyNames
from pertoken.data.formats.messages import MESSAGES
from pertoken.data.formats.pairs import PAIRS
from pertoken.data.formats.problem import RowProblem
from pertoken.data.formats.prompt_completion import PROMPT_COMPLETION
from pertoken.data.formats.query_response import QUERY_RESPONSE
from pertoken.data.formats.question_answer import QUESTION_ANSWER
from pertoken.data.formats.self_instruct import SELF_INSTRUCT
from pertoken.data.formats.sharegpt import SHAREGPT
from pertoken.data.formats.text import TEXT
from pertoken.data.formats.weights import supervised

__all__ = [
    "FORMATS",
    "ROLES",
    "Conversation",
    "Format",
    "Gives",
    "KeyNames",
    "ReadRow",
    "formats_that_give",
    "read_row",
    "standard_keys",
    "to_conversation",
    "to_text",
]

FORMATS = {
    format.name: format
    for format in (
        MESSAGES,
        CONVERSATIONS,
        SHAREGPT,
        PAIRS,
        ALPACA,
        DOLLY,
        QUERY_RESPONSE,
        QUESTION_ANSWER,
        SELF_INSTRUCT,
        PROMPT_COMPLETION,
        TEXT,
    )
}


KEY_NAMES = KeyNames()  # the recipe's defaults


@dataclass(frozen=True, slots=True)
class ReadRow:
    """What a row is, and how it was read."""

    value: Conversation | str | LongText
    format: str | None = None  # None: a text of a file without keys
    unread: tuple[str, ...] = ()  # the keys that have a value and were not read


def read_row(record: Record, gives: Gives, format: str = "auto", keys: KeyNames = KEY_NAMES) -> ReadRow | BadRow:
    """What the row is. `format` is a key of FORMATS that gives this, or "auto".

    "auto" is the one format whose keys the row has; a BadRow where none or several fit. A list is the messages of a
    conversation. A text of a file without keys, a .txt, is a text in every format of texts, and in no other.
    """
    try:
        row = record.value
        if isinstance(row, list):
            if gives == "text":
                raise RowProblem("row", 'a list of messages is a conversation; train with stage = "sft"')
            return _read({"messages": row}, gives, "messages", KeyNames(supervise=keys.supervise))
        if isinstance(row, dict):
            return _read(row, gives, format, keys)
        if gives == "text":
            return ReadRow(row)
        raise RowProblem("row", 'raw text has no turns; give .jsonl or .parquet, or train with stage = "pretrain"')
    except RowProblem as problem:
        return BadRow(record.file, record.line, problem.field, problem.problem)


def _read(row: dict[str, Any], gives: Gives, format: str, keys: KeyNames) -> ReadRow:
    fields, is_text = Fields(row, keys.in_file), gives == "text"
    named = keys.in_file.values()
    refuse_other_training(row, [key for key in row if key not in named], keys.ignore, is_text=is_text)
    if format != "auto":
        chosen = FORMATS[format]
    elif is_text:
        chosen = TEXT
    else:
        chosen = detect(row, fields, [known for known in FORMATS.values() if known.gives == gives])
    value = chosen.read(fields)
    unread = fields.unread()
    refuse_row_keys(row, [key for key in unread if key not in keys.ignore], chosen.name, is_text=is_text)
    if isinstance(value, Conversation):
        value = supervised(value, fields.name(chosen.keys[-1]), keys.supervise)
    return ReadRow(value, chosen.name, unread)


def to_conversation(record: Record, format: str = "auto", keys: KeyNames = KEY_NAMES) -> Conversation | BadRow:
    """The conversation in a row. Its unread keys are nobody's concern here."""
    read = read_row(record, "conversation", format, keys)
    if isinstance(read, BadRow):
        return read
    assert isinstance(read.value, Conversation), format
    return read.value


def to_text(record: Record, format: str = "auto", keys: KeyNames = KEY_NAMES) -> str | LongText | BadRow:
    """The document in a row: the whole of a .txt, or what a format of texts reads."""
    read = read_row(record, "text", format, keys)
    if isinstance(read, BadRow):
        return read
    assert not isinstance(read.value, Conversation), format
    return read.value


def formats_that_give(gives: Gives) -> list[str]:
    """The names of the formats of conversations, or of texts."""
    return [name for name, format in FORMATS.items() if format.gives == gives]


def standard_keys() -> list[str]:
    """The keys of rows that formats read, which data.columns may give other names."""
    return sorted({key for format in FORMATS.values() for key in (*format.keys, *format.optional)})
