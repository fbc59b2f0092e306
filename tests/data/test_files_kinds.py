"""The same rows come out of a file of any kind, compressed or not, whatever its name says."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pertoken.data.store.parts
from pertoken.data.files.kinds import FileKind, kind_of
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.store.parts import scan
from pertoken.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "[one] {two}", "completion": 'a "quoted" \\ text,\nof two lines'},
    {"prompt": "é🙂天", "completion": "x" * 500},
    {"prompt": "three", "completion": "drei"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def table(rows: list[dict[str, Any]], kind: str) -> bytes:
    """As an Arrow IPC file or stream, two rows a batch, or as Parquet."""
    columns, out = pa.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        pq.write_table(columns, out)
        return out.getvalue()
    with (pa.ipc.new_stream if kind == "arrow_stream" else pa.ipc.new_file)(out, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=2)
    return out.getvalue()


def separated(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
SUFFIX = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "zstd": ".zst"}
CONTENT = {
    "jsonl": LINES,
    "json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    "csv": separated(ROWS, ","),
    "tsv": separated(ROWS, "\t"),
    "parquet": table(ROWS, "parquet"),
    "arrow_file": table(ROWS, "arrow_file"),
    "arrow_stream": table(ROWS, "arrow_stream"),
}
BY_NAME = ("csv", "tsv")  # their content might be any text


def in_parts(path: Path) -> list[Record | BadRow]:
    """As a build reads a file: in parts, whose hashes are checked."""
    return [row for part in scan([path])[1] for span in part for row in read_records(path, span)]


def rows_of(path: Path) -> list[Any]:
    read = list(read_records(path))
    assert all(isinstance(row, Record) for row in read), read
    assert in_parts(path) == read
    ends = [row.end for row in read if isinstance(row, Record)]
    assert ends == sorted(ends)
    assert path.stat().st_size - 8 <= ends[-1] <= path.stat().st_size
    return [row.value for row in read if isinstance(row, Record)]


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name", ["a.", "a.txt", "a", "a.jsonl", "a.json", "a.weird", "a.parquet", "a.csv", "a.arrow"])
@pytest.mark.parametrize("kind", CONTENT)
def test_rows_are_the_same_under_any_name(tmp_path: Path, kind: str, name: str, bom: bool) -> None:
    name = f"a.{kind.split('_')[0]}" if name == "a." or kind in BY_NAME else name
    if bom and kind not in ("jsonl", "json", "csv", "tsv"):
        return
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * bom + CONTENT[kind])
    assert kind_of(tmp_path / name).format == kind
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_rows_are_the_same_compressed(tmp_path: Path, kind: str, compression: str, suffix: bool) -> None:
    path = tmp_path / (f"a.{kind}" + SUFFIX[compression] * suffix)
    path.write_bytes(COMPRESS[compression](CONTENT[kind]))
    assert kind_of(path) == FileKind(kind, compression)  # type: ignore[arg-type]
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
def test_files_that_were_compressed_one_after_another_are_one(tmp_path: Path, compression: str) -> None:
    """As `cat a.gz b.gz` and parallel compressors write them."""
    compress = COMPRESS[compression]
    path = tmp_path / "a.jsonl"
    path.write_bytes(compress(LINES) + compress(LINES[:20]) + compress(LINES[20:]))
    assert rows_of(path) == ROWS * 2


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "changed", "followed"])
def test_a_damaged_compressed_file_is_an_error_of_the_file(tmp_path: Path, compression: str, damage: str) -> None:
    lines = b"".join(b'{"a": %d}\n' % (i * 7919 % 10007) for i in range(20_000))
    whole = COMPRESS[compression](lines)
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:-9],
        "changed": whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 9]) + whole[middle + 9 :],
        "followed": whole + b"more bytes",
    }[damage]
    path = tmp_path / f"a.jsonl{SUFFIX[compression]}"
    path.write_bytes(damaged)
    if damage == "followed" and compression in ("bzip2", "xz"):  # what follows is not noticed by the library
        return
    with pytest.raises(DataError, match=rf"a\.jsonl\.\w+: not a whole {compression} file \(.*\): cut short or damaged"):
        in_parts(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv", "a.arrow", "a.txt.gz"])
def test_a_file_that_changes_while_it_is_prepared_is_refused(tmp_path: Path, name: str) -> None:
    contents = {
        "a.jsonl.gz": [gzip.compress(LINES, mtime=0), gzip.compress(LINES.replace(b"three", b"seven"), mtime=0)],
        "a.json": [CONTENT["json"], CONTENT["json"].replace(b"three", b"seven")],
        "a.csv": [CONTENT["csv"], CONTENT["csv"].replace(b"three", b"seven")],
        "a.arrow": [CONTENT["arrow_stream"], CONTENT["arrow_stream"].replace(b"three", b"seven")],
        "a.txt.gz": [gzip.compress(b"abc", mtime=0), gzip.compress(b"abd", mtime=0)],
    }
    path = tmp_path / name
    path.write_bytes(contents[name][0])
    _, ((span,),) = scan([path])
    path.write_bytes(contents[name][1])
    assert contents[name][0] != contents[name][1]
    with pytest.raises(DataError, match="changed while it was being prepared, so nothing was stored; run again"):
        list(read_records(path, span))


def test_only_json_lines_and_parquet_are_cut_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (10, 10))
    for kind in ("jsonl", "json", "csv", "arrow_file"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(CONTENT[kind])
        assert len(scan([path])[1]) == (3 if kind == "jsonl" else 1), kind


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.txt", b'{"a": 1}\n{"a": 2}\n', "jsonl"),
        ("a.txt", b'{"a": 1}\nand more text\n', "text"),
        ("a.txt", b"{ braces } to begin with\n", "text"),
        ("a.txt", b"[1] Notes\n", "text"),
        ("a.txt", b"[Illustration]\n\nAlice", "text"),
        ("a.py", b"x = {}\n", "text"),
        ("a.md", b"a,b\n1,2\n", "text"),
        ("a", b'  \n{"a": 1}', "jsonl"),
        ("a", b'{\n  "a": 1\n}\n', "json"),
        ("a.jsonl", b'{\n  "a": 1\n}\n', "json"),
        ("a.jsonl", b'{"a": 1,\n "b": 2}\n', "json"),
        ("a.jsonl", b'{"a": 1,\n{"a": 2}\n', "jsonl"),
        ("a.jsonl", b'{"a": "1\n', "jsonl"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "jsonl"),
        ("a.json", b'[{"a": 1}]', "json"),
        ("a.json", b'[{"a": 1}]\n', "json"),
        ("a.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', "jsonl"),
        ("a.json", b"hello", "jsonl"),
        ("a.csv", b'{"a": 1}\n{"a": 2}\n', "jsonl"),
        ("a.csv", b"[a],b\n1,2\n", "csv"),
        ("a.TSV", b"a\tb\n", "tsv"),
    ],
)
def test_what_a_file_is(tmp_path: Path, name: str, content: bytes, format: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name).format == format


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.7\n", "a PDF; convert it to text first, for example with pdftotext"),
        ("a.txt", b"%PDF-1.7\n\xff", "a PDF; convert"),
        ("a.docx", b"PK\x03\x04x", "a Word document; convert it to text first, for example with pandoc"),
        ("a.xlsx", b"PK\x03\x04x", "a spreadsheet; save it as .csv (CSV UTF-8) first"),
        ("a.zip", b"PK\x03\x04\xff\0", "a ZIP archive; unpack it and name the files in it"),
        ("a.rtf", b"{\\rtf1 Hello}", "a rich text document; convert"),
        (
            "a.tar.gz",
            gzip.compress(b"a.txt" + b"\0" * 252 + b"ustar\0" + b"\0" * 300, mtime=0),
            "a tar archive; unpack",
        ),
        ("a", b"\x80\x04\x95\x00", "a Python pickle, which can run code"),
        ("a.bin", b"abc\0def", "binary data (a NUL byte at offset 3); give .jsonl, .json"),
        ("a.dat", b"caf\xe9 au lait", "neither UTF-8 text nor anything else that can be read; give"),
        ("a.parquet.gz", gzip.compress(CONTENT["parquet"], mtime=0), "a compressed parquet file; decompress it first"),
    ],
)
def test_a_file_that_is_no_data_is_named_with_the_next_step(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[]"),
        ("a.json", b" [ \n] "),
        ("a.csv", b""),
        ("a.csv", b"text\n"),
        ("a.csv", b"\n\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json.xz", lzma.compress(b"\n")),
        ("a.arrow", b""),
        ("a.arrow", table([{"a": 1}], "arrow_stream")[:0] + table([], "arrow_stream")),
        ("a", b""),
    ],
)
def test_a_file_without_a_row_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty; remove it from data\.path or fill it"):
        list(read_records(path))
    with pytest.raises(DataError, match=rf"{name}: empty; remove it from data\.path or fill it"):
        in_parts(path)


@pytest.mark.parametrize("kind", ["arrow_file", "arrow_stream"])
def test_a_damaged_arrow_file_is_an_error_of_the_file(tmp_path: Path, kind: str) -> None:
    content = CONTENT[kind]
    for cut in (20, len(content) // 2, len(content) - 300):
        (tmp_path / "a.arrow").write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file"):
            list(read_records(tmp_path / "a.arrow"))


def test_rows_of_arrow_are_numbered_over_its_batches(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(table([{"a": i} for i in range(7)], "arrow_file"))
    assert [row.line for row in read_records(tmp_path / "a.arrow")] == list(range(1, 8))
