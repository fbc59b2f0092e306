"""A text file that is read in blocks is the same text, row and samples as one that is read whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pertoken.data.files.limits
import pertoken.data.files.long_text
import pertoken.data.files.text
import pertoken.data.samples
import pertoken.data.tokens.cuts
import pertoken.data.tokens.train
from pertoken.data.files.long_text import BOM, LongText, Window, one_of
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.train import train_tokenizer
from pertoken.errors import DataError
from pertoken.recipe.data import DataConfig

CONTENTS = st.lists(
    st.sampled_from(
        [
            *("é🙂天".encode(), b"abc ", b"\r\n", BOM),
            *(b"\0", b"\xff", b"\xff\xfe", "🙂".encode()[:2], b"\x80", b"\xed\xa0"),
        ]
        + [b"words and more"] * 12
    ),
    max_size=12,
).map(b"".join)
TEXT = "The quick brown fox jumps over the lazy dog. 12,345 Stück, 今天天气很好 🙂.\r\n"


def _long(path: Path, content: str, *, bom: bool = False) -> LongText:
    raw = (BOM if bom else b"") + content.encode()
    path.write_bytes(raw)
    return LongText(str(path), hashlib.sha256(raw).hexdigest(), 0, len(content))


def _rows(path: Path) -> object:
    try:
        rows = list(read_records(path))
    except DataError as error:
        return str(error)
    return [
        row if isinstance(row, BadRow) else (row.file, row.line, str(row.value), row.digest, row.end) for row in rows
    ]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS, block=st.integers(1, 9), bom=st.booleans())
def test_a_row_read_in_blocks_is_the_row_or_the_message_of_one_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block: int, bom: bool
) -> None:
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(BOM * bom + content)
    monkeypatch.setattr(pertoken.data.files.limits, "LONG_BYTES", 1 << 30)
    whole = _rows(path)
    monkeypatch.setattr(pertoken.data.files.limits, "LONG_BYTES", -1)
    assert _rows(path) == whole


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    places=st.tuples(*[st.floats(0, 1)] * 4),
    block=st.integers(1, 20),
    bom=st.booleans(),
)
def test_parts_windows_and_searches_are_those_of_the_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    places: tuple[float, ...],
    block: int,
    bom: bool,
) -> None:
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
    start, stop, one, two = (int(place * len(content)) for place in (*sorted(places[:2]), *sorted(places[2:])))
    long = pickle.loads(pickle.dumps(_long(tmp_path / "a.txt", content, bom=bom or content.startswith("\ufeff"))))
    part, expected = long.part(start, stop), content[start:stop]
    assert (str(part), len(part)) == (expected, len(expected))
    assert "".join(part.blocks()) == expected
    assert all(part.blocks())
    inner, other = expected[one:two], content[one:two]
    if expected:
        assert one_of(part, ["no such text, by far", inner]) == inner
        assert (one_of(part, [other]) is None) == (other not in expected)
    window = Window(part)
    for at in range(len(expected) + 1):
        window.move(max(0, at - 2), at + 5)
        assert window.text(max(0, at - 2), at + 5) == expected[max(0, at - 2) : at + 5]
        assert len(window.held) <= 7 + max(block, 3)


def test_cutting_and_encoding_a_file_holds_a_little_of_it(tmp_path: Path, bpe_tokenizer: Any) -> None:
    """32 MB of bytes, and as many again as text, would be held whole."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode() * (33_600_000 // len(TEXT.encode())))
    encoder = Encoder(bpe_tokenizer)
    tracemalloc.start()
    (row,) = read_records(path)
    assert isinstance(row, Record)
    assert isinstance(row.value, LongText)
    reading = tracemalloc.get_traced_memory()[1]
    first = next(encoder.pieces(row.value))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first.tokens) > 10_000
    assert reading < 16 << 20, reading
    assert peak < 28 << 20, peak


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A call of it: texts of more than so many bytes are read in blocks. Pieces are small throughout."""
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_PIECE_CHARS", 100)
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_LONGEST_CHARS", 1500)
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_LEAST_WINDOW", 64)
    monkeypatch.setattr(pertoken.data.samples, "_CHUNK_CHARS", 1000)
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", 61)
    return lambda size: monkeypatch.setattr(pertoken.data.files.limits, "LONG_BYTES", size)


def _files(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    texts = {"a": TEXT * 300, "b": "short", "c": "天" * 5000 + "x", "d": "gattaca" * 900, "e": TEXT * 40}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes((BOM if name == "d" else b"") + text.encode())
    return sorted(folder.iterdir())


def _build(files: list[Path], cache: Path, tokenizer: Any, **data: Any) -> Store:
    names = [str(file) for file in files]
    config = DataConfig.model_validate(
        {"path": names, "store": str(cache), "max_seq_len": 64, "workers": 1, "format": "text", **data}
    )
    return build_store(names, stage="pretrain", tokenizer=tokenizer, data=config)


@pytest.mark.parametrize("data", [{}, {"eval_split": "tail", "eval_fraction": 0.4}])
def test_a_store_made_in_blocks_is_the_store_made_whole(
    tmp_path: Path, bpe_tokenizer: Any, small: Callable[[int], None], data: dict[str, Any]
) -> None:
    files = _files(tmp_path / "data")
    small(1 << 30)
    whole = _build(files, tmp_path / "whole", bpe_tokenizer, **data)
    small(500)
    made = _build(files, tmp_path / "made", bpe_tokenizer, **data)
    assert made.fingerprint == whole.fingerprint
    assert len(made) == len(whole)
    assert made.report.notes() == whole.report.notes()
    sides = [store.split(0.4, "tail") if data else [store] for store in (made, whole)]
    for one, other in zip(*sides, strict=True):
        np.testing.assert_array_equal(one.num_bytes, other.num_bytes)
        for i in range(len(other)):
            assert one.where(i) == other.where(i)
            np.testing.assert_array_equal(one[i].tokens, other[i].tokens)
            np.testing.assert_array_equal(one[i].loss_mask, other[i].loss_mask)


def test_a_file_without_a_place_to_cut_is_a_bad_row_before_a_sample_is_made_of_it(
    tmp_path: Path, bpe_tokenizer: Any, small: Callable[[int], None]
) -> None:
    small(500)
    files = _files(tmp_path / "data")
    files[2].write_text(TEXT * 30 + " " * 2000 + "end", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.txt:1: text: 1,500 characters after character [\d,]+ without a known"):
        _build(files, tmp_path / "cache", bpe_tokenizer)
    store = _build(files, tmp_path / "cache", bpe_tokenizer, on_bad_row="skip")
    assert store.report.skipped == 1
    assert {Path(store.where(i)).name for i in range(len(store))} == {f"{name}.txt:1" for name in "abde"}


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "other words": lambda raw: raw[:-100] + raw[-100:].replace(b"lazy", b"wise"),
    "shorter": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\n",
    "not UTF-8": lambda raw: raw[:9000] + b"\xff" + raw[9001:],
    "no place to cut": lambda raw: raw[:3000].rpartition(b"lazy")[0] + b" " * (len(raw) - 3000),
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("moment", ["look_through", "find"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_its_readings_is_refused(
    tmp_path: Path,
    bpe_tokenizer: Any,
    small: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    change: str,
) -> None:
    """Even where bad rows are skipped, which such a file is none of."""
    small(500)
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode() * 200)

    def then_change(found: Any) -> Any:
        before = path.stat()
        path.write_bytes(CHANGES[change](path.read_bytes()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return found

    if moment == "look_through":
        look_through = pertoken.data.files.text.look_through
        monkeypatch.setattr(pertoken.data.files.text, "look_through", lambda path: then_change(look_through(path)))
    else:
        find = pertoken.data.tokens.cuts.Cuts.find
        monkeypatch.setattr(
            pertoken.data.tokens.cuts.Cuts, "find", lambda self, text: then_change(list(find(self, text)))
        )
    with pytest.raises(DataError, match=f"^{path}: changed while it was being prepared, so nothing was stored; run"):
        _build([path], tmp_path / "cache", bpe_tokenizer, on_bad_row="skip")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name != "hashes.json"]


def test_a_file_that_cannot_be_read_again_is_one_line(
    tmp_path: Path, bpe_tokenizer: Any, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(500)
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode() * 200)
    find = pertoken.data.tokens.cuts.Cuts.find

    def then_remove(self: Any, text: Any) -> Any:
        found = list(find(self, text))
        path.unlink()
        return found

    monkeypatch.setattr(pertoken.data.tokens.cuts.Cuts, "find", then_remove)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read \(No such file or directory\)"):
        _build([path], tmp_path / "cache", bpe_tokenizer)


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 400), ("char", None)])
def test_a_tokenizer_trained_on_a_file_in_blocks_is_the_one_trained_on_it_whole(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, kind: Any, vocab_size: int | None
) -> None:
    monkeypatch.setattr(pertoken.data.tokens.train, "_PIECE_CHARS", 200)
    monkeypatch.setattr(pertoken.data.tokens.train, "_LONGEST_PIECE_CHARS", 600)
    path = tmp_path / "a.txt"
    path.write_bytes((TEXT + "".join(f"word{i} " for i in range(9)) + "\n").encode() * 30)
    for name, size in (("whole", 1 << 30), ("made", 100)):
        small(size)
        train_tokenizer([path], vocab_size=vocab_size, kind=kind, out_dir=tmp_path / name)
    made, whole = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("made", "whole"))
    assert made == whole


def test_a_long_line_is_handed_to_the_trainer_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", 50)
    monkeypatch.setattr(pertoken.data.tokens.train, "_PIECE_CHARS", 200)
    monkeypatch.setattr(pertoken.data.tokens.train, "_LONGEST_PIECE_CHARS", 600)
    for text in ("a word, " * 500, "天" * 2000, "x"):
        pieces = list(pertoken.data.tokens.train._pieces(_long(tmp_path / "a.txt", text)))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 600
        assert all(piece.endswith(" ") for piece in pieces[:-1]) or " " not in text
