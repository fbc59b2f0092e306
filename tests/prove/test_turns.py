"""The proof's own idea of turns: it agrees with the samples of real templates, and with no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import DAY, ENDS, KINDS, template_files, tokenizer_for

from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.prove.rows import expected_sample
from pertoken.prove.turns import supervision
from pertoken.recipe.data import DataConfig

NAMES = ["cohere2", "deepseek_r1_distill", "gemma3", "glm4moe", "gptoss", "llama3_1", "phi3", "qwen3", "qwen3_5_think"]
FILES = [file for file in template_files() if file.stem in NAMES]
pytestmark = pytest.mark.skipif(not FILES, reason="the package trl, which brings the templates, is not installed")


def store_of(name: str, path: Path, cache: Path, **settings: Any) -> tuple[Store, DataConfig, Any]:
    (file,) = [file for file in FILES if file.stem == name]
    tokenizer = tokenizer_for(file.read_text(encoding="utf-8"))
    keys = {"end_of_turn": ENDS.get(name), "template_date": DAY, "on_bad_row": "skip", "max_seq_len": 8192}
    data = DataConfig(path=(str(path),), store=str(cache), workers=1, **{**keys, **settings})
    return build_store(data.path, stage="sft", tokenizer=tokenizer, data=data), data, tokenizer


@pytest.fixture
def rows(write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl("rows.jsonl", [{"messages": chat.messages, "tools": chat.tools} for chat in KINDS.values()])


def problems(store: Store, data: DataConfig, tokenizer: Any, path: Path) -> list[str]:
    records = {row.line: row for row in read_records(path) if not isinstance(row, BadRow)}
    found = []
    for i in range(len(store)):
        record: Record = records[int(store.lines[i])]
        expected = expected_sample(store, i, record, data, tokenizer)
        if isinstance(expected, str):
            found.append(expected)
            continue
        sample = store[i]
        if not np.array_equal(sample.tokens, expected.tokens[: len(sample.tokens)]):
            found.append("other tokens")
        found += filter(None, [supervision(sample.loss_mask, expected, tokenizer)])
    return found


CUT = {"max_seq_len": 64, "overlong": "truncate"}
CASES = [(name, settings) for name in NAMES for settings in ({}, {"reasoning": "inline"})]


@pytest.mark.parametrize(("name", "settings"), [*CASES, ("qwen3", CUT), ("phi3", CUT)])
def test_samples_of_real_templates_are_as_expected(
    rows: Path, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    store, data, tokenizer = store_of(name, rows, tmp_path / "store", **settings)
    assert len(store) >= 7
    assert problems(store, data, tokenizer, rows) == []


def test_tokens_too_many_or_too_few_are_found(rows: Path, tmp_path: Path) -> None:
    store, data, tokenizer = store_of("qwen3", rows, tmp_path / "store")
    (record, *_) = read_records(rows)
    assert isinstance(record, Record)
    expected = expected_sample(store, 0, record, data, tokenizer)
    assert not isinstance(expected, str)
    mask = store[0].loss_mask
    first, last = np.flatnonzero(mask)[[0, -1]]
    assert supervision(mask, expected, tokenizer) is None
    for at, value in ((first - 1, True), (last + 1, True), (first, False), (last, False), (first + 3, False)):
        wrong = mask.copy()
        wrong[at] = value
        assert f"token {at + 1}, " in str(supervision(wrong, expected, tokenizer))


def test_a_sample_too_many_or_too_few_is_found(rows: Path, tmp_path: Path) -> None:
    store, data, tokenizer = store_of("qwen3", rows, tmp_path / "store")
    records = list(read_records(rows))
    split = next(i for i in range(len(store)) if int(store.lines[i]) == 2)
    assert not isinstance(expected_sample(store, split, records[1], data, tokenizer), str)
    found = expected_sample(store, split, records[0], data, tokenizer)
    assert found == "3 samples of the conversation, data.max_seq_len=8192 leaves 1"
