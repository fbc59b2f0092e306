from __future__ import annotations

import pytest
from format_rows import assistant, conversation, problem, said, system, user


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


@pytest.mark.parametrize("asker", ["human", "user"])
@pytest.mark.parametrize("answerer", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
def test_every_name_of_a_role(asker: str, answerer: str) -> None:
    row = {"conversations": [turn("system", "s"), turn(asker, "?"), turn(answerer, "!")]}
    assert conversation(row) == ("sharegpt", said(system("s"), user("?"), assistant("!")))


@pytest.mark.parametrize("caller", ["function_call", "tool_call"])
@pytest.mark.parametrize("result", ["observation", "tool", "function", "tool_response"])
def test_calls_of_tools(caller: str, result: str) -> None:
    row = {
        "conversations": [
            turn("human", "1+2?"),
            turn(caller, '{"name": "add", "arguments": {"a": 1, "b": 2}}'),
            turn(result, "3"),
            turn("gpt", "It is 3."),
        ],
        "system": "Use tools.",
        "tools": '[{"name": "add"}]',
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    expected = said(
        system("Use tools."),
        user("1+2?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "3"},
        assistant("It is 3."),
        tools=[{"name": "add"}],
    )
    assert conversation(row) == ("sharegpt", expected)


def test_several_calls_at_once() -> None:
    calls = '[{"name": "a", "arguments": "{\\"x\\": 1}"}, {"name": "b", "arguments": {}}]'
    _, chat = conversation({"conversations": [turn("human", "?"), turn("function_call", calls)]})
    assert [call["function"] for call in chat.messages[1]["tool_calls"]] == [
        {"name": "a", "arguments": {"x": 1}},
        {"name": "b", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (turn("bot", "x"), "conversations[1].from: unknown role 'bot'; give one of system, user, assistant, tool"),
        (turn("function_call", "add"), "conversations[1].content: not valid JSON ("),
        (turn("function_call", "[]"), "conversations[1].content: no call in it; give one, or remove the message"),
        ({"from": "gpt"}, "conversations[1].content: missing; give text (an empty one is allowed)"),
        (turn("gpt", "x") | {"weight": 0}, "conversations: all assistant turns have weight 0, so nothing"),
    ],
)
def test_what_is_wrong_is_said(last: dict[str, str], message: str) -> None:
    assert problem({"conversations": [turn("human", "?"), last]}).startswith(message)
