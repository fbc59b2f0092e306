"""`conversations`: as `messages`, under MiniMind's name."""

from __future__ import annotations

from typing import Any

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.turns import first_item, read_list

__all__ = ["CONVERSATIONS"]


def _read(fields: Fields) -> Conversation:
    return read_list(fields, "conversations")


def _looks(value: Any) -> bool:
    return "from" not in first_item(value)


CONVERSATIONS = Format("conversations", "conversation", ("conversations",), _read, ("system", "tools"), _looks)
