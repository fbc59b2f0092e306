"""What a folder of data means: its splits, what is passed over, what is named twice; and standard input."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pertoken.data.files.stdin
from pertoken.data.files.find import find_files
from pertoken.data.files.records import read_records
from pertoken.data.files.splits import split_of
from pertoken.errors import DataError

ROW = '{"a": 1}\n'


def _write(root: Path, *files: str, content: str = ROW) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def _found(root: Path, *paths: str, key: str = "data.path") -> tuple[list[str], list[str]]:
    """(the files, what is told), both as seen from `root`."""
    told: list[str] = []
    files = find_files([str(root / path) for path in paths], told.append, key=key)
    return [file.relative_to(root).as_posix() for file in files], [line.replace(f"{root}/", "") for line in told]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"),
        ("gsm8k_train.jsonl", "train"),
        ("train_sft/data-00000-of-00001.arrow", "train"),
        ("training1.txt", "train"),
        ("test.jsonl.gz", "held_out"),
        ("test_sft-00000-of-00001.parquet", "held_out"),
        ("gsm8k-test.arrow", "held_out"),
        ("my-train-00000-of-00002.arrow", "train"),
        ("validation/a.txt", "held_out"),
        ("val.csv", "held_out"),
        ("valid_2.json", "held_out"),
        ("dev.tsv", "held_out"),
        ("data/eval/train.jsonl", "held_out"),
        ("TEST.txt", "held_out"),
        ("a.jsonl", None),
        ("contest.txt", None),
        ("latest-test-results-of-2020.txt", None),
        ("training_data/a.jsonl", "train"),
        ("developers.txt", None),
    ],
)
def test_the_split_of_a_file_is_told_by_its_name(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def test_of_a_dataset_train_is_trained_and_the_others_are_offered(tmp_path: Path) -> None:
    _write(tmp_path, "d/train-0.jsonl", "d/train-1.jsonl", "d/test.jsonl", "d/validation.jsonl", "d/more.jsonl")
    found, told = _found(tmp_path, "d")
    assert found == ["d/more.jsonl", "d/train-0.jsonl", "d/train-1.jsonl"]
    assert told == ["data.path=d: not trained: test.jsonl, validation.jsonl; name one in data.eval_path"]
    found, told = _found(tmp_path, "d", key="data.eval_path")
    assert found == ["d/test.jsonl", "d/validation.jsonl"]
    assert told == ["data.eval_path=d: not evaluated: more.jsonl, train-0.jsonl, train-1.jsonl"]


def test_a_split_that_is_named_is_taken(tmp_path: Path) -> None:
    _write(tmp_path, "d/train.jsonl", "d/test.jsonl", "test/a.jsonl", "test/b.jsonl")
    assert _found(tmp_path, "d/test.jsonl") == (["d/test.jsonl"], [])
    assert _found(tmp_path, "d/test*.jsonl") == (["d/test.jsonl"], [])
    assert _found(tmp_path, "test") == (["test/a.jsonl", "test/b.jsonl"], [])
    found, told = _found(tmp_path, "d/*.jsonl")
    assert found == ["d/train.jsonl"]
    assert told == ["data.path=d/*.jsonl: not trained: test.jsonl; name one in data.eval_path"]


def test_a_folder_of_test_data_alone_is_not_trained_without_being_told(tmp_path: Path) -> None:
    _write(tmp_path, "d/test.jsonl")
    with pytest.raises(DataError, match=r"d: only splits that are not for training but not trained: test\.jsonl; corr"):
        _found(tmp_path, "d")


def test_files_of_other_kinds_are_passed_over_and_listed_with_the_next_step(tmp_path: Path) -> None:
    _write(tmp_path, "a.jsonl", "rows", "config.json")
    _write(tmp_path, "README.md", "LICENSE", "make.py", "c.docx", "d.docx", content="some text\n")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7")
    found, told = _found(tmp_path, "")
    assert found == ["a.jsonl", "rows"], "rows are data under any name"
    assert told == [
        f"data.path={tmp_path}: files passed over, 8 of kinds that are no data: LICENSE, README.md, b.pdf, c.docx, "
        "config.json, d.docx, make.py, x.png "
        "(.docx: convert it to text first, for example with pandoc, and train on the .txt; "
        ".pdf: convert it to text first, for example with pdftotext, and train on the .txt)"
    ]


def test_a_file_that_is_named_is_taken_and_what_it_is_read_as_is_said(tmp_path: Path) -> None:
    _write(tmp_path, "README.md", "a.py", content="some text\n")
    _write(tmp_path, "a.txt", "b", "c.jsonl")
    assert _found(tmp_path, "README.md") == (["README.md"], ["data.path=README.md: read as text, by its content"])
    assert _found(tmp_path, "*.py") == (["a.py"], [])
    assert _found(tmp_path, "a.txt")[1] == ["data.path=a.txt: read as JSON lines, by its content"]
    assert _found(tmp_path, "b")[1] == ["data.path=b: read as JSON lines, by its content"]
    assert _found(tmp_path, "c.jsonl")[1] == []


def test_a_file_named_twice_is_an_error_that_says_how_to_repeat(tmp_path: Path) -> None:
    _write(tmp_path, "d/a.jsonl", "d/b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "a.jsonl")
    again = r"named twice in data\.path.*; name it once, .* \[\[data\.sources\]\] with repeat = 2"
    for paths in (["d/a.jsonl", "d/a.jsonl"], ["d", "d/a.jsonl"], ["d/*.jsonl", "link.jsonl"], ["d", "d/../d"]):
        with pytest.raises(DataError, match=again):
            _found(tmp_path, *paths)


def test_a_name_with_signs_of_a_glob_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    _write(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert _found(tmp_path, "a[1].jsonl")[0] == ["a[1].jsonl"]


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path, "d/a.jsonl")
    for path in ("~/d/a.jsonl", "~/d", "~/d/*.jsonl"):
        assert find_files([path]) == [tmp_path / "d" / "a.jsonl"]


def test_a_saved_dataset_is_its_own_files_alone(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": f"row {i}"}]} for i in range(2500)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    (tmp_path / "one" / "cache-1234.arrow").write_bytes(b"left by map")
    found, told = _found(tmp_path, "one")
    assert found == [f"one/data-0000{i}-of-00003.arrow" for i in range(3)]
    assert told == ["data.path=one: files passed over, 1 of kinds that are no data: cache-1234.arrow"]
    read = [row.value for file in found for row in read_records(tmp_path / file)]  # type: ignore[union-attr]
    assert read == rows

    splits = {"train": dataset.select(range(10)), "test": dataset.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    found, told = _found(tmp_path, "two")
    assert found == ["two/train/data-00000-of-00001.arrow"]
    assert told == ["data.path=two: not trained: test/data-00000-of-00001.arrow; name one in data.eval_path"]

    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"one: data-00001-of-00003\.arrow is missing, which state\.json lists; save"):
        _found(tmp_path, "one")


def test_a_folder_of_save_to_disk_needs_no_datasets_package(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "d").mkdir()
    columns = pa.table({"text": ["one", "two"]})
    with pa.ipc.new_stream(tmp_path / "d" / "data-00000-of-00001.arrow", columns.schema) as writer:
        writer.write_table(columns)
    (tmp_path / "d" / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / "d" / "dataset_info.json").write_text("{}")
    found, told = _found(tmp_path, "d")
    assert (found, told) == (["d/data-00000-of-00001.arrow"], [])
    (tmp_path / "d" / "state.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"state\.json: not what save_to_disk writes; name the \.arrow files themselves"
    ):
        _found(tmp_path, "d")


class _Piped:
    def __init__(self, content: bytes, *, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(content)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def piped(content: bytes, *, terminal: bool = False) -> None:
        pertoken.data.files.stdin.standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", _Piped(content, terminal=terminal))

    yield piped
    pertoken.data.files.stdin.standard_input.cache_clear()


def test_standard_input_is_a_file_of_its_content(pipe: Any, tmp_path: Path) -> None:
    pipe(ROW.encode())
    (file,) = find_files(["-"])
    assert file.read_text() == ROW
    assert find_files(["-"]) == [file], "which is read once"
    pipe(ROW.encode())
    assert find_files(["-"]) == [file], "the same content is the same file"
    pipe(ROW.encode() * 2)
    (other,) = find_files(["-"])
    assert other != file
    assert [row.line for row in read_records(other)] == [1, 2]
    assert sorted(path.name for path in file.parent.iterdir()) == sorted([file.name, other.name]), "and nothing else"


def test_standard_input_that_is_none_or_too_much_is_an_error(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(b"", terminal=True)
    with pytest.raises(
        DataError, match=r"data\.path=-: nothing is piped into standard input; pipe data in, or name a f"
    ):
        find_files(["-"])
    pipe(b"")
    with pytest.raises(DataError, match=r"data\.path=-: standard input is empty; pipe the data in"):
        find_files(["-"])
    monkeypatch.setattr(pertoken.data.files.stdin, "_MOST_BYTES", 1 << 20)
    pipe(b"x" * ((1 << 20) + 1))
    with pytest.raises(
        DataError, match=r"data\.path=-: more than 1 MiB in standard input; write it to a file, and name"
    ):
        find_files(["-"])
    assert list((tmp_path / "cache" / "pertoken" / "stdin").iterdir()) == []


def test_standard_input_of_a_process(tmp_path: Path) -> None:
    code = "from pertoken.data.files.find import find_files; print(find_files(['-'])[0].read_text())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], input=ROW, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == ROW.strip()
