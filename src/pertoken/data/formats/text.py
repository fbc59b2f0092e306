"""`text`: a document under `data.text_key`. A .txt is one document, and has no keys."""

from __future__ import annotations

from pertoken.data.formats.format import Fields, Format, KeyNames
from pertoken.data.formats.problem import RowProblem, kind_of

__all__ = ["TEXT"]


def _read(fields: Fields, keys: KeyNames) -> str:
    text = fields.need(keys.text)
    if not isinstance(text, str):
        raise RowProblem(keys.text, f"{kind_of(text)} found; give text")
    if not text:
        raise RowProblem(keys.text, "empty text, so nothing would be trained; remove the row")
    return text


TEXT = Format("text", "text", lambda keys: (keys.text,), _read)
