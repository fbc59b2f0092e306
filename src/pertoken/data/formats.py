"""Who said what: rows of the known formats become conversations, or a `BadRow` that says why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pertoken.data.files.json_text import parse_json
from pertoken.data.files.long_text import LongText
from pertoken.data.files.records import BadRow, Record
from pertoken.text import names, shown

__all__ = ["FORMATS", "ROLES", "Conversation", "detect_format", "to_conversation", "to_text"]

FORMATS = ("messages", "conversations", "prompt_completion")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Every message has a `role` of ROLES and a text `content`; an assistant's may have a text `reasoning_content` and
    a list `tool_calls`. Assistant turns among the first `num_context` messages are read but not learned from.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    num_context: int = 0


class _RowError(Exception):
    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem


def detect_format(record: Record, *, prompt_key: str = "prompt", completion_key: str = "completion") -> str | BadRow:
    """The one format of FORMATS whose keys the row has; a BadRow where none or several fit."""
    try:
        return _detect(record.value, prompt_key, completion_key)
    except _RowError as error:
        return BadRow(record.file, record.line, error.field, error.problem)


def to_conversation(
    record: Record, format: str, *, prompt_key: str = "prompt", completion_key: str = "completion"
) -> Conversation | BadRow:
    """The conversation in a row, in one of FORMATS or "auto".

    messages, conversations: a list of {role, content} under that key. Tools come from a `tools` list beside it or
    on the system message, where a JSON text is as good as a list; so it is for an assistant's `tool_calls`.
    prompt_completion: two texts, or lists of messages, of which only the completion is learned.
    """
    try:
        if format == "auto":
            format = _detect(record.value, prompt_key, completion_key)
        value = _object(record.value)
        if format == "prompt_completion":
            return _prompt_completion(value, prompt_key, completion_key)
        messages = _messages(_field(value, format), format)
        tools = _tools(value.get("tools"), "tools")
        for i, message in enumerate(messages):
            own = _tools(message.pop("tools", None), f"{format}[{i}].tools")
            if own and tools:
                raise _RowError(f"{format}[{i}].tools", "tools are given twice in this row; keep one of the lists")
            tools = own or tools
        _require_assistant(messages, format)
        return Conversation(messages, tools)
    except _RowError as error:
        return BadRow(record.file, record.line, error.field, error.problem)


def to_text(record: Record, text_key: str = "text") -> str | LongText | BadRow:
    """The document in a row: the whole of a .txt, or the text under `text_key`. Empty text is a BadRow."""
    if not isinstance(record.value, dict):
        return record.value
    try:
        text = _field(record.value, text_key)
        if not isinstance(text, str):
            raise _RowError(text_key, f"{_kind(text)} found; give text")
        if not text:
            raise _RowError(text_key, "empty text, so nothing would be trained; remove the row")
        return text
    except _RowError as error:
        return BadRow(record.file, record.line, error.field, error.problem)


def _detect(value: dict[str, Any] | str | LongText, prompt_key: str, completion_key: str) -> str:
    row = _object(value)
    keys = {"messages": ["messages"], "conversations": ["conversations"]}
    keys["prompt_completion"] = [prompt_key, completion_key]
    fitting = [name for name, needed in keys.items() if all(row.get(key) is not None for key in needed)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise _RowError("row", f"fits the formats {' and '.join(fitting)}; choose with data.format")
    known = ", ".join(f"{name} ({' and '.join(needed)})" for name, needed in keys.items())
    raise _RowError("row", f"unknown format, keys found: {names(row)}; known: {known}; set data.format and its keys")


def _prompt_completion(value: dict[str, Any], prompt_key: str, completion_key: str) -> Conversation:
    prompt, completion = _field(value, prompt_key), _field(value, completion_key)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    context, learned = _messages(prompt, prompt_key), _messages(completion, completion_key)
    _require_assistant(learned, completion_key)
    return Conversation(context + learned, _tools(value.get("tools"), "tools"), num_context=len(context))


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _RowError(field, f"{_kind(value)} found; give a list of messages")
    if not value:
        raise _RowError(field, "an empty conversation, so nothing would be trained; remove the row")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _RowError(field, f"{_kind(value)} found; give an object with role and content")
    # Columnar files hold a null for every key that another row has, and templates print it as "None".
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role is None:
        raise _RowError(f"{field}.role", f"missing, keys found: {names(message)}; give one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise _RowError(f"{field}.role", f"unknown role {shown(role)}; give one of {', '.join(ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _json_list(message["tool_calls"], f"{field}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message:
        if "tool_calls" not in message:
            raise _RowError(f"{field}.content", "missing; give text (an empty one is allowed)")
        message["content"] = ""
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise _RowError(f"{field}.{key}", f"{_kind(message[key])} found; give text")
    return message


def _require_assistant(messages: list[dict[str, Any]], field: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise _RowError(field, "no assistant turn, so nothing would be trained; add one or remove the row")


def _tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    return (_json_list(value, field) or None) if value is not None else None


def _json_list(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of objects, given as it is or as JSON text. Empty text counts as none."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except ValueError as error:
            raise _RowError(field, f"{error}; give a list or its JSON text") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _RowError(field, f"{_kind(value)} found; give a list of objects or its JSON text")
    return value


def _object(value: dict[str, Any] | str | LongText) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _RowError("row", 'raw text has no turns; give .jsonl or .parquet, or train with stage = "pretrain"')
    return value


def _field(value: dict[str, Any], key: str) -> Any:
    if value.get(key) is None:
        state = "null" if key in value else f"missing, keys found: {names(value)}"
        raise _RowError(key, f"{state}; add it, or name the right key in the recipe's [data]")
    return value[key]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        odd = next((item for item in value if not isinstance(item, dict)), None)
        inner = "a list" if isinstance(odd, list) else _kind(odd)  # one level: lists may be nested a thousandfold
        return "a list" if odd is None else f"a list with {inner}"
    kinds = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)
