"""`messages`: a list of {role, content} under that key."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation, read_conversation
from pertoken.data.formats.format import Fields, Format, KeyNames

__all__ = ["MESSAGES"]


def _read(fields: Fields, keys: KeyNames) -> Conversation:
    return read_conversation(fields.need("messages"), "messages", fields.get("tools"))


MESSAGES = Format("messages", "conversation", lambda keys: ("messages",), _read)
