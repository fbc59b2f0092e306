from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pertoken.data.formats
from pertoken import Recipe
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats import FORMATS, Conversation, KeyNames, formats_that_give, to_conversation, to_text
from pertoken.errors import RecipeError

USER = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"name": "add", "arguments": {"a": 2}}


def _record(value: Any) -> Record:
    return Record("chat.jsonl", 812, value, digest=0, end=0)


def _convert(value: Any, format: str = "auto", **keys: str) -> Any:
    return to_conversation(_record(value), format, KeyNames(**keys))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": [USER, REPLY]}, Conversation([USER, REPLY])),
        ({"conversations": [USER, REPLY]}, Conversation([USER, REPLY])),
        ({"messages": [USER, REPLY | {"tool_calls": None}], "tools": None}, Conversation([USER, REPLY])),
        ({"messages": [USER, REPLY | {"content": ""}]}, Conversation([USER, REPLY | {"content": ""}])),
        ({"messages": [USER, REPLY], "tools": [TOOL]}, Conversation([USER, REPLY], [TOOL])),
        ({"messages": [USER, REPLY], "tools": json.dumps([TOOL])}, Conversation([USER, REPLY], [TOOL])),
        ({"messages": [USER, REPLY], "tools": "", "prompt": "?"}, Conversation([USER, REPLY])),
        (
            {
                "conversations": [
                    {"role": "system", "content": "s", "tools": json.dumps([TOOL])},
                    USER,
                    {"role": "assistant", "tool_calls": json.dumps([CALL]), "reasoning_content": "hm"},
                    {"role": "tool", "content": "4"},
                    REPLY | {"tool_calls": ""},
                ]
            },
            Conversation(
                [
                    {"role": "system", "content": "s"},
                    USER,
                    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm", "content": ""},
                    {"role": "tool", "content": "4"},
                    REPLY,
                ],
                [TOOL],
            ),
        ),
        ({"prompt": "2+2?", "completion": "4"}, Conversation([USER, REPLY], weights=(0.0, 1.0))),
        ({"prompt": "2+2?", "completion": ""}, Conversation([USER, REPLY | {"content": ""}], weights=(0.0, 1.0))),
        (
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
            Conversation([USER, REPLY, USER, REPLY], None, (0.0, 0.0, 0.0, 1.0)),
        ),
    ],
)
def test_a_row_becomes_its_conversation(value: Any, expected: Conversation) -> None:
    assert _convert(value) == expected


def test_prompt_and_completion_keys_are_configurable() -> None:
    value = {"question": "2+2?", "answer": "4"}
    expected = Conversation([USER, REPLY], weights=(0.0, 1.0))
    keys = {"prompt": "question", "completion": "answer"}
    assert _convert(value, **keys) == _convert(value, "prompt_completion", **keys) == expected


@pytest.mark.parametrize(
    ("value", "format", "message"),
    [
        ({"body": "x", "id": 1}, "auto", "row: unknown format, keys found: body, id; known: messages, conversations, "),
        ({"messages": None}, "auto", "row: unknown format, keys found: messages;"),
        ({"messages": [], "conversations": []}, "auto", "row: fits the formats messages and conversations; choose"),
        ("plain text", "auto", "row: raw text has no turns;"),
        ("plain text", "messages", "row: raw text has no turns;"),
        ({"text": "x"}, "messages", "messages: missing, keys found: text; add it, or"),
        ({"messages": None}, "messages", "messages: null; add it, or"),
        ({"messages": "hello"}, "auto", "messages: text found; give a list of messages"),
        ({"messages": {"role": "user"}}, "auto", "messages: an object found; give a list of messages"),
        ({"messages": []}, "auto", "messages: an empty conversation, so nothing would be trained; remove"),
        ({"messages": [USER]}, "auto", "messages: no assistant turn, so nothing would be trained; add"),
        ({"messages": [USER, 3]}, "auto", "messages[1]: a number found; give an object with role and content"),
        ({"messages": [{"speaker": "human", "value": "x"}]}, "auto", "messages[0].role: missing, keys found: speaker,"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "auto", "messages[1].role: unknown role 'bot'; give "),
        ({"messages": [USER, {"role": ["a"], "content": "x"}]}, "auto", "messages[1].role: unknown role ['a']; give "),
        ({"messages": [{"role": "user"}, REPLY]}, "auto", "messages[0].content: missing; give text"),
        ({"messages": [USER, {"role": "assistant"}]}, "auto", "messages[1].content: missing; give text"),
        ({"messages": [USER, REPLY | {"content": 4}]}, "auto", "messages[1].content: a number found; give text"),
        (
            {"messages": [USER, REPLY | {"content": [{}]}]},
            "auto",
            "messages[1].content[0].type: missing; give one of reasoning",
        ),
        ({"messages": [USER, REPLY | {"reasoning_content": []}]}, "auto", "messages[1].reasoning_content: a list"),
        ({"messages": [USER, REPLY | {"tool_calls": "[{"}]}, "auto", "messages[1].tool_calls: not valid JSON ("),
        ({"messages": [USER, REPLY | {"tool_calls": ["x"]}]}, "auto", "messages[1].tool_calls: a list with text found"),
        ({"messages": [USER, REPLY], "tools": {"name": 1}}, "auto", "tools: an object found; give a list of objects"),
        ({"messages": [USER, REPLY], "tools": "NaN"}, "auto", "tools: NaN is not JSON; give a list or its JSON text"),
        (
            {"messages": [USER | {"tools": [TOOL]}, REPLY], "tools": [TOOL]},
            "auto",
            "messages[0].tools: tools are given",
        ),
        ({"prompt": "x"}, "prompt_completion", "completion: missing, keys found: prompt; add it"),
        ({"prompt": "x", "completion": None}, "prompt_completion", "completion: null; add it"),
        ({"prompt": 1, "completion": "x"}, "auto", "prompt: a number found; give a text or a list of messages"),
        ({"prompt": [], "completion": "x"}, "auto", "prompt: an empty conversation"),
        ({"prompt": [USER], "completion": [USER]}, "auto", "completion: no assistant turn"),
    ],
)
def test_every_problem_of_a_row_says_field_fault_and_remedy(value: Any, format: str, message: str) -> None:
    row = _convert(value, format)
    assert isinstance(row, BadRow), row
    assert str(row).startswith("chat.jsonl:812: " + message), str(row)


def test_the_text_of_a_row() -> None:
    assert to_text(_record("whole file\n")) == "whole file\n"
    assert to_text(_record({"body": "x"}), keys=KeyNames(text="body")) == "x"
    for value, message in [
        ({"text": ""}, "text: empty text, so nothing would be trained; remove the row"),
        ({"text": 3}, "text: a number found; give text"),
        ({"body": "x"}, "text: missing, keys found: body; add it, or name the right key in the recipe's [data]"),
        ({}, "text: missing, keys found: none; add it, or name the right key in the recipe's [data]"),
    ]:
        assert str(to_text(_record(value))) == "chat.jsonl:812: " + message


def test_each_format_is_a_file_of_its_name() -> None:
    folder = Path(pertoken.data.formats.__file__).parent
    shared = {"__init__", "format", "conversation", "problem", "detect", "carriers"}
    shared |= {"turns", "message", "parts", "calls", "weights"}
    assert {path.stem for path in folder.glob("*.py")} - shared == set(FORMATS)
    assert all(name == format.name for name, format in FORMATS.items())


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("mesages", "; did you mean 'messages'?"),
        ("prompt-completion", "; did you mean 'prompt_completion'?"),
        ("parquet", ""),
    ],
)
def test_a_recipe_names_a_format_of_the_dict_or_auto(format: str, said: str) -> None:
    recipe: dict[str, Any] = {"stage": "sft", "out_dir": "x", "data": {"path": "a", "tokenizer": "t"}}
    with pytest.raises(RecipeError) as error:
        Recipe.parse({**recipe, "data": {**recipe["data"], "format": format}})
    known = ", ".join(map(repr, ["auto", *FORMATS]))
    assert str(error.value) == f"data.format={format!r}: must be one of {known}{said}"
    for name in ("auto", *formats_that_give("conversation")):
        assert Recipe.parse({**recipe, "data": {**recipe["data"], "format": name}}).data.format == name
