"""Files that people train on, each read as its author meant it or refused for what it is."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pertoken.data.files.records import BadRow, TextReading, read_records
from pertoken.data.formats import Conversation, read_row
from pertoken.data.store.build import build_store
from pertoken.data.store.parts import scan
from pertoken.errors import DataError
from pertoken.recipe.data import DataConfig

S, U, A, T = "system", "user", "assistant", "tool"
KTO = "label: preference data (KTO)"
DPO = "chosen_messages: preference data (DPO)"
ALONE = "response: an answer without a question"
READ = {  # file -> (format, rows, roles of the first conversation, what the assistant says there last)
    "real/fastchat_dummy_conversation.json": ("sharegpt", 60, [U, A, U, A], "You too!"),
    "real/lf_alpaca_en_demo.json": ("alpaca", 80, [U, A], None),
    "real/lf_alpaca_zh_demo.json": ("alpaca", 80, [U, A], None),
    "real/lf_v1_sft_demo.jsonl": (
        "messages",
        60,
        [U, A],
        "Hello! I am {{name}}, an AI assistant developed by {{author}}. How can I assist you today?",
    ),
    "real/swift_alpaca.csv": ("alpaca", 3, [S, U, A], "3.3"),
    "real/swift_alpaca.jsonl": ("alpaca", 3, [S, U, A, U, A], "33333"),
    "real/swift_alpaca2.csv": ("alpaca", 3, [U, A], "33333"),
    "real/swift_chatml.jsonl": ("messages", 3, [S, U, A], "22222"),
    "real/swift_conversations.jsonl": ("sharegpt", 3, [S, U, A], "22222"),
    "real/swift_sharegpt.jsonl": ("pairs", 3, [S, U, A], "22222"),
    "real/swift_swift_multi.json": ("query_response", 3, [S, U, A], "66666"),
    "real/swift_swift_multi.jsonl": ("query_response", 3, [S, U, A], "66666"),
    "real/swift_swift_single.csv": ("query_response", 3, [S, U, A], "22222"),
    "real/swift_swift_single.jsonl": ("query_response", 3, [S, U, A], "22222"),
    "sft/gsm8k/test.jsonl": ("question_answer", 1319, [U, A], None),
    "sft/gsm8k/train.jsonl": ("question_answer", 7473, [U, A], None),
    "sft/llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300, [U, A, U, A, T, A, U, A], None),
    "sft/llamafactory/identity.json": (
        "alpaca",
        91,
        [U, A],
        "Hello! I am {{name}}, an AI assistant developed by {{author}}. How can I assist you today?",
    ),
    "sft/llamafactory/reason_tool_use_demo_50.jsonl": ("messages", 50, [S, U, A], None),
    "sft/self-instruct/seed_tasks.jsonl": ("self_instruct", 175, [U, A], None),
}
REFUSED = {  # file -> (rows, how the message begins)
    "real/lf_kto_en_demo.json": (40, KTO),
    "real/lf_mllm_demo.json": (6, "images: images, video or sound"),
    "real/lf_v1_dpo_demo.jsonl": (10, DPO),
    "real/lf_v1_multimodal_demo.jsonl": (10, "messages[0].content[0]: a part of type 'image_url'"),
    "real/swift_swift_pre.csv": (3, ALONE),
    "real/swift_swift_pre.jsonl": (3, ALONE),
}


def _read(folder: Path, file: str) -> list[Any]:
    path = folder / file
    rows = [row for part in scan([path])[1] for span in part for row in read_records(path, span, TextReading())]
    return [row if isinstance(row, BadRow) else read_row(row, "conversation") for row in rows]


def test_every_file_is_here(shared_data: Path) -> None:
    found = {str(p.relative_to(shared_data)) for part in ("real", "sft") for p in (shared_data / part).rglob("*.*")}
    assert found == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("file", READ)
def test_read_as_it_was_meant(shared_data: Path, file: str) -> None:
    format, rows, roles, last = READ[file]
    read = _read(shared_data, file)
    assert not [str(row) for row in read if isinstance(row, BadRow)]
    assert Counter(row.format for row in read) == {format: rows}
    chat = read[0].value
    assert isinstance(chat, Conversation)
    assert [message["role"] for message in chat.messages] == roles
    assert chat.weights is None
    if last is not None:
        assert chat.messages[-1]["content"] == last


@pytest.mark.parametrize("file", REFUSED)
def test_refused_for_what_it_is(shared_data: Path, file: str) -> None:
    rows, begins = REFUSED[file]
    read = _read(shared_data, file)
    assert len(read) == rows
    for row in read:
        assert str(row).startswith(f"{shared_data / file}:{row.line}: {begins}")


@pytest.mark.parametrize("file", READ)
def test_goes_in_by_its_path_alone(shared_data: Path, minimind_tokenizer: Any, tmp_path: Path, file: str) -> None:
    data = DataConfig(path=(str(shared_data / file),), store=str(tmp_path), workers=1, max_seq_len=16_384)
    store = build_store(data.path, stage="sft", tokenizer=minimind_tokenizer, data=data)
    format, rows, _, _ = READ[file]
    assert store.report.notes()[0] == f"formats: {format} ({rows:,} rows)"
    assert store.report.rows == rows
    assert len(store) == rows


@pytest.mark.parametrize("file", REFUSED)
def test_does_not_go_in(shared_data: Path, minimind_tokenizer: Any, tmp_path: Path, file: str) -> None:
    data = DataConfig(path=(str(shared_data / file),), store=str(tmp_path), workers=1)
    with pytest.raises(DataError, match=re.escape(REFUSED[file][1])):
        build_store(data.path, stage="sft", tokenizer=minimind_tokenizer, data=data)


def test_nothing_of_the_calls_and_the_reasoning_is_lost(shared_data: Path) -> None:
    chats = [row.value for row in _read(shared_data, "sft/llamafactory/reason_tool_use_demo_50.jsonl")]
    messages = [message for chat in chats for message in chat.messages]
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    assert len(calls) == 68
    assert calls[0] == {"name": "get_movie_details", "arguments": {"title": "Inception"}}
    assert sum("reasoning_content" in message for message in messages) == 112
    assert sum(len(chat.tools or []) for chat in chats) == 121
    chats = [row.value for row in _read(shared_data, "sft/llamafactory/glaive_toolcall_en_demo.json")]
    assert sum("tool_calls" in message for chat in chats for message in chat.messages) == 211
    assert sum(message["role"] == "tool" for chat in chats for message in chat.messages) == 211
    assert chats[0].messages[3]["tool_calls"][0]["function"] == {
        "name": "search_recipes",
        "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]},
    }
