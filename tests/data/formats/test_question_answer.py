from __future__ import annotations

from format_rows import assistant, conversation, problem, said, user

ROW = {"question": "2+2?", "answer": "4"}


def test_a_question_and_its_answer() -> None:
    assert conversation(ROW) == ("question_answer", said(user("2+2?"), assistant("4")))
    assert conversation({**ROW, "id": 1, "label": "easy"})[0] == "question_answer"


def test_the_earlier_way_to_read_it_stays() -> None:
    keys = {"prompt": "question", "completion": "answer"}
    assert conversation(ROW, **keys)[0] == conversation(ROW, columns=keys)[0] == "prompt_completion"


def test_what_is_wrong_is_said() -> None:
    assert problem({**ROW, "answer": 4}) == "answer: a number found; give text"
    assert problem({**ROW, "context": "x"}).startswith("context: a part of the question, which the format question_")
    assert conversation({**ROW, "context": "x"}, ignore=("context",))[1] == said(user("2+2?"), assistant("4"))
    assert problem({**ROW, "label": True}).startswith("label: preference data (KTO)")
