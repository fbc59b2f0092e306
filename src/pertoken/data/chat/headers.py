"""Texts that a chat template has rendered before they came: they begin with its own header of a turn."""

from __future__ import annotations

from pertoken.data.chat.render import ChatTemplate
from pertoken.data.formats import Conversation

__all__ = ["headers_of", "rendered_before"]

_WORDS, _OTHERS = "What is said", "A question"
_LEAST_CHARS = 3


def headers_of(template: ChatTemplate) -> tuple[str, ...]:
    """What the template writes before the words of a system, a user's and an assistant's message, with a BOS and
    without. None where it says nothing of its own."""
    before = []
    for said, roles in (("system", ("system", "user")), ("user", ("user",)), ("assistant", ("user", "assistant"))):
        messages = [{"role": role, "content": _WORDS if role == said else _OTHERS} for role in roles]
        try:
            text = template.text(Conversation(messages))
        except ValueError:  # it has no such role
            continue
        before.append(text.partition(_WORDS)[0].rpartition(template.end_of_turn)[2].strip())
    without = [header.removeprefix(template.bos or "").strip() for header in before]
    found = [*before, *(header for header in without if header and not header[0].isalnum())]
    return tuple({h: None for h in found if len(h) >= _LEAST_CHARS and _OTHERS not in h})


def rendered_before(chat: Conversation, headers: tuple[str, ...]) -> bool:
    """Whether a message's content begins with one of the headers."""
    return any(str(message.get("content") or "").lstrip().startswith(headers) for message in chat.messages)
