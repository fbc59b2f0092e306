"""`conversations`: as `messages`, under MiniMind's name."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation, read_conversation
from pertoken.data.formats.format import Fields, Format, KeyNames

__all__ = ["CONVERSATIONS"]


def _read(fields: Fields, keys: KeyNames) -> Conversation:
    return read_conversation(fields.need("conversations"), "conversations", fields.get("tools"))


CONVERSATIONS = Format("conversations", "conversation", lambda keys: ("conversations",), _read)
