"""`sharegpt`: a list of {from, value} under `conversations`. A `function_call` is an assistant's call of a tool."""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.turns import first_item, read_list

__all__ = ["SHAREGPT"]


def _read(fields: Fields) -> Conversation:
    return read_list(fields, "conversations")


def _looks(value: Any) -> bool:
    return "from" in first_item(value)


SHAREGPT = Format("sharegpt", "conversation", ("conversations",), _read, ("system", "tools"), _looks)
