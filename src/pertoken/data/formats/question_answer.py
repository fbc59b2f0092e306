"""`question_answer`: a question and its answer, as GSM8K has them."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.turns import answered

__all__ = ["QUESTION_ANSWER"]


def _read(fields: Fields) -> Conversation:
    return answered(fields, fields.need_text("question"), fields.need_text("answer"))


QUESTION_ANSWER = Format(
    "question_answer", "conversation", ("question", "answer"), _read, ("system", "history", "tools")
)
