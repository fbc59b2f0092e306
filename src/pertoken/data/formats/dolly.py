"""`dolly`: an instruction with a context that may be empty, and the response."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem
from pertoken.data.formats.turns import answered

__all__ = ["DOLLY"]


def _read(fields: Fields) -> Conversation:
    texts = [fields.need_text("instruction"), fields.text("context")]
    question = "\n".join(text for text in texts if text)
    if not question:
        raise RowProblem(fields.name("instruction"), "empty, and so is context; give the question, or remove the row")
    return answered(fields, question, fields.need_text("response"))


DOLLY = Format("dolly", "conversation", ("instruction", "response"), _read, ("context", "system", "history", "tools"))
