"""Nothing of a row vanishes: what no format reads, and no template names, is counted and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pertoken.data.outcome import UnusedKeys
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.recipe.data import DataConfig

WriteJsonl = Callable[..., Path]
USER = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}
ROWS = "keys of rows that data.format does not use"
MESSAGES = "keys of messages that the chat template does not name"


def _build(path: Path, tokenizer: Any, stage: Any = "sft", **data: Any) -> Store:
    config = DataConfig.model_validate({"path": str(path), "store": str(path.parent / "cache"), **data})
    return build_store(config.path, stage=stage, tokenizer=tokenizer, data=config)


def test_keys_that_a_format_does_not_read_are_said_at_every_start(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    rows: list[Any] = [{"messages": [USER, REPLY], "tools": None, "id": i, "history": None} for i in range(3)]
    rows[1]["source"] = "web"
    path = write_jsonl("a.jsonl", ["", *rows])
    for hit in (False, True):
        store = _build(path, bpe_tokenizer)
        assert store.report.hit == hit
        assert store.report.notes()[1:] == [
            f"{ROWS}: id (3 rows, the first {path}:2), source (1 row, the first {path}:3)"
        ]


def test_a_row_that_is_bad_is_said_as_such_alone(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [{"messages": [], "id": 1}, {"messages": [USER, REPLY]}])
    _, note = _build(path, bpe_tokenizer, on_bad_row="skip").report.notes()
    assert note.startswith("1 bad row skipped")


@pytest.mark.parametrize(
    ("row", "data", "unused"),
    [
        ({"messages": [USER, REPLY], "prompt": "?"}, {}, "prompt"),
        ({"prompt": "?", "completion": "!", "source": "s"}, {}, "source"),
        ({"q": "?", "a": "!", "prompt": "x"}, {"prompt_key": "q", "completion_key": "a"}, "prompt"),
        ({"conversations": [USER, REPLY], "label": "easy"}, {}, "label"),
        ({"messages": [USER, REPLY], "history": "h"}, {"ignore": ["history"]}, "history"),
        ({"messages": [USER, REPLY], "\n[bold]": 1}, {}, r"\n[bold]"),
    ],
)
def test_each_format_reads_its_own_keys_alone(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, row: Any, data: dict[str, Any], unused: str
) -> None:
    path = write_jsonl("a.jsonl", [row])
    assert _build(path, bpe_tokenizer, **data).report.notes()[1:] == [f"{ROWS}: {unused} (1 row, the first {path}:1)"]


def test_keys_of_documents_are_said_too(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [{"text": "The fox", "meta": {"id": 1}}])
    assert _build(path, bpe_tokenizer, "pretrain").report.notes()[1:] == [f"{ROWS}: meta (1 row, the first {path}:1)"]


def test_keys_of_messages_that_the_template_does_not_name_are_said(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    reply = REPLY | {"reasoning_content": "hm", "score": 0, "name": None, "loss-mask": 1}
    path = write_jsonl("a.jsonl", [{"messages": [USER, reply, USER, reply], "tools": [{"name": "add"}]}])
    assert _build(path, bpe_tokenizer).report.notes()[1:] == [
        f"{MESSAGES}: loss-mask (1 row, the first {path}:1), score (1 row, the first {path}:1)"
    ]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{{ m['loss-mask'] }}<|im_end|>"
    bpe_tokenizer.chat_template = (
        template + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    path = write_jsonl("b.jsonl", [{"messages": [USER, REPLY | {"score": 0, "name": None, "loss-mask": 1}]}])
    _, note = _build(path, bpe_tokenizer).report.notes()
    assert note == f"{MESSAGES}: score (1 row, the first {path}:1)"


def test_counts_do_not_depend_on_how_rows_are_split_and_are_bounded() -> None:
    rows = [[f"key {(i * j) % 997:03d}" for j in range(1, 30)] for i in range(500)]

    def counted(pieces: list[list[int]]) -> dict[str, Any]:
        whole = UnusedKeys()
        for piece in pieces:
            part = UnusedKeys()
            for i in piece:
                part.add("row", tuple(rows[i]), 0, i + 1)
                part.add("message", ("x",), 0, i + 1)
            whole.extend(UnusedKeys.from_json(json.loads(json.dumps(part.to_json()))))
        return whole.to_json()

    ids = list(range(len(rows)))
    whole = counted([ids])
    assert whole["more"] == ["row"]
    assert counted([ids[i : i + 7] for i in range(0, len(ids), 7)]) == whole
    expected = {name: sum(name in row for row in rows) for row in rows for name in row}
    assert {name: count for of, name, count, *_ in whole["keys"] if of == "row"} == {
        name: expected[name] for name in sorted(expected)[:100]
    }
    for_a_person = UnusedKeys.from_json(whole).notes(["a.jsonl"])
    assert for_a_person[0].endswith(", and others")
    assert for_a_person[1] == f"{MESSAGES}: x (500 rows, the first a.jsonl:1)"
    assert len(for_a_person[0]) < 600


def test_a_long_key_is_shortened() -> None:
    unused = UnusedKeys()
    unused.add("row", ("x" * 10_000, "x" * 20_000), 0, 1)
    assert unused.notes(["a"]) == [f"{ROWS}: {'x' * 80}... (1 row, the first a:1)"]
