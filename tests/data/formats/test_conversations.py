from __future__ import annotations

import json

from format_rows import assistant, conversation, problem, said, system, user

TOOL = {"type": "function", "function": {"name": "add"}}


def test_minimind_conversations_keep_tools_in_the_system_message() -> None:
    first = {**system("s"), "tools": json.dumps([TOOL])}
    row = {"conversations": [first, user("?"), assistant("!", reasoning_content="")]}
    expected = said(system("s"), user("?"), assistant("!", reasoning_content=""), tools=[TOOL])
    assert conversation(row) == ("conversations", expected)


def test_messages_are_named_by_their_key() -> None:
    assert problem({"conversations": [user("?")]}).startswith("conversations: no assistant turn, so nothing")
    assert problem({"conversations": "x"}).startswith("conversations: text found; give a list of messages")
