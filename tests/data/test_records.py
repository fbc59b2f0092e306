from __future__ import annotations

import io
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pertoken.data.files import limits, parquet
from pertoken.data.files.json_text import parse_json
from pertoken.data.files.problems import Problems
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.errors import DataError


def _jsonl(folder: Path, content: bytes) -> Path:
    path = folder / "chat.jsonl"
    path.write_bytes(content)
    return path


def test_jsonl_rows_keep_their_line_numbers_over_blank_lines_and_any_line_end(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xe2\x80\xa8"}\n{"a": 3}')
    rows = list(read_records(path))
    assert [(row.line, row.value) for row in rows if isinstance(row, Record)] == [
        (1, {"a": 1}),
        (4, {"a": "\u2028"}),
        (5, {"a": 3}),
    ]
    assert rows[-1].end == path.stat().st_size


def test_duplicate_rows_share_a_digest_and_others_do_not(tmp_path: Path) -> None:
    rows = list(read_records(_jsonl(tmp_path, b'{"a": 1}\n{"a": 2}\r\n{"a": 1}\r\n')))
    assert rows[0].digest == rows[2].digest != rows[1].digest
    assert 0 <= rows[0].digest < 2**64


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "x\xffy"}', r"row: not UTF-8 \(byte 0xff at offset 8 of the line\); save the file as UTF-8"),
        (b'{"a": "x}', r"row: not valid JSON \(Unterminated string .* at column 7\); write one JSON object a line"),
        (b'{"a": 1} {}', r"row: not valid JSON: several objects on one line, the second at column 10; write one"),
        (b'{"a": NaN}', r"row: NaN is not JSON"),
        (b'{"a": -Infinity}', r"row: -Infinity is not JSON"),
        (b"[1, 2]", r"row: a JSON list, not an object"),
        (b'"text"', r"row: a JSON str, not an object"),
        (b'{"a": "\\ud83d"}', r"row: an unpaired surrogate escape"),
        (b'{"a": %s}' % (b"[" * 100_000), r"row: JSON nested too deeply"),
        (b'{"a": %s}' % (b"9" * 5000), r"row: a whole number of more digits than can be read"),
    ],
)
def test_a_line_that_is_no_json_object_says_where_and_what(tmp_path: Path, line: bytes, problem: str) -> None:
    path = _jsonl(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read_records(path)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(bad, BadRow)
    assert re.match(re.escape(f"{path}:2: ") + problem, str(bad)), str(bad)


def test_paired_surrogate_escapes_are_one_character() -> None:
    assert parse_json('"\\ud83d\\ude42"') == "🙂"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.jsonl", content) for content in (b"", b"\n \n", b"\xef\xbb\xbf")),
        *(("a.txt", content) for content in (b"", b"\xef\xbb\xbf")),
        ("a.parquet", b""),
    ],
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty"):
        list(read_records(tmp_path / name))


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\rand a half\ntwo\n")
    (row,) = read_records(path)
    assert isinstance(row, Record)
    assert (row.line, row.value, row.findings) == (1, "one\rand a half\ntwo\n", ())
    path.write_bytes(b"abc\xe4\n")
    assert [str(row) for row in read_records(path)] == [
        f"{path}:1: text: not UTF-8 (byte 0xe4 at offset 3 of the file); save the file as UTF-8"
    ]


def test_parquet_rows_equal_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} é", "messages": [{"role": "user", "content": "x"}]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    read = list(read_records(tmp_path / "a.parquet"))
    assert [row.value for row in read if isinstance(row, Record)] == rows
    assert [row.line for row in read] == list(range(1, 3001))


@pytest.mark.parametrize("use_dictionary", [False, True])
@pytest.mark.parametrize(
    "texts",
    [
        [letter * 10_000 for letter in "abcdefghij" * 20],
        ["a" * 10_000] * 200,
        *([letter * size for letter in "ab" for _ in range(100)] for size in (10, 100_000)),
    ],
    ids=["long", "long and the same", "short", "longer than a batch"],
)
def test_a_batch_of_a_parquet_file_is_few_rows_where_they_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], use_dictionary: bool
) -> None:
    """Also where a text that is in many rows is in the file only once."""
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 50_000)
    path = tmp_path / "a.parquet"
    short = pa.table({"text": ["x"] * 100})
    with pq.ParquetWriter(path, short.schema, use_dictionary=use_dictionary) as writer:
        writer.write_table(short)
        writer.write_table(pa.table({"text": texts}))
    batches = list(parquet._batches(parquet.parquet_file(path), range(2)))
    assert all(batch.num_rows == 1 or batch.nbytes < 60_000 for batch in batches)
    assert batches[0].num_rows == 100, "each row group by itself"
    assert len(batches) >= 2 if len(texts[0]) < 100 else len(batches) > 40
    rows = list(read_records(path))
    assert [row.value for row in rows if isinstance(row, Record)] == [{"text": text} for text in ["x"] * 100 + texts]
    assert [row.line for row in rows] == list(range(1, 301))


def test_a_row_of_a_parquet_file_far_too_long_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    texts = ["a" * (1 << 20), "b" * 1000, "c" * (1 << 20), "d" * ((1 << 20) - 100)]
    pq.write_table(pa.table({"text": texts, "n": range(4)}), path)
    first, second, third, last = read_records(path)
    for row, line in ((first, 1), (third, 3)):
        assert str(row) == f"{path}:{line}: row: more than 1,048,576 bytes; split the row"
    assert [row.value["n"] for row in (second, last) if isinstance(row, Record)] == [1, 3]


def test_a_parquet_file_is_not_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = tmp_path / "a.parquet", []
    words = np.random.default_rng(0).integers(0, 1 << 62, 500_000)  # 4 MB that cannot be compressed
    pq.write_table(pa.table({"n": words}), path, use_dictionary=False)

    class File(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            sizes.append(size)
            return super().read(size)

    opened = pq.ParquetFile
    with File(path) as file:
        monkeypatch.setattr(pq, "ParquetFile", lambda path, **options: opened(file, **options))
        batches = list(parquet._batches(parquet.parquet_file(path), range(1)))
    assert sum(batch.num_rows for batch in batches) == len(words)
    assert max(sizes) <= 2 << 20


def test_a_broken_parquet_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list(read_records(tmp_path / "a.parquet"))


@pytest.mark.parametrize("count", [0, 1, 20, 21, 1000])
def test_the_first_twenty_causes_are_listed_and_the_others_counted(count: int) -> None:
    problems = Problems()
    for line in range(1, count + 1):
        problems.add(BadRow("f.jsonl", line, "row", f"bad {line}; fix it"))
    if not count:
        problems.raise_if_any("hint")
        return
    with pytest.raises(DataError) as error:
        problems.raise_if_any("hint")
    lines = str(error.value).splitlines()
    assert lines[: min(count, 20)] == [f"f.jsonl:{i}: row: bad {i}; fix it" for i in range(1, min(count, 20) + 1)]
    assert lines[20 if count > 20 else count :] == ([f"and {count - 20:,} more"] if count > 20 else []) + ["hint"]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_one_cause_is_told_once_with_the_lines_that_it_hits(parts: int) -> None:
    lines = [*range(1, 21), 22, *range(30, 3030)]
    rows = [BadRow("f.jsonl", line, f"messages[{line}].role", "bad; fix it") for line in lines]
    rows[5] = BadRow("f.jsonl", 6, "row", "worse; fix it")
    whole = Problems()
    for part in range(parts):
        problems = Problems()
        for row in rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]:
            problems.add(row)
        whole.extend(Problems.from_json(json.loads(json.dumps(problems.to_json()))))
    with pytest.raises(DataError) as error:
        whole.raise_if_any()
    assert str(error.value).splitlines() == [
        "f.jsonl:1: messages[1].role: bad; fix it (lines 1-5, 7-20, 22 and 3,000 more)",
        "f.jsonl:6: row: worse; fix it",
    ]


def test_a_few_lines_of_one_cause_are_all_named() -> None:
    problems = Problems()
    for line in (3, 4, 9):
        problems.add(BadRow("f.jsonl", line, "row", "bad"))
    problems.add(BadRow("g.jsonl", 3, "row", "bad"))
    with pytest.raises(DataError) as error:
        problems.raise_if_any()
    assert str(error.value) == "f.jsonl:3: row: bad (lines 3-4 and 9)\ng.jsonl:3: row: bad"


def test_nulls_that_a_columnar_file_adds_are_dropped_within_objects(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"text": "hi"}}]
    table = pa.table({"calls": [[call] for call in calls], "id": [None, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [row.value for row in read_records(tmp_path / "a.parquet") if isinstance(row, Record)]
    assert rows == [{"calls": [calls[0]], "id": None}, {"calls": [calls[1]], "id": 2}]


def test_a_line_far_too_long_costs_no_memory_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.writelines(b"x" * (1 << 20) for _ in range(64))
        file.write(b'"}\n{"a": 3}\n')
    tracemalloc.start()
    first, bad, last = read_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(bad) == (f"{path}:2: row: a line of more than 1,048,576 bytes; end lines with \\n, or split the row")
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert (last.line, last.value, last.end) == (3, {"a": 3}, path.stat().st_size)
    assert peak < 8 << 20, peak  # of a line of 64


def test_a_bad_row_is_one_line_whatever_the_data_says() -> None:
    assert str(BadRow("a\nb.jsonl", 1, "x\x1b[2J", "bad\r\nb.jsonl:2: ok\u202e")) == (
        r"a\nb.jsonl:1: x\x1b[2J: bad\x0d\nb.jsonl:2: ok\u202e"
    )


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, json.dumps({"a": 1}).encode() + b"\n" + b"\xff\n" * 10)
    rows = read_records(path)
    assert isinstance(next(rows), Record)
    path.unlink()  # already open; a reader that had not begun to stream could not go on
    assert len(list(rows)) == 10
