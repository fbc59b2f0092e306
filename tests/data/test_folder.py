"""A store that is not what was written is found at a start, and made again; and data is not read without need."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pertoken.data.files.hashes
import pertoken.data.store.build
import pertoken.data.store.folder
import pertoken.data.store.key
import pertoken.data.store.sums
from pertoken.data.files.hashes import recall, remember, see
from pertoken.data.store.build import build_store, open_store
from pertoken.data.store.columns import Columns
from pertoken.data.store.store import Store
from pertoken.data.store.sums import SummedFile, damaged_block
from pertoken.errors import DataError
from pertoken.recipe.data import DataConfig

WriteJsonl = Callable[..., Path]


def _build(path: Path, tokenizer: Any, told: list[str] | None = None, **options: Any) -> Store:
    data = _config(path)
    tell = told.append if told is not None else lambda text: None
    return build_store(data.path, stage="pretrain", tokenizer=tokenizer, data=data, on_message=tell, **options)


def _config(path: Path) -> DataConfig:
    return DataConfig.model_validate({"path": [str(path)], "store": str(path.parent / "cache"), "on_bad_row": "skip"})


def _folder(path: Path) -> Path:
    (folder,) = (found for found in (path.parent / "cache").iterdir() if found.is_dir())
    return folder


def _rows(count: int) -> list[Any]:
    return ['{"text": 1}', *[{"text": f"The quick brown fox {i}"} for i in range(count)]]


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["samples.arrow", "store.json", "skipped.txt"])
def test_any_byte_of_a_small_store_that_changes_is_found_at_the_next_start(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, name: str
) -> None:
    path = write_jsonl("a.jsonl", _rows(20))
    first = _build(path, bpe_tokenizer)
    tokens = [first[i].tokens.tolist() for i in range(len(first))]
    file = _folder(path) / name
    whole = file.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 15).astype(int).tolist():
        _flip(file, at)
        told: list[str] = []
        store = _build(path, bpe_tokenizer, told)
        assert not store.report.hit, f"byte {at}"
        assert [line.split(": a damaged token store (")[0] for line in told] == [str(_folder(path))]
        assert name in told[0]
        assert told[0].endswith("; making it again from the data")
        assert file.read_bytes() == whole
        assert [store[i].tokens.tolist() for i in range(len(store))] == tokens
    assert _build(path, bpe_tokenizer).report.hit


@pytest.mark.parametrize("name", ["samples.arrow", "store.json", "skipped.txt"])
def test_a_store_without_one_of_its_files_is_named_and_made_again(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, name: str
) -> None:
    path, told = write_jsonl("a.jsonl", _rows(3)), []  # type: ignore[var-annotated]
    _build(path, bpe_tokenizer)
    (_folder(path) / name).unlink()
    assert not _build(path, bpe_tokenizer, told).report.hit
    assert told == [f"{_folder(path)}: a damaged token store ({name} is missing); making it again from the data"]
    assert _build(path, bpe_tokenizer).report.hit


def test_a_start_reads_few_blocks_of_a_large_store_and_verifying_reads_all(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pertoken.data.store.sums, "_BLOCK_BYTES", 64)
    path, told = write_jsonl("a.jsonl", _rows(400)), []  # type: ignore[var-annotated]
    store = _build(path, bpe_tokenizer)
    file = _folder(path) / "samples.arrow"
    at = file.read_bytes().index(store[200].tokens[1:20].tobytes())
    assert len(json.loads((_folder(path) / "store.json").read_text())["sums"]["samples"]["blocks"]) > 8 * 500
    _flip(file, at)
    hits = [_build(path, bpe_tokenizer).report.hit for _ in range(3)]
    assert True in hits, "one block in hundreds: a sample of 16 misses it nearly always"
    if not all(hits):  # found by chance, and so made again
        _flip(file, at)
    assert not _build(path, bpe_tokenizer, told, verify_data=True).report.hit
    assert f"samples.arrow differs from its checksum in the MiB from byte {at // 64 * 64:,}" in told[0]
    assert _build(path, bpe_tokenizer, verify_data=True).report.hit


def test_the_blocks_that_are_read_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.store.sums, "_BLOCK_BYTES", 8)
    path = tmp_path / "file"
    with path.open("wb") as file:
        summed = SummedFile(file)
        for size in (0, 1, 7, 8, 9, 400, 3):
            summed.write(b"x" * size)
    assert path.read_bytes() == b"x" * 428
    assert damaged_block(path, summed.sums, full=True) is None
    _flip(path, 101)
    found = [damaged_block(path, summed.sums, full=False) for _ in range(60)]
    assert None in found, "54 blocks, of which 18 are read"
    assert "file differs from its checksum in the MiB from byte 96" in found
    assert damaged_block(path, summed.sums, full=True) is not None
    for content in (b"", path.read_bytes()[:-1], path.read_bytes() + b"x"):
        path.write_bytes(content)
        assert damaged_block(path, summed.sums, full=False) == f"file has {len(content):,} bytes, not 428"


def test_every_number_of_every_sample_is_checked_at_a_start(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the store is: only tokens and masks are left to chance."""
    monkeypatch.setattr("pertoken.data.store.columns._BATCH_ROWS", 7)
    path = write_jsonl("a.jsonl", _rows(40))
    _build(path, bpe_tokenizer)
    folder = _folder(path)
    sums = json.loads((folder / "store.json").read_text())["sums"]["samples"]["columns"]
    whole = (folder / "samples.arrow").read_bytes()
    assert Columns(folder / "samples.arrow").damaged(sums) is None
    source = pa.memory_map(str(folder / "samples.arrow"))
    start, batches = source.read_buffer().address, pa.ipc.open_file(source)
    assert batches.num_record_batches == 6
    for i in range(6):
        for name, column in zip(batches.schema.names, batches.get_batch(i).columns, strict=True):
            of_lists = pa.types.is_list(column.type)
            at = column.buffers()[1].address - start
            other = path.with_name("other.arrow")
            other.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert Columns(other).damaged(sums) == (f"{name}.offsets" if of_lists else name)


def test_a_store_written_otherwise_is_not_taken_and_its_fingerprint_stays(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run can be resumed by a version that writes its store in another way."""
    path = write_jsonl("a.jsonl", _rows(3))
    before = _build(path, bpe_tokenizer)
    monkeypatch.setattr("pertoken.data.store.key.FORMAT_VERSION", 99)
    after = _build(path, bpe_tokenizer)
    assert not after.report.hit
    assert (after.name != before.name, after.fingerprint) == (True, before.fingerprint)
    monkeypatch.setattr("pertoken.data.store.key.SCHEMA", pa.schema({"tokens": pa.int64()}))
    assert not _build(path, bpe_tokenizer).report.hit


def test_a_store_is_opened_by_name_and_fingerprint_without_the_data(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any
) -> None:
    path = write_jsonl("a.jsonl", _rows(3))
    store, data = _build(path, bpe_tokenizer), _config(path)
    path.unlink()
    opened = open_store(store.name, store.fingerprint, data)
    assert opened is not None
    assert [opened[i].tokens.tolist() for i in range(3)] == [store[i].tokens.tolist() for i in range(3)]
    assert open_store(store.name, "another", data) is None
    assert open_store("another", store.fingerprint, data) is None


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_a_store_that_cannot_be_looked_at_is_not_thrown_away(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = write_jsonl("a.jsonl", _rows(3))
    _build(path, bpe_tokenizer)
    folder = _folder(path)
    before = folder.stat().st_ino

    def fails(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(pertoken.data.store.folder, "damaged_block", fails)
        with pytest.raises(DataError, match=f"cannot be read .{os.strerror(code)}"):
            _build(path, bpe_tokenizer)
    assert _build(path, bpe_tokenizer).report.hit
    assert folder.stat().st_ino == before


def test_tokens_outside_the_vocabulary_are_counted_and_only_the_first_looked_up(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _build(write_jsonl("a.jsonl", _rows(30)), bpe_tokenizer)
    looked_up: list[int] = []
    value = Columns.value
    monkeypatch.setattr(Columns, "value", lambda self, name, i: looked_up.append(i) or value(self, name, i))
    with pytest.raises(DataError, match=r"(?s)a.jsonl:2: tokens: token id .*and 10 more$") as error:
        store.check_vocab(3)
    assert " (lines 2-21)\n" in str(error.value)
    assert max(looked_up) == 19


def _count_scans(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    scans: list[list[Path]] = []
    scan = pertoken.data.store.build.scan

    def counted(files: list[Path]) -> Any:
        scans.append(files)
        return scan(files)

    monkeypatch.setattr(pertoken.data.store.build, "scan", counted)
    return scans


@pytest.fixture
def quiet_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as quiet a hundredth of a second after a change."""
    monkeypatch.setattr(pertoken.data.files.hashes, "_QUIET_NS", 10_000_000)


def _wait() -> None:
    time.sleep(0.05)


@pytest.mark.usefixtures("quiet_at_once")
def test_files_that_did_not_change_are_read_once(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", _rows(3))
    scans = _count_scans(monkeypatch)
    _wait()
    first = _build(path, bpe_tokenizer)
    assert len(scans) == 1
    again = _build(path, bpe_tokenizer)
    assert (len(scans), again.report.hit, again.fingerprint) == (1, True, first.fingerprint)
    assert again.checksums == first.checksums
    assert _build(path, bpe_tokenizer, verify_data=True).report.hit
    assert len(scans) == 2, "verifying reads them"


@pytest.mark.usefixtures("quiet_at_once")
def test_a_store_that_another_process_has_built_meanwhile_is_opened(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", _rows(3))
    _wait()
    _build(path, bpe_tokenizer)  # the file's hash is known from now on
    folder, aside = _folder(path), path.parent / "aside"
    folder.rename(aside)
    scan = pertoken.data.store.build.scan

    def slow(files: list[Path]) -> Any:
        aside.rename(folder)
        return scan(files)

    monkeypatch.setattr(pertoken.data.store.build, "scan", slow)
    assert _build(path, bpe_tokenizer).report.hit


@pytest.mark.usefixtures("quiet_at_once")
@pytest.mark.parametrize("how", ["longer", "same size", "same size and time", "replaced"])
def test_a_file_that_changed_is_read_again(write_jsonl: WriteJsonl, bpe_tokenizer: Any, how: str) -> None:
    path = write_jsonl("a.jsonl", [{"text": "The text 1"}])
    _wait()
    first, before = _build(path, bpe_tokenizer), path.stat()
    assert recall(path.parent / "cache", [path]) is not None
    if how == "replaced":
        (path.parent / "b").write_text('{"text": "The text 2"}\n')
        (path.parent / "b").replace(path)
    else:
        path.write_text('{"text": "The text 2%s"}\n' % ("!" if how == "longer" else ""))
    if how != "same size":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size == before.st_size) == (how != "longer")
    after = _build(path, bpe_tokenizer)
    assert not after.report.hit
    assert after.fingerprint != first.fingerprint
    assert "2" in bpe_tokenizer.decode(after[0].tokens)


def test_the_hash_of_a_file_that_was_written_just_now_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    remember(tmp_path, [path], see([path]), ["hash"])
    assert recall(tmp_path, [path]) is None
    os.utime(path, (0, 0))  # the time that a program can set says nothing
    remember(tmp_path, [path], see([path]), ["hash"])
    assert recall(tmp_path, [path]) is None


@pytest.mark.usefixtures("quiet_at_once")
def test_the_hash_of_a_file_that_changed_while_it_was_hashed_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    _wait()
    seen = see([path])
    path.write_text("b")
    remember(tmp_path, [path], seen, ["hash of a"])
    assert recall(tmp_path, [path]) is None


@pytest.mark.usefixtures("quiet_at_once")
def test_remembered_hashes_that_are_damaged_are_ignored_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    _wait()
    remember(tmp_path, [path], see([path]), ["abc"])
    assert recall(tmp_path, [path]) == ["abc"]
    file = tmp_path / "hashes.json"
    whole = file.read_text()
    for content in ("", "{}", "[]", whole[:-10], whole.replace("abc", "abd"), '{"files": {}, "checksum": 1}'):
        file.write_text(content)
        assert recall(tmp_path, [path]) is None
        remember(tmp_path, [path], see([path]), ["abc"])
        assert recall(tmp_path, [path]) == ["abc"]


@pytest.mark.usefixtures("quiet_at_once")
def test_hashes_are_remembered_beside_those_of_other_runs_but_not_of_files_that_are_gone(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("a")
    _wait()
    for file in files:
        remember(tmp_path, [file], see([file]), [file.name])
    assert recall(tmp_path, files) == ["a.txt", "b.txt"]
    files[0].unlink()
    (tmp_path / "c.txt").write_text("c")
    _wait()
    remember(tmp_path, [tmp_path / "c.txt"], see([tmp_path / "c.txt"]), ["c"])
    assert "a.txt" not in (tmp_path / "hashes.json").read_text()
    assert recall(tmp_path, [files[1], tmp_path / "c.txt"]) == ["b.txt", "c"]


def test_a_folder_that_cannot_be_written_loses_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    remember(tmp_path / "a.txt" / "below", [tmp_path / "a.txt"], see([tmp_path / "a.txt"]), ["hash"])


def _as_version(path: Path, version: int) -> None:
    """Make the store what another version would have put under its name."""
    meta = json.loads((_folder(path) / "store.json").read_text())
    meta.pop("checksum")
    meta["format_version"] = version
    checksum = pertoken.data.store.folder._checksum(meta)
    (_folder(path) / "store.json").write_text(json.dumps({**meta, "checksum": checksum}))


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", _rows(3))
    _build(path, bpe_tokenizer)
    version = pertoken.data.store.folder.FORMAT_VERSION
    _as_version(path, version + 1)
    before = {file.name: file.read_bytes() for file in _folder(path).iterdir()}
    with pytest.raises(DataError) as error:
        _build(path, bpe_tokenizer)
    assert str(error.value) == (
        f"{_folder(path)}: a token store of a newer pertoken (format_version {version + 1}, this one knows {version}); "
        "update pertoken, or name another folder with data.store"
    )
    assert {file.name: file.read_bytes() for file in _folder(path).iterdir()} == before


def test_a_store_of_an_earlier_version_is_made_again_and_said(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = write_jsonl("a.jsonl", _rows(3)), []  # type: ignore[var-annotated]
    _build(path, bpe_tokenizer)
    _as_version(path, 1)
    assert not _build(path, bpe_tokenizer, told).report.hit
    assert "(of an earlier pertoken, format_version 1); making it again from the data" in told[0]
    assert _build(path, bpe_tokenizer).report.hit

    named: list[str] = []  # as version 3 named the same data
    name_of = pertoken.data.store.key.StoreKey.earlier_name

    def earlier_name(key: Any, contents: list[str]) -> str | None:
        named.append(str(name_of(key, contents)))
        return named[-1]

    monkeypatch.setattr(pertoken.data.store.key.StoreKey, "earlier_name", earlier_name)
    shutil.rmtree(_folder(path))
    _build(path, bpe_tokenizer)
    shutil.rmtree(_folder(path))
    old = path.parent / "cache" / named[0]
    old.mkdir()
    told.clear()
    _build(path, bpe_tokenizer, told)
    assert told == [f"{old}: a token store of an earlier version; making a new one, so it can be removed"]
    assert old.is_dir(), "another installation may still read it"
