from __future__ import annotations

import json
from typing import Any

import pytest
from format_rows import assistant, conversation, problem, said, system, user

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}


def text(value: str, key: str = "text") -> dict[str, str]:
    return {"type": "text", key: value}


@pytest.mark.parametrize("row", [[user("?"), assistant("!")], {"messages": [user("?"), assistant("!")]}])
def test_a_list_of_messages_is_a_row_too(row: Any) -> None:
    assert conversation(row) == ("messages", said(user("?"), assistant("!")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "developer", "content": "s"}, system("s")),
        ({"role": "user", "content": [text("a"), text("b")]}, user("ab")),
        ({"role": "user", "content": [text("a", "value"), {"type": "input_text", "text": "b"}]}, user("ab")),
        ({"role": "User", "content": "a", "loss_weight": 0.0}, user("a")),
        ({"role": "function", "name": "add", "content": "3"}, {"role": "tool", "name": "add", "content": "3"}),
        (
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
        ),
        (assistant("x", reasoning="hm"), assistant("x", reasoning_content="hm")),
        (assistant("x", thinking="hm", reasoning_content=""), assistant("x", reasoning_content="hm")),
        (assistant("x", reasoning="hm", reasoning_content="hm"), assistant("x", reasoning_content="hm")),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]),
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "hm"},
                    text("I add.", "value"),
                    {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                ],
            },
            assistant(
                "I add.",
                reasoning_content="hm",
                tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
            ),
        ),
    ],
)
def test_each_way_to_write_a_message(given: dict[str, Any], expected: dict[str, Any]) -> None:
    _, chat = conversation({"messages": [given, user("?"), assistant("!")]})
    assert chat == said(expected, user("?"), assistant("!"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": None}, {"a": None}),
        ('{"a": null}', {"a": None}),
        ("", {}),
        ("null", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_arguments_of_calls_are_objects_before_the_template_sees_them(
    arguments: Any, expected: Any, as_text: bool, flat: bool
) -> None:
    def call(of: Any) -> dict[str, Any]:
        inner = {"name": "f", "arguments": of}
        return inner if flat else {"id": "c1", "type": "function", "function": inner}

    calls: Any = [call(arguments)]
    turn = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls) if as_text else calls}
    _, chat = conversation({"messages": [user("?"), turn]})
    assert chat.messages[1]["tool_calls"] == [call(expected)]


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [
        ({"weight": 0}, {"weight": 1}, (0, 0, 0, 1)),
        ({"weight": 0}, {}, (0, 0, 0, 1)),
        ({"train": False}, {"train": True, "weight": 1}, (0, 0, 0, 1)),
        ({"loss": False}, {"loss": None}, (0, 0, 0, 1)),
        ({"loss_weight": 0.25}, {"loss_weight": 2}, (0, 0.25, 0, 2)),
        ({"loss_weight": 1.0}, {"weight": 1}, None),
    ],
)
def test_weights_of_messages(first: dict[str, Any], second: dict[str, Any], weights: Any) -> None:
    row = {"messages": [user("a"), assistant("b", **first), user("c"), assistant("d", **second)]}
    _, chat = conversation(row)
    assert chat == said(user("a"), assistant("b"), user("c"), assistant("d"), weights=weights)


def test_supervise_last_is_the_last_assistant_turn_alone() -> None:
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]}
    assert conversation(row, supervise="last")[1].weights == (0, 0, 0, 1, 0)
    one = {"messages": [user("a"), assistant("b")]}
    assert conversation(one, supervise="last")[1].weights is None
    row["messages"][3]["weight"] = 0
    assert problem(row, supervise="last").startswith("messages: the last assistant turn has weight 0, so nothing")


def test_a_system_column_is_the_system_message() -> None:
    row = {"messages": [user("?"), assistant("!", weight=0.5)], "system": "Be brief."}
    assert conversation(row)[1] == said(system("Be brief."), user("?"), assistant("!"), weights=(0, 0, 0.5))
    row = {"messages": [system("Be brief."), user("?"), assistant("!")], "system": "Be brief."}
    assert conversation(row)[1] == said(system("Be brief."), user("?"), assistant("!"))
    assert problem({**row, "system": "Be long."}) == (
        "system: the first message is another system prompt; keep one of the two"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"weight": 0}, "messages: all assistant turns have weight 0, so nothing would be trained; give one a weight"),
        ({"weight": -1}, "messages[1].weight: -1 is no weight; give 0, 1, another number above 0, true or false"),
        ({"weight": "1"}, "messages[1].weight: '1' is no weight;"),
        ({"weight": float("inf")}, "messages[1].weight: inf is no weight;"),
        ({"weight": 1, "train": False}, "messages[1].train: 0.0, but weight says 1.0; keep one of the two"),
        ({"reasoning": "a", "thinking": "b"}, "messages[1].thinking: differs from reasoning; keep one of the two"),
        ({"reasoning": ["a"]}, "messages[1].reasoning_content: a list with text found; give text"),
        ({"tool_calls": [CALL], "function_call": {"name": "f"}}, "messages[1].function_call: tool_calls is given too"),
        ({"function_call": {"arguments": {}}}, "messages[1].function_call: keys found: arguments; give a call as"),
        ({"function_call": "add(1)"}, "messages[1].function_call: not valid JSON ("),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{a: 1}"}}]},
            "messages[1].tool_calls[0].function.arguments: not valid JSON (",
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "messages[1].tool_calls[0].function.arguments: a list with a number found; give an object or its JSON text",
        ),
        ({"train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail: which characters are learned, which"),
        ({"mask": 0}, "messages[1].mask: what of the message is learned, which pertoken does not read; remove"),
        ({"images": ["a.png"]}, "messages[1].images: images, video or sound; pertoken trains on text alone"),
        ({"rejected": "no"}, "messages[1].rejected: preference data (DPO)"),
        ({"value": "y"}, "messages[1].value: content is given too; keep one of the two"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "a"}}]},
            "messages[1].content[0]: a part of type 'image_url'; pertoken trains on text alone; remove the row",
        ),
        ({"content": [{"type": "tool_result"}]}, "messages[1].content[0].type: unknown type 'tool_result'; give one"),
        ({"content": [{"type": "text"}]}, "messages[1].content[0]: no value, keys found: type; give"),
        ({"content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text: a number found; give text"),
        ({"content": [text("a") | {"loss_weight": 1}]}, "messages[1].content[0].loss_weight: a key of a part that"),
        (
            {"content": [text("a"), {"type": "reasoning", "value": "b"}]},
            "messages[1].content[1]: reasoning after a part that templates write later; put it first, or split",
        ),
    ],
)
def test_what_is_wrong_with_a_message_is_said(turn: dict[str, Any], message: str) -> None:
    assert problem({"messages": [user("?"), {"role": "assistant", "content": "!", **turn}]}).startswith(message)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (user("?") | {"weight": 1}, "messages[0].weight: 1.0 on a user message, but only the assistant's are learned;"),
        (user("?") | {"reasoning": "hm"}, "messages[0].reasoning: reasoning on a user message; only the"),
        (user("?") | {"function_call": {"name": "f"}}, "messages[0].function_call: a call in a user message; only"),
        ({"role": "user", "content": [{"type": "reasoning", "value": "a"}]}, "messages[0].content: reasoning or a"),
    ],
)
def test_what_only_an_assistant_may_have(turn: dict[str, Any], message: str) -> None:
    assert problem({"messages": [turn, assistant("!")]}).startswith(message)
