"""`metrics.csv`: a line per step, for spreadsheets."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest
from tiny import pertoken, row_of, rows_of

from pertoken.errors import CheckpointError
from pertoken.recipe.schema import LogConfig
from pertoken.tracking.run_files import claimed
from pertoken.tracking.trackers import Tracker, open_trackers

LOG = LogConfig(trackers=("csv",))


def opened(out_dir: Path, last_step: int = 0) -> Tracker:
    return open_trackers(LOG, out_dir, recipe={}, run_ids={}, last_step=last_step)["csv"]


def lines_in(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_steps(out_dir: Path, steps: range, last_step: int = 0, **figures: float) -> None:
    tracker = opened(out_dir, last_step)
    for step in steps:
        tracker.log(row_of(step, **figures))
    tracker.close()


def test_a_run_and_its_resume_have_the_figures_of_the_rows(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.write_recipe(run, log__trackers=["csv"], train__max_steps=3)
    assert pertoken("train", recipe)[0] == 0
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=5")
    assert code == 0, err
    lines, rows = lines_in(run), rows_of(run)
    assert [line["step"] for line in lines] == ["1", "2", "3", "4", "5"]
    for line, row in zip(lines, rows, strict=True):
        figures = {k: v for k, v in row.items() if not isinstance(v, list)}
        assert {k: float(line[k]) for k in figures} == figures
        assert all(value == "" for key, value in line.items() if key not in figures)
    assert "metrics.csv" in claimed(run)


def test_a_figure_that_is_not_finite_is_empty(tmp_path):
    write_steps(tmp_path, range(1, 2), loss=math.nan, grad_norm=math.inf)
    (line,) = lines_in(tmp_path)
    assert (line["loss"], line["grad_norm"], line["step"]) == ("", "", "1")


def test_a_resume_drops_what_follows_its_checkpoint_and_a_torn_line(tmp_path):
    write_steps(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"6,1,0.3")
    write_steps(tmp_path, range(4, 5), last_step=3, loss=0.125)
    after = (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [line["step"] for line in lines_in(tmp_path)] == ["1", "2", "3", "4"]
    assert lines_in(tmp_path)[3]["loss"] == "0.125"


def test_a_file_of_the_users_is_not_touched(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("mine\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: not written by this run; move it away"):
        opened(tmp_path)
    assert path.read_text() == "mine\n"


def test_a_file_with_other_columns_is_not_continued(tmp_path):
    write_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text().replace("step,", "step,more,", 1))
    with pytest.raises(CheckpointError, match=r"metrics\.csv: line 1: not the columns of this version"):
        opened(tmp_path, last_step=2)


def test_a_disk_that_refuses_is_told_and_leaves_whole_lines(tmp_path, monkeypatch):
    tracker = opened(tmp_path)
    tracker.log(row_of(1))
    real = tracker._file._file

    class Full:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def write(self, content: bytes) -> int:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tracker._file, "_file", Full())
    with pytest.raises(OSError, match=os.strerror(28)):
        tracker.log(row_of(2))
    assert [line["step"] for line in lines_in(tmp_path)] == ["1"]
