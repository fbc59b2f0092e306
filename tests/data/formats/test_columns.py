"""`data.columns`, `data.ignore` and what is said of rows that no format fits."""

from __future__ import annotations

from typing import Any

import pytest
from format_rows import assistant, conversation, problem, said, system, user

from pertoken.errors import RecipeError
from pertoken.recipe.data import DataConfig
from pertoken.recipe.schema import Recipe


def test_any_key_of_any_format_may_have_another_name() -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    row = {"dialogue": turns, "persona": "s"}
    columns = {"conversations": "dialogue", "system": "persona"}
    assert conversation(row, columns=columns) == ("sharegpt", said(system("s"), user("?"), assistant("!")))
    assert problem({"dialogue": 3}, columns={"messages": "dialogue"}).startswith("dialogue: a number found; give a")


def test_a_column_that_is_named_has_no_longer_its_own_name() -> None:
    row = {"question": "?", "answer": "!", "input": "x"}
    columns = {"query": "question", "response": "answer"}
    assert problem(row, columns=columns).startswith("input: a part of the question, which the format query_response")
    assert conversation(row, columns=columns, ignore=("input",))[0] == "query_response"


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"input": "?", "output": "!"}, 'set data.columns = {prompt = "input", completion = "output"} if those are'),
        ({"dialogue": []}, 'set data.columns = {messages = "dialogue"} if those are the messages'),
        ({"body": "x"}, 'name yours, as in data.columns = {messages = "..."}'),
    ],
)
def test_an_unknown_format_is_told_the_setting_that_reads_it(row: Any, remedy: str) -> None:
    assert f"; {remedy}" in problem(row)


@pytest.mark.parametrize("header", ["<|im_start|>user\n", "<s>[INST] ", "<|begin_of_text|>", "### Instruction:\n"])
def test_a_text_that_a_template_made_is_named(header: str) -> None:
    message = problem({"text": header + "hi"})
    assert message.startswith("text: begins with '")
    assert "so a chat template made it before; give the messages" in message
    assert (
        problem({"text": "hi"}) == 'text: a text has no turns; train with stage = "pretrain", or split it into messages'
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"mesages": "a"}}, "'messages'"),
        ({"columns": {"prompt": "a", "completion": "a"}}, "'a' twice; give each of the keys the name of a column"),
        ({"columns": {"prompt": ""}}, "no name; give each"),
        ({"columns": {"prompt": "a"}, "prompt_key": "b"}, "data.columns: prompt is named by data.prompt_key='b' too"),
        ({"supervise": "first"}, "data.supervise"),
    ],
)
def test_the_recipe_is_checked(data: dict[str, Any], message: str) -> None:
    values = {"stage": "sft", "out_dir": "x", "data": {"path": "a", "tokenizer": "t", **data}}
    with pytest.raises(RecipeError) as error:
        Recipe.parse(values)
    assert message in str(error.value)


def test_ignored_keys_are_one_or_many() -> None:
    assert DataConfig.model_validate({"path": "a", "ignore": "label"}).ignore == ("label",)
