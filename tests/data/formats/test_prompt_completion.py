from __future__ import annotations

from format_rows import assistant, conversation, problem, said, system, user


def test_only_the_completion_is_learned() -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "system": "s"}
    expected = said(system("s"), user("a"), assistant("b"), user("c"), assistant("d"), weights=(0, 0, 0, 0, 1))
    assert conversation(row) == ("prompt_completion", expected)


def test_weights_of_messages() -> None:
    row = {"prompt": "a", "completion": [assistant("b", weight=0.5), user("c"), assistant("d")]}
    assert conversation(row)[1].weights == (0, 0.5, 1, 1)
    assert conversation(row, supervise="last")[1].weights == (0, 0, 0, 1)
    row = {"prompt": [user("a"), assistant("b", weight=1), user("c")], "completion": "d"}
    assert problem(row) == "prompt: a message with a weight, but a prompt is not learned; remove the weight"


def test_the_chosen_answers_of_preferences() -> None:
    row = {"prompt": "?", "chosen": "!", "rejected": "no"}
    assert problem(row) == (
        "chosen: preference data (DPO): chosen and rejected answers; pertoken trains on answers to be imitated: "
        'data.columns = {completion = "chosen"} with data.ignore = ["rejected"] trains on the chosen ones'
    )
    expected = said(user("?"), assistant("!"), weights=(0, 1))
    assert conversation(row, columns={"completion": "chosen"}, ignore=("rejected",))[1] == expected
