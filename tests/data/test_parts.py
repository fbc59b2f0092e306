"""However files are cut, their parts hold every row once, in order, with its line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pertoken.data.store.parts
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.store.parts import part_bytes, scan
from pertoken.errors import DataError

LINES = st.sampled_from(
    [b'{"a": 1}', b"", b"  ", b"\xff", b"[1]", b'{"text": "%s"}' % (b"x" * 50), b"\r", b'{"a": 2}\r']
)


def _rows(files: list[Path]) -> list[tuple[object, ...]]:
    return [_row(row) for file in files for row in read_records(file)]


def _rows_of_parts(files: list[Path], parts: list[pertoken.data.store.parts.Part]) -> list[tuple[object, ...]]:
    return [_row(row) for part in parts for span in part for row in read_records(files[span.file], span)]


def _row(row: Record | BadRow) -> tuple[object, ...]:
    if isinstance(row, BadRow):
        return row.file, row.line, row.field, row.problem
    return row.file, row.line, json.dumps(row.value), row.digest, row.end


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.lists(LINES, max_size=12).map(b"\n".join), min_size=1, max_size=3),
    end=st.sampled_from([b"", b"\n", b"\n\n \n"]),
    part=st.integers(1, 80),
    block=st.integers(1, 30),
)
def test_parts_hold_every_row_of_every_jsonl_once_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: list[bytes], end: bytes, part: int, block: int
) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (part, part))
    monkeypatch.setattr(pertoken.data.store.parts, "_BLOCK_BYTES", block)
    files = [tmp_path / f"{i}.jsonl" for i in range(len(contents))]
    for i, (file, content) in enumerate(zip(files, contents, strict=True)):
        file.write_bytes(b'\xef\xbb\xbf{"first": %d}\n' % i + content + end)
    hashes, parts = scan(files)
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert _rows_of_parts(files, parts) == _rows(files)
    for i, file in enumerate(files):
        spans = [span for part in parts for span in part if span.file == i]
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == file.stat().st_size
        assert all(span.stop - span.start >= part for span in spans[:-1])


@pytest.mark.parametrize(("part", "count"), [(1, 11), (3_000, 4), (10**9, 1)])
def test_row_groups_of_parquet_are_cut_into_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, count: int
) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (part, part))
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file, rows in zip(files, (1000, 40), strict=True):
        pq.write_table(pa.table({"text": [f"{file.name} row {i}" for i in range(rows)]}), file, row_group_size=100)
    _, parts = scan(files)
    assert len(parts) == count
    assert _rows_of_parts(files, parts) == _rows(files)
    assert sum(map(part_bytes, parts)) == sum(file.stat().st_size for file in files)


def test_a_text_file_is_never_cut_and_small_files_share_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (100, 100))
    files = [tmp_path / f"{i}.txt" for i in range(6)]
    for file, size in zip(files, (1000, 30, 30, 30, 30, 300), strict=True):
        file.write_text("a\n" * (size // 2))
    _, parts = scan(files)
    assert [[span.file for span in part] for part in parts] == [[0], [1, 2, 3], [4], [5]]
    assert _rows_of_parts(files, parts) == _rows(files)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\xef\xbb\xbf\n \n"), ("a.txt", b"\xef\xbb\xbf"), ("a.parquet", b"")],
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty; remove it from data\.path or fill it"):
        scan([tmp_path / name])


@pytest.mark.parametrize(("size", "part"), [(1, 10), (3200, 100), (10**6, 200)])
def test_parts_are_a_share_of_all_between_two_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, part: int
) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (10, 200))
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * (size // 3 + 1))
    (whole, *_), *others = scan([tmp_path / "a.jsonl"])[1]
    assert not others or part <= whole.stop - whole.start < part + 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("size", [40, 10**9])
def test_a_span_knows_the_hash_of_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (size, size))
    monkeypatch.setattr(pertoken.data.store.parts, "_BLOCK_BYTES", 7)
    path = _file_of_rows(tmp_path / name, 30)
    (content_hash,), parts = scan([path])
    content = path.read_bytes()
    spans = [span for part in parts for span in part]
    assert [span.sha256 for span in spans] == [hashlib.sha256(content[s.start : s.stop]).hexdigest() for s in spans]
    assert content_hash == hashlib.sha256(content).hexdigest()
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == len(content)


def _file_of_rows(path: Path, count: int) -> Path:
    texts = [f"The text of row {i}" for i in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="none", use_dictionary=False)
    elif path.suffix == ".txt":
        path.write_text("".join(text + "\n" for text in texts))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("size", [100, 10**9])
def test_rows_that_changed_since_they_were_hashed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (size, size))
    path = _file_of_rows(tmp_path / name, 30)
    _, parts = scan([path])
    assert len(_rows_of_parts([path], parts)) == (1 if name == "a.txt" else 30)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"The text of row 17", b"The text of row 71"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match=rf"{name}: changed while it was being prepared, so nothing was stored"):
        _rows_of_parts([path], parts)


def test_a_line_that_is_cut_short_or_grows_is_a_change(tmp_path: Path) -> None:
    path = _file_of_rows(tmp_path / "a.jsonl", 3)
    _, parts = scan([path])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"text": "appended"}\n')
    assert len(_rows_of_parts([path], parts)) == 3, "what was hashed is still there"
    for content in (whole[:-5], whole[:-1] + b" \n", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="changed while it was being prepared"):
            _rows_of_parts([path], parts)
