"""The arguments of tool calls: objects, or the JSON text of one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pertoken.data.files.json_text import parse_json
from pertoken.data.formats import Conversation

__all__ = ["with_arguments"]


def with_arguments(chat: Conversation, *, as_text: bool) -> Conversation:
    """The conversation with the arguments of all calls as JSON text, or as the objects that they are the text of.

    What is neither an object nor the text of one stays as it is. The same conversation where nothing changes.
    """
    messages = [_message(message, as_text) if message.get("tool_calls") else message for message in chat.messages]
    same = all(new is old for new, old in zip(messages, chat.messages, strict=True))
    return chat if same else replace(chat, messages=messages)


def _message(message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    calls = [_call(call, as_text) for call in message["tool_calls"]]
    same = all(new is old for new, old in zip(calls, message["tool_calls"], strict=True))
    return message if same else {**message, "tool_calls": calls}


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        inner = _call(function, as_text)
        return call if inner is function else {**call, "function": inner}
    arguments = changed = call.get("arguments")
    if as_text and isinstance(arguments, dict):
        changed = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        changed = _parsed(arguments)
    return call if changed is arguments else {**call, "arguments": changed}


def _parsed(text: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
