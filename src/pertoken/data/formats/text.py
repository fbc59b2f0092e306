"""`text`: a document under `data.text_key`. A .txt is one document, and has no keys."""

from __future__ import annotations

from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem

__all__ = ["TEXT"]


def _read(fields: Fields) -> str:
    text = fields.need_text("text")
    if not text:
        raise RowProblem(fields.name("text"), "empty text, so nothing would be trained; remove the row")
    return text


TEXT = Format("text", "text", ("text",), _read)
