"""How a file of plain text becomes documents, and what becomes of its line ends."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pertoken.data.files.long_text
from pertoken import Recipe
from pertoken.data.files import limits
from pertoken.data.files.long_text import LongText
from pertoken.data.files.records import BadRow, Record, TextReading, read_records
from pertoken.data.store.build import build_store
from pertoken.errors import DataError, RecipeError
from pertoken.recipe.data import DataConfig

_CONTENTS = st.lists(st.sampled_from(["a", "é🙂", "\r\n", "\n", "\r", "<|x|>", "<|", " ", "天"]), max_size=14).map(
    "".join
)


def _documents(path: Path, document: str, newlines: Any = "lf") -> list[tuple[int, str]]:
    rows = list(read_records(path, reading=TextReading(document, newlines)))
    assert all(isinstance(row, Record) for row in rows)
    return [(row.line, str(row.value)) for row in rows if isinstance(row, Record)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=_CONTENTS,
    document=st.sampled_from(["line", "<|x|>", "\n\n", "a"]),
    newlines=st.sampled_from(["lf", "keep"]),
    block=st.integers(1, 9),
    packed=st.booleans(),
)
def test_documents_are_the_text_between_separators_with_their_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    document: str,
    newlines: str,
    block: int,
    packed: bool,
) -> None:
    """Wherever a block that is read ends."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    text = content.replace("\r\n", "\n") if newlines == "lf" else content
    separator, at, expected = "\n" if document == "line" else document, 0, []
    for piece in text.split(separator):
        if piece.strip():
            kept = piece.strip("\r\n")
            expected.append((text.count("\n", 0, at + piece.index(kept)) + 1, kept))
        at += len(piece) + len(separator)
    if expected:
        assert _documents(path, document, newlines) == expected
    else:
        with pytest.raises(DataError, match="empty"):
            _documents(path, document, newlines)


def test_a_document_that_is_no_text_is_a_bad_row_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(limits, "BLOCK_BYTES", 50)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ncaf\xe9\nt\0o\n" + b"x" * 300 + b"\nfive\n")
    rows = list(read_records(path, reading=TextReading("line")))
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert [row.problem for row in rows if isinstance(row, BadRow)] == [
        "not UTF-8 (byte 0xe9 at offset 3 of the document); save the file as UTF-8",
        "a NUL byte at offset 1 of the document: not text; save the file as UTF-8",
        "a document of more than 100 bytes; see data.document, or split it",
    ]
    assert isinstance(rows[4], Record)
    assert rows[4].value == "five"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_CONTENTS, block=st.integers(1, 5), newlines=st.sampled_from(["lf", "keep"]))
def test_line_ends_of_a_long_text_are_those_of_one_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, block: int, newlines: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode() + b"end\r")
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
    monkeypatch.setattr(limits, "LONG_BYTES", 1 << 30)
    (whole,) = read_records(path, reading=TextReading("file", newlines))
    monkeypatch.setattr(limits, "LONG_BYTES", 0)
    (long,) = read_records(path, reading=TextReading("file", newlines))
    assert isinstance(whole, Record)
    assert isinstance(long, Record)
    assert isinstance(long.value, LongText)
    assert str(long.value) == whole.value == (content.replace("\r\n", "\n") if newlines == "lf" else content) + "end\r"
    assert len(long.value) == len(str(whole.value))
    assert str(long.value.part(1, 3)) == str(whole.value)[1:3]
    assert long.findings == whole.findings == (("crlf",) if newlines == "lf" and "\r\n" in content else ())
    assert (long.digest, long.end) == (whole.digest, whole.end)


def test_a_compressed_document_too_long_to_be_held_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONG_BYTES", 1000)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"line\n" * 200))
    assert len(_documents(path, "file")) == 1
    path.write_bytes(gzip.compress(b"line\n" * 201))
    with pytest.raises(
        DataError, match=r"a\.txt\.gz: a document of more than 1,000 bytes in a compressed file; decomp"
    ):
        _documents(path, "file")
    assert len(_documents(path, "line")) == 201


def _store(path: Path, tokenizer: Any, folder: Path, **keys: Any) -> Any:
    data = DataConfig.model_validate({"path": str(path), "store": str(folder / "store"), **keys})
    return build_store(data.path, stage="pretrain", tokenizer=tokenizer, data=data)


def test_windows_line_ends_are_said_and_may_be_kept(tmp_path: Path, char_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"The quick\r\nbrown fox\r\n")
    store, kept = (_store(path, char_tokenizer, tmp_path, newlines=newlines) for newlines in ("lf", "keep"))
    assert char_tokenizer.decode(store[0].tokens[:-1]) == "The quick\nbrown fox\n"
    (note,) = store.report.notes()
    assert note == (
        f'1 text file with Windows line ends (CRLF), read as newlines; data.newlines = "keep" keeps them ({path}:1)'
    )
    assert len(kept[0].tokens) == len(store[0].tokens) + 2
    assert not any("CRLF" in note for note in kept.report.notes())  # a carriage return is unknown here
    assert kept.fingerprint != store.fingerprint


def test_each_line_is_a_sample_with_its_own_line(tmp_path: Path, char_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"The quick\n\nbrown fox\r\n")
    store = _store(path, char_tokenizer, tmp_path, document="line")
    assert [char_tokenizer.decode(sample.tokens[:-1]) for sample in store] == ["The quick", "brown fox"]
    assert store.lines.tolist() == [1, 3]
    assert store.report.notes() == []
    assert store.fingerprint != _store(path, char_tokenizer, tmp_path).fingerprint


@pytest.mark.parametrize("key", ['document="line"', 'newlines="keep"'])
def test_conversations_have_no_documents(key: str) -> None:
    name, value = key.replace('"', "").split("=")
    values = {"stage": "sft", "out_dir": "x", "init_from": "y", "data": {"path": "a.jsonl", name: value}}
    with pytest.raises(RecipeError, match=re.escape(f"data.{name}='{value}': only raw text is read so; remove it")):
        Recipe.parse(values)
    assert Recipe.parse({**values, "stage": "pretrain"}).data.text_reading != TextReading()


def test_a_key_for_text_is_said_to_be_unused_where_there_is_none(tmp_path: Path, char_tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The quick"}\n')
    (tmp_path / "b.txt").write_text("The quick\n")
    for name, expected in (("a.jsonl", 1), ("b.txt", 0)):
        told: list[str] = []
        values = {"path": str(tmp_path / name), "store": str(tmp_path / "store"), "document": "line"}
        data = DataConfig.model_validate(values)
        build_store(data.path, stage="pretrain", tokenizer=char_tokenizer, data=data, on_message=told.append)
        unused = "data.document, data.newlines: not used, since no file of data.path is plain text"
        assert told == [unused] * expected


def test_windows_line_ends_within_documents_are_said_once_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo<|x|>three\r\nfour<|x|>five")
    rows = [row for row in read_records(path, reading=TextReading("<|x|>")) if isinstance(row, Record)]
    assert [row.value for row in rows] == ["one\ntwo", "three\nfour", "five"]
    assert [row.findings for row in rows] == [("crlf",), (), ()]
