"""`alpaca`: an instruction with an input that may be empty, and the output; `system` and `history` where given."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem
from pertoken.data.formats.turns import answered

__all__ = ["ALPACA"]


def _read(fields: Fields) -> Conversation:
    texts = [fields.need_text("instruction"), fields.text("input")]
    question = "\n".join(text for text in texts if text)
    if not question:
        raise RowProblem(fields.name("instruction"), "empty, and so is input; give the question, or remove the row")
    return answered(fields, question, fields.need_text("output"))


ALPACA = Format("alpaca", "conversation", ("instruction", "output"), _read, ("input", "system", "history", "tools"))
