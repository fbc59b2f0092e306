"""`messages`: a list of {role, content} under that key, as OpenAI's API has it and LLaMA-Factory's v1."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.turns import read_list

__all__ = ["MESSAGES"]


def _read(fields: Fields) -> Conversation:
    return read_list(fields, "messages")


MESSAGES = Format("messages", "conversation", ("messages",), _read, ("system", "tools"))
