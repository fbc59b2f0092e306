from __future__ import annotations

from typing import Any

import pytest
from format_rows import assistant, conversation, problem, said, system, user


@pytest.mark.parametrize(("question", "answer"), [("human", "assistant"), ("input", "output")])
def test_pairs_of_question_and_answer(question: str, answer: str) -> None:
    row = {"system": "s", "conversation": [{question: "a", answer: "b"}, {question: "c", answer: "d"}]}
    expected = said(system("s"), user("a"), assistant("b"), user("c"), assistant("d"))
    assert conversation(row) == ("pairs", expected)


def test_the_first_pair_may_hold_the_system_prompt() -> None:
    row = {"conversation": [{"system": "s", "input": "a", "output": "b"}]}
    assert conversation(row)[1] == said(system("s"), user("a"), assistant("b"))
    assert problem({**row, "system": "t"}).startswith("system: the first pair has another system prompt")


def test_a_list_of_messages_under_that_name_is_read_as_one() -> None:
    expected = said(user("a"), assistant("b"))
    assert (
        conversation({"conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})[1] == expected
    )
    assert conversation({"conversation": expected.messages})[1] == expected


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "conversation: an empty list found; give a list of pairs"),
        ("x", "conversation: text found; give a list of pairs"),
        (["x"], "conversation[0]: text found; give an object with human and assistant"),
        ([{"human": "a"}], "conversation[0]: keys found: human; give human and assistant, or input and output"),
        ([{"human": "a", "assistant": 1}], "conversation[0].assistant: a number found; give text"),
        ([{"human": "a", "assistant": "b", "weight": 0}], "conversation[0].weight: a key of a pair that nothing"),
        (
            [{"human": "a", "assistant": "b"}, {"human": "a", "assistant": "b", "system": "s"}],
            "conversation[1].system: a key of a pair that nothing would be made of; remove it",
        ),
    ],
)
def test_what_is_wrong_is_said(pairs: Any, message: str) -> None:
    assert problem({"conversation": pairs}).startswith(message)
