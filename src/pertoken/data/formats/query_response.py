"""`query_response`: ms-swift's query and response, with `system` and `history` where given."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.turns import answered

__all__ = ["QUERY_RESPONSE"]


def _read(fields: Fields) -> Conversation:
    return answered(fields, fields.need_text("query"), fields.need_text("response"))


QUERY_RESPONSE = Format("query_response", "conversation", ("query", "response"), _read, ("system", "history", "tools"))
