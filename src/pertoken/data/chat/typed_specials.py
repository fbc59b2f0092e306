"""Control tokens typed in messages, told from those that the chat template writes.

Before a conversation is rendered, each of them gets a mark, a character that is nowhere else in it. In the rendering a
control token without the mark is the template's own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pertoken.data.formats import Conversation
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.encode import TextWithSpans

__all__ = ["mark_typed", "typed_in", "unmark"]

_MARKS = range(0xE000, 0xF900)  # characters for private use


def typed_in(chat: Conversation, control: ControlTokens) -> list[str]:
    """The control tokens typed in its messages and tools, in order."""
    return [text[start:end] for text in _texts([chat.messages, chat.tools]) for start, end in control.find(text)]


def mark_typed(chat: Conversation, control: ControlTokens) -> tuple[Conversation, str]:
    """The conversation with a mark in each control token that is typed in it, behind its first character; and the mark.

    Raises ValueError where it has every character that could be the mark.
    """
    used = set().union(*_texts([chat.messages, chat.tools]))
    mark = next((chr(code) for code in _MARKS if chr(code) not in used), None)
    if mark is None:
        raise ValueError("it has every character for private use, so control tokens typed in it cannot be marked")

    def marked(text: str) -> str:
        parts, at = [], 0
        for start, _ in control.find(text):
            parts += [text[at : start + 1], mark]
            at = start + 1
        return "".join([*parts, text[at:]])

    return replace(chat, messages=_changed(chat.messages, marked), tools=_changed(chat.tools, marked)), mark


def unmark(text: TextWithSpans, mark: str, control: ControlTokens) -> TextWithSpans:
    """The rendering of a marked conversation without its marks; `typed` are the tokens that had one.

    Raises ValueError where the template has written a mark in another way, so that it would stay in the text.
    """
    if re.search(rf"\\u{ord(mark):04x}", text.text, re.IGNORECASE):
        raise ValueError(
            "the chat template escapes characters, so control tokens typed in it cannot be told from its own; "
            'remove them, or set data.special_in_text="special"'
        )
    marks = [match.start() for match in re.finditer(re.escape(mark), text.text)]
    starts = {at - i - 1 for i, at in enumerate(marks)}
    plain = text.text.replace(mark, "")
    spans = [(start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in text.spans]
    typed = [(start, end) for start, end in control.find(plain) if start in starts]
    return replace(text, text=plain, spans=spans, typed=typed)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` made to all its texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return value
