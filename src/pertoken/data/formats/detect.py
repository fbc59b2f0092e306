"""Which format a row has, told by its keys; and what to say of a row that has none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem
from pertoken.text import names, shown

__all__ = ["detect"]

_QUESTIONS = ("prompt", "instruction", "question", "query", "input", "user", "human")
_ANSWERS = ("completion", "output", "response", "answer", "assistant", "target")
_LISTS = ("dialogue", "dialog", "chat", "turns", "data")
_HEADERS = (  # how texts begin that a chat template made
    "<|im_start|>",
    "<s>[INST]",
    "[INST]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<bos>",
    "<start_of_turn>",
    "<|user|>",
    "<|system|>",
    "<|start|>",
    "### Instruction",
    "Below is an instruction",
)


def detect(row: dict[str, Any], fields: Fields, formats: Collection[Format]) -> Format:
    """The one of `formats` that the row has. Raises RowProblem where there is none, or several."""
    fitting = [format for format in formats if _fits(fields, format)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        fit = " and ".join(format.name for format in fitting)
        raise RowProblem("row", f"fits the formats {fit}; choose with data.format")
    _refuse_texts(fields)
    found = f"unknown format, keys found: {names(row)}"
    if remedy := _columns(row):
        raise RowProblem("row", f"{found}; {remedy}")
    known = ", ".join(dict.fromkeys(" + ".join(map(fields.name, format.keys)) for format in formats))
    raise RowProblem("row", f'{found}; known: {known}; name yours, as in data.columns = {{messages = "..."}}')


def _fits(fields: Fields, format: Format) -> bool:
    has = all(fields.peek(key) is not None for key in format.keys)
    return has and (format.looks is None or format.looks(fields.peek(format.keys[0])))


def _refuse_texts(fields: Fields) -> None:
    """Raise RowProblem for rows that are to be continued, not answered."""
    if isinstance(text := fields.peek("text"), str):
        if header := next((header for header in _HEADERS if text.lstrip().startswith(header)), None):
            raise RowProblem(
                fields.name("text"),
                f"begins with {shown(header)}, so a chat template made it before; give the messages that it was "
                'made of, or train all of it with stage = "pretrain"',
            )
        raise RowProblem(
            fields.name("text"), 'a text has no turns; train with stage = "pretrain", or split it into messages'
        )
    if fields.peek("response") is not None:
        raise RowProblem(
            fields.name("response"),
            'an answer without a question (ms-swift trains on such rows as on texts); set stage = "pretrain" and '
            f'data.text_key = "{fields.name("response")}", or add query',
        )


def _columns(row: dict[str, Any]) -> str | None:
    """The setting that most likely reads the row."""
    lists = [key for key in _LISTS if isinstance(row.get(key), list)]
    if lists:
        return f'set data.columns = {{messages = "{lists[0]}"}} if those are the messages'
    question, answer = ([key for key in known if isinstance(row.get(key), str)] for known in (_QUESTIONS, _ANSWERS))
    if question and answer:
        return f'set data.columns = {{prompt = "{question[0]}", completion = "{answer[0]}"}} if those are the two'
    return None
