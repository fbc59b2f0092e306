"""Files that people train on are read, every row of them, with the line at which each one stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertoken.data.files.kinds import kind_of
from pertoken.data.files.records import Record, read_records

FILES = {  # how many rows, and the keys of the first
    "real/fastchat_dummy_conversation.json": (60, "conversations id"),
    "real/lf_alpaca_en_demo.json": (80, "input instruction output"),
    "real/lf_alpaca_zh_demo.json": (80, "input instruction output"),
    "real/lf_kto_en_demo.json": (40, "label messages"),
    "real/lf_mllm_demo.json": (6, "images messages"),
    "real/lf_v1_dpo_demo.jsonl": (10, "chosen_messages rejected_messages"),
    "real/lf_v1_multimodal_demo.jsonl": (10, "messages"),
    "real/lf_v1_sft_demo.jsonl": (60, "messages"),
    "real/swift_alpaca.csv": (3, "input instruction output system"),
    "real/swift_alpaca.jsonl": (3, "history input instruction output system"),
    "real/swift_alpaca2.csv": (3, "instruction output"),
    "real/swift_chatml.jsonl": (3, "messages"),
    "real/swift_conversations.jsonl": (3, "conversations"),
    "real/swift_sharegpt.jsonl": (3, "conversation system"),
    "real/swift_swift_multi.json": (3, "query response system"),
    "real/swift_swift_multi.jsonl": (3, "query response system"),
    "real/swift_swift_pre.csv": (3, "response"),
    "real/swift_swift_pre.jsonl": (3, "response"),
    "real/swift_swift_single.csv": (3, "query response system"),
    "real/swift_swift_single.jsonl": (3, "query response system"),
    "sft/gsm8k/test.jsonl": (1319, "answer question"),
    "sft/gsm8k/train.jsonl": (7473, "answer question"),
    "sft/llamafactory/glaive_toolcall_en_demo.json": (300, "conversations tools"),
    "sft/llamafactory/identity.json": (91, "input instruction output"),
    "sft/llamafactory/reason_tool_use_demo_50.jsonl": (50, "messages tools"),
    "sft/self-instruct/seed_tasks.jsonl": (175, "id instances instruction is_classification name"),
    "raw_zh/chinese-poetry/lunyu.json": (20, "chapter paragraphs"),
    "raw_zh/chinese-poetry/shijing.json": (305, "chapter content section title"),
    "raw_zh/chinese-poetry/tangshi300.json": (366, "author id paragraphs tags title"),
    "raw_zh/chinese-poetry/guwenguanzhi.json": (1, "abstract content title"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_real_file_is_read(shared_data: Path, name: str) -> None:
    path, (count, keys) = shared_data / name, FILES[name]
    rows = list(read_records(path))
    assert len(rows) == count
    assert all(isinstance(row, Record) for row in rows)
    first = rows[0]
    assert isinstance(first, Record)
    assert isinstance(first.value, dict)
    assert " ".join(sorted(first.value)) == keys
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if kind_of(path).format == "json":
        assert all("{" in lines[row.line - 1] for row in rows)
    assert [row.line for row in rows] == sorted({row.line for row in rows}), "no two on one line"


@pytest.mark.parametrize("name", ["raw_en/tinyshakespeare/input.txt", "raw_en/litbank/514_little_women.txt"])
def test_a_book_is_one_document(shared_data: Path, name: str) -> None:
    (row,) = read_records(shared_data / name)
    assert isinstance(row, Record)
    assert row.value == (shared_data / name).read_bytes().decode().replace("\r\n", "\n")


def test_what_may_not_be_here_is_all_here(shared_data: Path) -> None:
    named = {name for name in FILES if name.startswith("real/")}
    assert {f"real/{path.name}" for path in (shared_data / "real").iterdir()} == named
