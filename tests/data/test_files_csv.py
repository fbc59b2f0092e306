"""A table's rows are what its writer meant: cells of several lines, quotes, what is missing, and where each row is."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken.data.files import limits
from pertoken.data.files.records import Record, read_records
from pertoken.errors import DataError

_CELLS = st.text(st.sampled_from('ab",;\t\n é🙂\r'), max_size=6)


def _read(path: Path, content: bytes) -> list[tuple[int, Any]]:
    path.write_bytes(content)
    return [
        (row.line, row.value if isinstance(row, Record) else f"{row.field}: {row.problem}")
        for row in read_records(path)
    ]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_CELLS, _CELLS), min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_the_rows_of_a_table_are_those_that_it_was_written_of(
    tmp_path: Path, rows: list[tuple[str, str]], end: str
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["first", "second"])
    lines = []
    for row in rows:
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    expected = [{name: cell for name, cell in zip(("first", "second"), row, strict=True) if cell} for row in rows]
    if not any("\r" in cell.replace("\r\n", "") for row in rows for cell in row):  # which the library counts as a line
        assert [line for line, _ in _read(tmp_path / "a.csv", out.getvalue().encode())] == lines
    assert [value for _, value in _read(tmp_path / "a.csv", out.getvalue().encode())] == expected


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"a,b\n1,2\n", [(2, {"a": "1", "b": "2"})]),
        (b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4", [(2, {"a": "1", "b": "2"}), (4, {"a": "3", "b": "4"})]),
        (b'\n\na,b\n"x\ny",2\n3,\n', [(4, {"a": "x\ny", "b": "2"}), (6, {"a": "3"})]),
        (b"a;b\n1;2,5\n", [(2, {"a": "1", "b": "2,5"})]),
        (b"a\tb\n1\t2\n", [(2, {"a": "1", "b": "2"})]),
        (b",text\n0,one\n1,two\n", [(2, {"column 1": "0", "text": "one"}), (3, {"column 1": "1", "text": "two"})]),
        (b"text\none\n", [(2, {"text": "one"})]),
        (b' a , b \n1," 2"\n', [(2, {"a": "1", "b": " 2"})]),
    ],
)
def test_headers_blank_lines_delimiters_and_empty_cells(
    tmp_path: Path, content: bytes, rows: list[tuple[int, Any]]
) -> None:
    assert _read(tmp_path / "a.csv", content) == rows


def test_a_tsv_is_cut_at_tabs_alone(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.tsv", b"a,b\tc\n1,2\t3\n") == [(2, {"a,b": "1,2", "c": "3"})]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b"1,2,3", r"row: 3 cells, the header has 2; put a cell with a comma or newline in it in quotes"),
        (b"1", r"row: 1 cells, the header has 2"),
        (b"caf\xe9,2", r'a: not UTF-8 \(byte 0xe9\); save the file as UTF-8 \("CSV UTF-8" in a spreadsheet\)'),
        (b'"a"b,2', r"row: text behind a closing quote; double each quote within a cell"),
        (b"1\r2,3", r"row: a carriage return without a newline; end lines with \\n"),
    ],
)
def test_a_bad_row_says_where_and_what_and_those_around_it_are_read(tmp_path: Path, row: bytes, problem: str) -> None:
    first, (line, found), last = _read(tmp_path / "a.csv", b"a,b\n1,1\n" + row + b"\n3,3\n")
    assert (first, line, last) == ((2, {"a": "1", "b": "1"}), 3, (4, {"a": "3", "b": "3"}))
    assert re.match(problem, found), found


def test_a_quote_that_is_not_closed_is_named_where_it_is_opened(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.csv", b'a,b\n1,1\n2,"two\n3,3\n') == [
        (2, {"a": "1", "b": "1"}),
        (3, "row: a quote that is not closed; close it, or double each quote within a cell"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", r"a\.csv:1: header: columns named twice: a; rename them"),
        (
            b"\n" + b"x" * 300 + b",b\n1,2\n",
            r"a\.csv:2: header: column 1 of the first line is no name but a text; write",
        ),
        (b'"one\ntwo",b\n1,2\n', r"a\.csv:1: header: column 1 of the first line is no name but a text"),
        (b"caf\xe9,b\n1,2\n", r"a\.csv:1: header: not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
    ],
)
def test_a_first_line_that_names_no_columns_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _read(tmp_path / "a.csv", content)


def test_a_table_in_utf16_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: header: not UTF-8 but UTF-16, by its byte order mark; save the"):
        _read(tmp_path / "a.csv", "a,b\n1,2\n".encode("utf-16"))


def test_a_line_far_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match=r"a\.csv:3: a line of more than 1,000 bytes; end lines with \\n, or split"):
        _read(tmp_path / "a.csv", b"a,b\n1,2\n" + b"x" * 1001 + b",3\n")


def test_a_cell_may_be_longer_than_the_library_s_own_limit(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.csv", b"a\n" + b"x" * 200_000 + b"\n")[0][1] == {"a": "x" * 200_000}
