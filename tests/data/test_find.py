"""A path means the user's data, and never what pertoken itself has written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pertoken.data.files.find import find_files
from pertoken.errors import DataError


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*paths: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_files([str(tmp_path / p) for p in paths])]

    assert names("") == ["a.txt", "b.jsonl", "sub/c.parquet"]
    assert names("*") == ["a.txt", "b.jsonl"]
    assert names("**/*.parquet", "b.jsonl") == ["sub/c.parquet", "b.jsonl"]
    assert names("sub", "b.jsonl") == ["sub/c.parquet", "b.jsonl"]
    assert names("notes.md") == ["notes.md"], "named itself"
    assert names("*.md") == ["notes.md"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl: no such file or folder; correct data\.path"),
        ("*.csv", r"\*\.csv: no data file found there \(\.jsonl, \.json, \.csv, .*, compressed or not\)"),
        ("empty", r"empty: no data file found there \(.*\); correct data\.path, or name the file itself"),
        (
            "notes",
            r"notes: no data file found there \(.*\) but files passed over, 1 of kinds that are no data: notes\.md;",
        ),
    ],
)
def test_a_path_that_names_no_data_is_an_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / path)])


def test_a_file_name_that_could_not_be_printed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jsonl").write_text("{}")
    with pytest.raises(DataError, match="not UTF-8, so no message could name it; rename it"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("path", ["x" * 300 + ".jsonl", "~nobody-of-this-name/a.jsonl", "a\0b.jsonl", "[" * 50])
def test_a_path_that_no_file_can_have_is_an_error_of_the_data(path: str) -> None:
    with pytest.raises(DataError, match=r"correct data\.path"):
        find_files([path])


def _write(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


RUN = ("recipe.toml", "metrics.jsonl", "checkpoints/step-1/merges.txt", "wandb/log.txt", "tensorboard/a.txt")
STORE = ("store/abc/store.json", "store/abc/samples.arrow", "store/abc/skipped.txt", "store/hashes.json")
HIDDEN = (".git/description.txt", ".hidden.jsonl", "store/.building-1/part.txt", "sub/.ipynb_checkpoints/a.txt")
DATA = ("a.jsonl", "checkpoints/mine.txt", "sub/metrics.jsonl", "run/mine/b.txt")


def test_a_folder_means_no_file_that_a_run_or_a_build_wrote_and_no_hidden_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, *DATA, *STORE, *HIDDEN, *(f"run/{name}" for name in RUN))
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    assert [file.as_posix() for file in find_files(["."], told.append)] == sorted(DATA)
    assert len(told) == 1
    passed_over = 4 + 4 + 4
    assert told[0].startswith(f"data.path=.: files passed over, {passed_over} hidden or written by pertoken: .git/desc")
    assert "and 4 more; 1 of kinds that are no data: run/recipe.toml" in told[0]
    del told[:]
    assert [file.as_posix() for file in find_files(["run/**"], told.append)] == ["run/mine/b.txt"]
    assert len(told) == 1
    find_files(["sub"], told.append)
    find_files(["a.jsonl", "run/metrics.jsonl"], told.append)
    assert len(told) == 2, "of sub alone; named files are the user's own choice"


def test_data_beside_a_runs_files_is_taken(tmp_path: Path) -> None:
    """`out_dir` may be the folder that the data is in."""
    _write(tmp_path, *RUN, "data/a.txt", "b.jsonl")
    assert [file.relative_to(tmp_path).as_posix() for file in find_files([str(tmp_path)])] == ["b.jsonl", "data/a.txt"]


def test_a_folder_of_nothing_but_a_runs_files_is_an_error_that_names_them(tmp_path: Path) -> None:
    _write(tmp_path, *RUN)
    with pytest.raises(
        DataError,
        match=r"no data file found there .* but files passed over, 4 hidden or written by pertoken: .*metrics\.jsonl",
    ):
        find_files([str(tmp_path)])


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    _write(tmp_path, ".data/a.txt")
    assert find_files([str(tmp_path / ".data")]) == [tmp_path / ".data" / "a.txt"]
    assert find_files([os.path.join(str(tmp_path), ".data", "*.txt")]) == [tmp_path / ".data" / "a.txt"]
