from __future__ import annotations

from typing import Any

import pytest
from format_rows import assistant, conversation, problem, said, system, user


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Add.", "output": "4"}, "Add."),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "4"}, "Add."),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "Add.\n2+2"),
        ({"instruction": "", "input": "2+2", "output": "4"}, "2+2"),
    ],
)
def test_instruction_and_input_are_the_question(row: dict[str, Any], question: str) -> None:
    assert conversation(row) == ("alpaca", said(user(question), assistant("4")))


def test_system_and_history_come_before() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert conversation(row)[1] == said(system("s"), user("a"), assistant("b"), user("c"), assistant("d"))
    assert conversation(row, supervise="last")[1].weights == (0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"instruction": ""}, "instruction: empty, and so is input; give the question, or remove the row"),
        ({"input": 3}, "input: a number found; give text"),
        ({"history": ["a", "b"]}, "history[0]: text found; give [question, answer], two texts"),
        ({"history": [["a"]]}, "history[0]: a list with text found; give [question, answer], two texts"),
        ({"history": "a"}, "history: text found; give a list of [question, answer]"),
        ({"context": "c"}, "context: a part of the question, which the format alpaca does not read; remove it, or set"),
        ({"weight": 0.5}, "weight: how much the row counts, which the format alpaca does not read; put weight on the"),
        ({"response": "x"}, "row: fits the formats alpaca and dolly; choose with data.format"),
        ({"rejected": "x"}, "rejected: preference data (DPO): chosen and rejected answers; pertoken trains on"),
        ({"kto_tag": False}, "kto_tag: preference data (KTO): whether the answer is wanted; pertoken trains on"),
        ({"images": ["a"]}, "images: images, video or sound; pertoken trains on text alone: remove the row"),
    ],
)
def test_what_is_wrong_is_said(more: dict[str, Any], message: str) -> None:
    assert problem({"instruction": "Add.", "output": "4", **more}).startswith(message)
