from __future__ import annotations

from format_rows import assistant, conversation, problem, said, user


def test_instruction_and_context_are_the_question() -> None:
    row = {"instruction": "Who?", "context": "", "response": "Ann", "category": "closed_qa"}
    assert conversation(row) == ("dolly", said(user("Who?"), assistant("Ann")))
    row["context"] = "Ann came."
    assert conversation(row) == ("dolly", said(user("Who?\nAnn came."), assistant("Ann")))


def test_what_is_wrong_is_said() -> None:
    assert problem({"instruction": "", "response": "x"}).startswith("instruction: empty, and so is context; give")
    assert problem({"instruction": "a", "input": "b", "response": "x"}).startswith("input: a part of the question,")
