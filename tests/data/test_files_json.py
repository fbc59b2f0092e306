"""A JSON array is cut into its rows exactly, says where each one is, and takes no memory that grows with it."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken.data.files import limits
from pertoken.data.files.json_array import _Text
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.errors import DataError

_TEXTS = st.text(st.sampled_from('ab"\\[]{},:\n\t é🙂\u2028/'), max_size=8)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9999) | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=8,
)
_ROWS = st.lists(st.dictionaries(_TEXTS, _VALUES, max_size=3), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_ROWS, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans(), block=st.integers(1, 40))
def test_the_rows_of_an_array_are_those_that_it_was_written_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    """Whatever its texts hold, and wherever a block that is read ends."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    path, text = tmp_path / "a.json", json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_text(f" {text}\n", encoding="utf-8")
    read = list(read_records(path))
    assert [row.value for row in read if isinstance(row, Record)] == rows
    lines = path.read_text(encoding="utf-8").split("\n")
    if indent is None or (len(rows) > 1 and read[1].line == 2 and not lines[1].startswith(("{", " "))):
        assert [row.line for row in read] == list(range(1, len(rows) + 1))
    else:
        assert all(lines[row.line - 1].lstrip().startswith(("{", "[{")) for row in read)


def _read(path: Path, content: bytes) -> list[tuple[int, Any]]:
    path.write_bytes(content)
    return [
        (row.line, row.value if isinstance(row, Record) else f"{row.field}: {row.problem}")
        for row in read_records(path)
    ]


def test_rows_are_named_by_their_lines_or_where_they_share_one_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert _read(path, b'[\n{"a":\n1},\n\n{"a": 2}\n]') == [(2, {"a": 1}), (5, {"a": 2})]
    assert _read(path, b'[{"a": 1},\n {"a": 2}, {"a": 3}]') == [(1, {"a": 1}), (2, {"a": 2}), (2, {"a": 3})]
    assert _read(path, b'\n\n[{"a": 1}, {"a": 2},\n{"a": 3}]') == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]
    assert _read(path, b'\r\n\r\n[{"a": 1}]') == [(3, {"a": 1})]


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.json", b'{\n  "a": [\n 1]\n}\n') == [(1, {"a": [1]})]


def test_items_that_are_lists_of_objects_or_of_lists_come_through(tmp_path: Path) -> None:
    rows = [[{"role": "user"}, {"role": "assistant"}], [["question", "answer"]]]
    assert [value for _, value in _read(tmp_path / "a.json", json.dumps(rows).encode())] == rows
    assert [value for _, value in _read(tmp_path / "a.jsonl", b'[{"a": 1}]\n[["q", "a"]]\n')] == [
        [{"a": 1}],
        [["q", "a"]],
    ]


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (b'{"a": NaN}', r"row: NaN is not JSON; write an array of JSON objects"),
        (b'{"a": 1, "a": 2}', r"row: the key 'a' twice in one object"),
        (b'{"a": "\\ud800"}', r"row: an unpaired surrogate escape"),
        (b'{"a": "x\xffy"}', r"row: not UTF-8 \(byte 0xff at offset 8 of the row\); save the file as UTF-8"),
        (b'{"a": 1e999}', r"row: the number 1e999 is too large"),
        (b'{"a": 1,}', r"row: not valid JSON: a comma at column 8 with nothing behind it; remove it"),
        (b'{"a": [1,\n2,]}', r"row: not valid JSON: a comma in its line 2 with nothing behind it; remove it"),
        (b"{'a': 1}", r"row: not valid JSON: single quotes at column 2, as Python prints a dict"),
        (b'{"a": None}', r"row: not valid JSON: Python's None at column 7; write null"),
        (b'{"a": "two\nlines"}', r"row: not valid JSON \(Invalid control character at at column 11\)"),
        (b'{"a": "no end}', r"row: not valid JSON"),
        (b"5", r"row: a JSON int, not an object; write an array of JSON objects"),
        (b'"text, and [more"', r"row: a JSON str, not an object"),
        (b"[1, 2]", r"row: a JSON list, not an object"),
        (b"null", r"row: a JSON NoneType, not an object"),
        (b"nonsense}", r"row: not valid JSON \(Expecting value at column 1\)"),
    ],
)
def test_a_bad_item_says_where_and_what_and_those_around_it_are_read(tmp_path: Path, item: bytes, problem: str) -> None:
    first, (line, found), last = _read(tmp_path / "a.json", b'[\n{"b": 1},\n' + item + b',\n{"b": 3}\n]\n')
    assert (first, line) == ((2, {"b": 1}), 3)
    assert re.match(problem, found), found
    assert last == (4 + item.count(b"\n"), {"b": 3})


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (b'[\n{"a": 1},\n{"a": 2', 3, r"row: the file ends within this row: it was cut short"),
        (b'[\n{"a": 1},\n{"a": "2', 3, r"row: the file ends within this row: it was cut short"),
        (b'[\n{"a": 1},\n', 3, r"row: the file ends before the array's \]: it was cut short"),
        (b'[\n{"a": 1}\n', 3, r"row: the file ends before the array's \]: it was cut short"),
        (b'[\n{"a": 1},\n]', 3, r"row: a comma behind the last row; remove it"),
        (b'[\n{"a": 1},,\n{"a": 2}]', 2, r"row: a comma without a row before it; remove it"),
        (b'[\n{"a": 1}\n{"a": 2}\n]', 3, r"row: no comma before it; write one between any two rows"),
        (b"[\n{\"a\": 1},\n{'a': 'it\"s'}\n]", 3, r"row: not valid JSON: single quotes at column 2"),
    ],
)
def test_what_is_wrong_between_rows_is_named_too(tmp_path: Path, content: bytes, line: int, problem: str) -> None:
    first, (where, found), *_ = _read(tmp_path / "a.json", content)
    assert first == (2, {"a": 1})
    assert where == line
    assert re.match(problem, found), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a":\n1}]\n[{"a": 2}]', r"a\.json:3: more text behind the array; put all rows into one array"),
        (b'[{"a": 1}]]', r"a\.json:1: more text behind the array"),
        (
            b'{\n"a": 1\n}\n{\n"a": 2\n}\n',
            r"a\.json:4: another object; write one object a line, or put them into one JSON",
        ),
    ],
)
def test_text_behind_the_end_is_an_error_of_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _read(tmp_path / "a.json", content)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1}{"a": 2}', "not valid JSON: several objects on one line, the second at column 9; write one JSON"),
        (b'{"a": 1}, {"a": 2}', "not valid JSON (Extra data at column 9); write one JSON object a line"),
        (b"{", "not valid JSON: one object over several lines; write one JSON object a line, or put them into one"),
        (b'  "a": 1,', "not valid JSON: one object over several lines"),
        (b'"a": [', "not valid JSON: one object over several lines"),
        (b"},", "not valid JSON: one object over several lines"),
        (b'{"a": [1,', "not valid JSON: one object over several lines"),
        (b"{'a': 1}", "not valid JSON: single quotes at column 2, as Python prints a dict; write the row with json"),
        (b'{"a": True}', "not valid JSON: Python's True at column 7; write true, or the row with json.dumps"),
        (b'{"a": 1,}', "not valid JSON: a comma at column 8 with nothing behind it; remove it"),
        (b'{"a": [1, 2, ]}', "not valid JSON: a comma at column 12 with nothing behind it; remove it"),
        (
            b'{"a": "it\'s}',
            "not valid JSON (Unterminated string starting at at column 7); write one JSON object a line",
        ),
        (b'{"a" 1}', "not valid JSON (Expecting ':' delimiter at column 6); write one JSON object a line"),
        (b'{"a": 1}\0', "not valid JSON (Extra data at column 9); there are NUL bytes in it: save the file as UTF-8"),
    ],
)
def test_the_mistake_of_a_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    _, (where, found), _ = _read(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert where == 2
    assert found.startswith(f"row: {problem}"), found


def test_a_row_far_too_long_is_an_error_and_not_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b'[{"a": 1},\n{"a": "')
        file.writelines(b"x" * (1 << 20) for _ in range(30))
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"a\.json:2: a row of more than 1,048,576 bytes, or a bracket or quote is miss"
    ):
        list(read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 << 20, peak


@pytest.mark.parametrize("megabytes", [4, 16])
def test_an_array_takes_no_more_memory_the_longer_it_is(tmp_path: Path, megabytes: int) -> None:
    path = tmp_path / "a.json"
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 900}]}, indent=1).encode()
    with path.open("wb") as file:
        file.write(b"[\n")
        file.writelines(row + b",\n" for _ in range(megabytes * 1000))
        file.write(b"{}]")
    tracemalloc.start()
    count = sum(isinstance(row, Record) for row in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == megabytes * 1000 + 1
    assert peak < 7 << 20, peak


def test_what_is_taken_is_counted_in_bytes_and_lines(tmp_path: Path) -> None:
    text = _Text(tmp_path / "a.json", io.BytesIO(b'\xef\xbb\xbf \n {"a":\n1} x'))
    assert text.look() == b"{"
    assert (text.line, text.consumed) == (2, 6)
    assert text.cut() == (b'{"a":\n1}', True)
    assert (text.line, text.consumed, text.look()) == (3, 14, b"x")


def test_bad_rows_of_an_array_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, 2]')
    good, bad = read_records(tmp_path / "a.json")
    assert isinstance(good, Record)
    assert isinstance(bad, BadRow)
    assert str(bad).startswith(f"{tmp_path}/a.json:2: row: a JSON int")
