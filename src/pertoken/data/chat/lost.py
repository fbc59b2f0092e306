"""What of a conversation its rendering leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pertoken.data.chat.template import without_ends
from pertoken.data.formats import Conversation
from pertoken.text import one_line

__all__ = ["lost_context", "lost_reasoning", "lost_words"]

_TAGS = re.compile(r"</?think(?:ing)?>")
_MARKS = re.compile("[\ue000-\uf8ff]")  # of typed control tokens, see typed_specials.py
_SHOWN_CHARS = 60


def lost_words(message: dict[str, Any], said: str, special: tuple[str, ...]) -> str | None:
    """What of an assistant's message, reasoning aside, is not in the supervised text of its turn: a sentence with the
    remedy, None where nothing is lost."""
    words = without_ends(said, special)
    content = message.get("content") or ""
    for piece in _TAGS.split(content) if "<think" in content else (content,):
        if not _stands(piece, said if any(token in piece for token in special) else words):
            return f"leaves out {_short(piece)} of its content; set another data.chat_template, or change the row"
    for call in message.get("tool_calls") or ():
        function = _function(call)
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and not _stands(name, words):
            return f"leaves out the call of {_short(name)}; set data.chat_template to one that writes tool_calls"
        if _is_encoded_twice(arguments, words):
            call_of = _short(str(name))
            return f"writes the arguments of {call_of} as JSON within JSON; give them as an object, or correct it"
        for leaf in _leaves(arguments):
            if not _stands_as_any(leaf, words):
                return (
                    f"leaves out the argument {_short(str(leaf))} of the call of {_short(str(name))}; set "
                    "data.chat_template to one that writes arguments"
                )
    return None


def lost_reasoning(message: dict[str, Any], said: str) -> bool:
    """Whether the supervised text lacks the reasoning."""
    return not _stands(message.get("reasoning_content") or "", said)


def lost_context(chat: Conversation, upto: int, text: str, prompt: str) -> str | None:
    """What the first `upto` messages, those of the assistant aside, and the tools have that is not in the text:
    a sentence with the remedy, None where nothing is lost. `prompt` is the text before the first supervised turn."""
    for i, message in enumerate(chat.messages[:upto]):
        if message["role"] != "assistant" and not _stands(message.get("content") or "", text):
            what = f"of the {message['role']} message {i}"
            return f"leaves out {_short(message['content'])} {what}; set another data.chat_template, or change the row"
    for tool in chat.tools or ():
        name = _function(tool).get("name")
        if isinstance(name, str) and not _stands(name, prompt):
            return f"leaves out the tool {_short(name)}; set data.chat_template to one that writes tools"
    return None


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """What is in OpenAI's envelope, where there is one."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _stands(value: str, text: str) -> bool:
    """Whether the value is in the text, as it is or as JSON writes it. Whitespace at its ends does not count."""
    value = value.strip()
    return value in text or any(
        json.dumps(value, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )


def _stands_as_any(leaf: Any, text: str) -> bool:
    """A value that is no text may be written as JSON or as Python writes it."""
    if isinstance(leaf, str):
        return _stands(leaf, text)
    return json.dumps(leaf) in text or str(leaf) in text


def _leaves(value: Any) -> Iterator[Any]:
    """Keys, and values that have no parts. Values may be nested deeper than calls can be."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += reversed([part for pair in item.items() for part in pair])
        elif isinstance(item, list):
            waiting += reversed(item)
        else:
            yield item


def _is_encoded_twice(arguments: Any, text: str) -> bool:
    """Whether the arguments are the text of an object, in quotes that are escaped."""
    if isinstance(arguments, str):
        arguments = arguments.strip()
        return arguments not in text and json.dumps(arguments, ensure_ascii=False)[1:-1] in text
    if not isinstance(arguments, dict):
        return False
    if not arguments:
        return re.search(r'"arguments":\s*"\{\}"', text) is not None
    keys = [json.dumps(key, ensure_ascii=False) for key in arguments]
    return any(
        json.dumps(key, ensure_ascii=False)[1:-1] in text and not re.search(rf"(?<!\\){re.escape(key)}", text)
        for key in keys
    )


def _short(text: str) -> str:
    return f'"{one_line(_MARKS.sub("", text).strip()[:_SHOWN_CHARS])}"'
