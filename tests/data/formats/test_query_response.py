from __future__ import annotations

from format_rows import assistant, conversation, problem, said, system, user


def test_system_and_history_come_before() -> None:
    assert conversation({"query": "a", "response": "b", "history": []}) == (
        "query_response",
        said(user("a"), assistant("b")),
    )
    row = {"system": "s", "query": "c", "response": "d", "history": [["a", "b"]]}
    assert conversation(row)[1] == said(system("s"), user("a"), assistant("b"), user("c"), assistant("d"))


def test_a_response_alone_is_a_text() -> None:
    assert problem({"response": "x"}) == (
        "response: an answer without a question (ms-swift trains on such rows as on texts); "
        'set stage = "pretrain" and data.text_key = "response", or add query'
    )


def test_preferences_are_refused() -> None:
    assert problem({"query": "a", "response": "b", "rejected_response": "c"}).startswith(
        "rejected_response: preference data (DPO): chosen and rejected answers;"
    )
