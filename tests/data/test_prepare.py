"""How many processes prepare the data, and how often they were interrupted, cannot be told from the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pertoken.data.samples
import pertoken.data.store.build
import pertoken.data.store.columns
import pertoken.data.store.parts
import pertoken.data.store.prepare
import pertoken.data.store.workers
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.errors import DataError
from pertoken.recipe.data import DataConfig

PART_BYTES = 2000


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (PART_BYTES, PART_BYTES))
    monkeypatch.setattr(pertoken.data.store.prepare, "_LITTLE_BYTES", 0)


def _build(files: list[Path], cache: Path, tokenizer: Any, stage: Any, on_progress: Any = None, **data: Any) -> Store:
    config = DataConfig.model_validate({"path": [str(file) for file in files], "store": str(cache), **data})
    return build_store(config.path, stage=stage, tokenizer=tokenizer, data=config, on_progress=on_progress)


def _in(cache: Path) -> list[Path]:
    """What is in the cache, but for the hashes of files, which are kept there once a file is some seconds old."""
    return [path for path in cache.iterdir() if path.name != "hashes.json"]


def _files_of(cache: Path) -> dict[str, bytes]:
    """Every file of the cache's one store; there must be nothing else but the files' hashes."""
    (store,) = _in(cache)
    return {path.name: path.read_bytes() for path in store.iterdir()}


def _rows(stage: str, count: int) -> list[Any]:
    """Good rows, and a bad one in twenty."""
    bad = ['{"text": ', {"text": 1}, "[]"]
    if stage == "pretrain":
        good: list[Any] = [{"text": f"document {i}: The quick brown 🙂 fox, {'çé' * (i % 7)}"} for i in range(count)]
    else:
        good = [
            {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "é! " * (i % 9 + 1)}]}
            for i in range(count)
        ]
    for i, row in enumerate(good):  # a key that is not used, of some rows
        row |= {"id": i} if i % 3 else {}
    return [bad[i % 3] if i % 20 == 13 else row for i, row in enumerate(good)]


def _write(folder: Path, stage: str, count: int = 150) -> list[Path]:
    """A file of several parts, small ones that share a part, and another kind of file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    files = []
    for name, rows in (("a.jsonl", count), ("b.jsonl", 9), ("c.jsonl", 30)):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in _rows(stage, rows)]
        files.append(folder / name)
        files[-1].write_text("\n".join(["", *lines]) + "\n\n", encoding="utf-8")
    good = [row for row in _rows(stage, 40) if isinstance(row, dict) and row.get("text") != 1]
    pq.write_table(pa.Table.from_pylist(good), folder / "d.parquet", row_group_size=10)
    files.append(folder / "d.parquet")
    if stage == "pretrain":
        for name, size in (("e.txt", 9000), ("f.txt", 10)):
            files.append(folder / name)
            files[-1].write_text("The lazy dog.\n" * size)
    return files


def _used_ids(stage: str) -> Iterator[int]:
    """The ids of the good rows of the .jsonl that `_write` writes. The .parquet has no such column."""
    for count in (150, 9, 30):
        yield from (row["id"] for row in _rows(stage, count) if isinstance(row, dict) and row.get("id") is not None)


def _made_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that this process makes from now on."""
    made: list[int] = []
    make_part = pertoken.data.store.prepare.make_part

    def noted(folder: Path, index: int, *rest: Any) -> None:
        make_part(folder, index, *rest)
        made.append(index)

    monkeypatch.setattr(pertoken.data.store.prepare, "make_part", noted)
    return made


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_any_number_of_processes_makes_the_same_store(
    tmp_path: Path, bpe_tokenizer: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _write(tmp_path / "data", stage)
    options: dict[str, Any] = {"on_bad_row": "skip", "max_seq_len": 64, "overlong": "truncate"}
    if stage == "pretrain":
        options |= {"eval_split": "tail", "eval_fraction": 0.1}
    one = _build(files, tmp_path / "one", bpe_tokenizer, stage, workers=1, **options)
    made_here, told = _made_parts(monkeypatch), []
    several = _build(
        files, tmp_path / "several", bpe_tokenizer, stage, lambda *news: told.append(news), workers=3, **options
    )
    assert not made_here, "others made the parts"
    assert several.fingerprint == one.fingerprint
    assert _files_of(tmp_path / "one") == _files_of(tmp_path / "several")
    assert one.report.skipped == 7 + 0 + 1, "of a.jsonl, b.jsonl, c.jsonl"
    assert told == sorted(told)
    assert told[-1] == (sum(file.stat().st_size for file in files),) * 2

    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (10**9, 10**9))  # and cutting files changes no sample
    whole = _build(files, tmp_path / "whole", bpe_tokenizer, stage, workers=3, **options)
    assert [whole.where(i) for i in range(len(whole))] == [one.where(i) for i in range(len(one))]
    for i in range(len(whole)):
        assert whole[i].tokens.tolist() == one[i].tokens.tolist()
        assert whole[i].loss_mask.tolist() == one[i].loss_mask.tolist()
    stores = (whole, several, one)
    assert f": id ({len(list(_used_ids(stage)))} rows, the first {files[0]}:3)" in one.report.unused.notes(one.files)[0]
    kept = [(store.report.by_file, store.report.findings.to_json(), store.report.unused.to_json()) for store in stores]
    assert kept[0] == kept[1] == kept[2]
    skipped = [Path(str(store.report.skipped_file)).read_text() for store in (whole, one)]
    assert skipped[0] == skipped[1]
    assert f"{files[0]}:{13 + 20 * 5 + 2}: " in skipped[0]


def test_bad_rows_of_any_part_are_named_as_without_parts(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _write(tmp_path / "data", "sft", count=600)

    def error(workers: int) -> str:
        with pytest.raises(DataError) as raised:
            _build(files, tmp_path / "cache", bpe_tokenizer, "sft", workers=workers, max_seq_len=60, overlong="error")
        assert not _in(tmp_path / "cache"), "the data must change first, so nothing is kept"
        return str(raised.value)

    in_parts = error(3)
    assert error(1) == in_parts
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (10**9, 10**9))
    assert error(1) == in_parts
    assert f"{files[0]}:{13 + 20 + 2}: row: not valid JSON" in in_parts
    assert in_parts.endswith('\ndata.on_bad_row="skip" trains on the other rows')


_KILLED = """\
import os, signal, sys
from pathlib import Path
import pertoken.data.store.parts
import pertoken.data.store.prepare
pertoken.data.store.parts._PART_BYTES = ({part_bytes}, {part_bytes})
pertoken.data.store.prepare._LITTLE_BYTES = 0
from pertoken.recipe.data import DataConfig
from pertoken.data.store.build import build_store
from pertoken.data.tokens.tokenizer import load_tokenizer

def killed(done, total):
    if len(list(Path({cache!r}).glob(".building-*/part-*.json"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

data = DataConfig.model_validate({{"path": {files!r}, "store": {cache!r}, "workers": {workers}, "on_bad_row": "skip"}})
build_store(data.path, stage={stage!r}, tokenizer=load_tokenizer({tokenizer!r}), data=data, on_progress=killed)
"""


def test_a_killed_build_goes_on_where_it_was(
    tmp_path: Path, bpe_tokenizer: Any, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = "sft"
    files = _write(tmp_path / "data", stage)
    cache = tmp_path / "cache"
    code = _KILLED.format(
        part_bytes=PART_BYTES,
        cache=str(cache),
        files=[str(file) for file in files],
        workers=2,
        stage=stage,
        tokenizer=str(bpe_folder),
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (work,) = _in(cache)
    kept = {int(path.name[5:11]) for path in work.glob("part-*.json")}
    assert len(kept) >= 3
    made, told = _made_parts(monkeypatch), []
    _build(files, cache, bpe_tokenizer, stage, lambda *news: told.append(news[0]), workers=1, on_bad_row="skip")
    assert made, "something was left to do"
    assert not kept & set(made)
    assert told[0] > 0
    _build(files, tmp_path / "other", bpe_tokenizer, stage, workers=1, on_bad_row="skip")
    assert _files_of(cache) == _files_of(tmp_path / "other")


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_damaged_part_is_made_again(
    tmp_path: Path, bpe_tokenizer: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, cache = _write(tmp_path / "data", stage), tmp_path / "cache"
    made = _made_parts(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        if len(made) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(files, cache, bpe_tokenizer, stage, interrupt, workers=1, on_bad_row="skip")
    (work,) = _in(cache)
    arrow = work / "part-000001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-50] + b"\0" + arrow.read_bytes()[-49:])  # one byte
    (work / "part-000002.skipped").write_text("something else")
    (work / "part-000003.json").write_text("{}")
    (work / "part-000004.arrow").unlink()
    (work / "part-000009.arrow.123").write_bytes(b"half of it")
    del made[:]
    _build(files, cache, bpe_tokenizer, stage, workers=1, on_bad_row="skip")
    assert made[:4] == [1, 2, 3, 4]
    assert not {0, 5} & set(made)
    _build(files, tmp_path / "other", bpe_tokenizer, stage, workers=1, on_bad_row="skip")
    assert _files_of(cache) == _files_of(tmp_path / "other")


def test_parts_of_other_data_settings_or_cuts_are_not_taken(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, cache = _write(tmp_path / "data", "sft"), tmp_path / "cache"
    made = _made_parts(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        if len(made) == 6:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"workers": 1, "on_bad_row": "skip"}
    with pytest.raises(KeyboardInterrupt):
        _build(files, cache, bpe_tokenizer, "sft", interrupt, **options)
    (work,) = _in(cache)

    def everything_was_made() -> bool:
        all_made = made == list(range(len(made)))
        del made[:]
        return all_made

    assert everything_was_made()
    _build(files, cache, bpe_tokenizer, "sft", max_seq_len=100, **options)
    assert everything_was_made()
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (PART_BYTES + 500,) * 2)
    cuts = pertoken.data.store.parts.scan(files)[1]
    assert [pertoken.data.store.prepare.find_part(work, i, part) for i, part in enumerate(cuts)] == [None] * len(cuts)
    files[0].write_text(files[0].read_text().replace("1?", "2?"))
    _build(files, cache, bpe_tokenizer, "sft", **options)
    assert everything_was_made()
    assert work.exists()


def test_a_lost_worker_is_an_error_that_keeps_the_finished_parts(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, cache = _write(tmp_path / "data", "pretrain", count=600), tmp_path / "cache"
    processes: list[Any] = []
    start = pertoken.data.store.workers._start

    def noted(said: Any) -> Any:
        connection, process = start(said)
        processes.append(process)
        return connection, process

    def kill(done: int, total: int) -> None:
        if list(cache.glob(".building-*/part-*.json")):
            os.kill(processes[0].pid, signal.SIGKILL)

    monkeypatch.setattr(pertoken.data.store.workers, "_start", noted)
    with pytest.raises(
        DataError, match=r"data\.workers: a worker process was killed \(code -9\), most often for lack of memory; "
    ):
        _build(files, cache, bpe_tokenizer, "pretrain", kill, workers=2, on_bad_row="skip")
    assert all(process.poll() is not None for process in processes), "no process is left behind"
    kept = list(cache.glob(".building-*/part-*.json"))
    assert kept
    made = _made_parts(monkeypatch)
    _build(files, cache, bpe_tokenizer, "pretrain", workers=1, on_bad_row="skip")
    assert not {int(path.name[5:11]) for path in kept} & set(made)


def test_an_error_in_a_worker_is_the_users_error(tmp_path: Path, bpe_tokenizer: Any) -> None:
    """Of two files that cannot be read to their end, the first one is named, as if they were read in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    files[0].write_text('{"text": "some text"}\n' * 1000)
    for file in files[1:]:
        pq.write_table(pa.table({"text": [f"row {i}" for i in range(3000)]}), file, compression="none")
        content = bytearray(file.read_bytes())
        content[4:3000] = b"\xff" * 2996
        file.write_bytes(content)
    messages = []
    for workers in (1, 2):
        with pytest.raises(DataError) as error:
            _build(files, tmp_path / "cache", bpe_tokenizer, "pretrain", workers=workers)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{files[1]}: ")


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[..., Path]
) -> None:
    monkeypatch.setattr(pertoken.data.samples, "_CHUNK_CHARS", 5_000)
    monkeypatch.setattr(pertoken.data.store.columns, "_BATCH_TOKENS", 5_000)
    monkeypatch.setattr(pertoken.data.store.parts, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(pertoken.data.store.parts, "_PART_BYTES", (10**9, 10**9))
    peaks = []
    for name, rows in (("warm", 10), ("small", 200), ("large", 1600)):
        path = write_jsonl(f"{name}.jsonl", [{"text": f"{i} The quick brown fox " * 20} for i in range(rows)])
        tracemalloc.start()
        _build([path], tmp_path / name, bpe_tokenizer, "pretrain", workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 600_000
    assert peaks[2] - peaks[1] < 150_000, peaks


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_while_it_is_prepared_is_not_stored(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    """Its size and its time of modification stay what they were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, texts = tmp_path / name, [f"The text of row {i}" for i in range(300)]
    if name == "a.parquet":
        table = pa.table({"text": texts})
        pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    scan = pertoken.data.store.build.scan

    def change(files: list[Path]) -> Any:
        found, before = scan(files), path.stat()
        path.write_bytes(path.read_bytes().replace(b"row 217", b"row 712"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return found

    monkeypatch.setattr(pertoken.data.store.build, "scan", change)
    with pytest.raises(DataError, match=rf"{name}: changed while it was being prepared, so nothing was stored; run"):
        _build([path], tmp_path / "cache", bpe_tokenizer, "pretrain", workers=workers)
    assert not _in(tmp_path / "cache")
    monkeypatch.setattr(pertoken.data.store.build, "scan", scan)
    store = _build([path], tmp_path / "cache", bpe_tokenizer, "pretrain", workers=workers)
    text = "".join(bpe_tokenizer.decode(store[i].tokens) for i in range(len(store)))
    assert "row 712" in text
    assert "row 217" not in text


_HUNGRY = """
import resource, sys
import pertoken.data.store.prepare
import pertoken.data.store.workers
make_part = pertoken.data.store.workers.make_part

def hungry(*args):
    from tokenizers import Tokenizer, models
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).encode("a" * 5_000_000)

pertoken.data.store.workers.make_part = hungry
"""


_WITHOUT_MEMORY = """
import pertoken.data.samples
import pertoken.data.store.workers

class Encoder(pertoken.data.samples.Encoder):
    def encode(self, *args, **options):
        raise MemoryError

pertoken.data.samples.Encoder.encode = Encoder.encode
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_python_does_not_get_is_one_clear_line_and_no_bad_row(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Rows would be skipped that there is nothing wrong with."""
    files = _write(tmp_path / "data", "pretrain", count=600)
    _hooked_workers(tmp_path, monkeypatch, _WITHOUT_MEMORY)
    if workers == 1:

        def encode(*args: object, **options: object) -> None:
            raise MemoryError

        monkeypatch.setattr(pertoken.data.samples.Encoder, "encode", encode)
    with pytest.raises(DataError) as error:
        _build(files, tmp_path / "cache", bpe_tokenizer, "pretrain", workers=workers, on_bad_row="skip")
    assert len(str(error.value).splitlines()) == 1
    said = {1: "out of memory while it was prepared; free memory", 2: "is out of memory; run it again with fewer"}
    assert said[workers] in str(error.value)


def _hooked_workers(folder: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Workers run `hook` before anything else."""
    main = "\npertoken.data.store.workers.main(pertoken.data.store.workers.Connection(int(sys.argv[1])))\n"
    (folder / "site").mkdir()
    (folder / "site" / "hooked.py").write_text("import sys\n" + hook + main)
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, str(folder / "site" / "hooked.py"), *command[4:]], **options)

    monkeypatch.setattr(pertoken.data.store.workers.subprocess, "Popen", start)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_worker_without_memory_is_one_clear_line(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not the trace with which Rust ends the process."""
    files = _write(tmp_path / "data", "pretrain", count=600)
    _hooked_workers(tmp_path, monkeypatch, _HUNGRY)
    with pytest.raises(DataError) as error:
        _build(files, tmp_path / "cache", bpe_tokenizer, "pretrain", workers=2, on_bad_row="skip")
    assert len(str(error.value).splitlines()) == 1
    assert "a worker process was killed (code -6), most often for lack of memory; run it again with fewer" in str(
        error.value
    )
    assert capfd.readouterr().err == ""


def test_a_work_folder_that_its_owner_removes_just_then_gives_way_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def late(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name == "lock":
            Path(path).parent.rmdir()
        return opened(path, *args, **options)

    monkeypatch.setattr(pertoken.data.store.prepare.os, "open", late)
    with pertoken.data.store.prepare.work_folder(tmp_path, "name") as folder:
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
