from __future__ import annotations

from typing import Any

import pytest
from format_rows import assistant, conversation, problem, said, user


def test_an_instruction_with_its_instance() -> None:
    row = {"id": "seed_task_0", "instruction": "Add.", "instances": [{"input": "2+2", "output": "4"}]}
    assert conversation(row) == ("self_instruct", said(user("Add.\n2+2"), assistant("4")))
    row["instances"] = [{"input": "", "output": "4"}]
    assert conversation(row)[1] == said(user("Add."), assistant("4"))


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ([], "instances: 0 instances in one row; write a row for each, one instance a row"),
        ([{"output": "a"}, {"output": "b"}], "instances: 2 instances in one row; write a row for each"),
        ("x", "instances: text found; give a list of objects with input and output"),
        ([{"input": "a"}], "instances[0].output: missing; give the answer, or remove the row"),
        ([{"output": 4}], "instances[0].output: a number found; give text"),
        ([{"output": "a", "weight": 1}], "instances[0].weight: a key of an instance that nothing would be made of"),
    ],
)
def test_what_is_wrong_is_said(instances: Any, message: str) -> None:
    assert problem({"instruction": "Add.", "instances": instances}).startswith(message)
