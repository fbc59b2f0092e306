"""A disk that fails: what was saved stays, training goes on where it can, and says so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.conftest import Record
from faults.disk import (
    Case,
    events,
    every_call_once,
    for_ever,
    full,
    last_save,
    old_ones_stay,
    recipe_of,
    recipe_with_a_tokenizer_of_transformers,
    resumed,
    rows,
    tokenizer_of_transformers,
    trial,
    unclear,
)
from faults.failing_disk import Fault, calls_in
from faults.harness import Desk, Workshop, difference, forget_after, steps_saved, whole_steps

from pertoken.data.tokens.tokenizer import as_transformers, load_tokenizer
from pertoken.folders.files import save_tokenizer

QUICK = {
    every_call_once: (1, 40),
    for_ever: (4,),
    last_save: (1,),
    rows: (0,),
    events: (0, 1, 6),
    full: (6, -1),
    old_ones_stay: (0,),
}
TORTURE = {
    "ENOSPC, EIO, EACCES, once, at each call of a save": every_call_once,
    "ENOSPC, EIO, EROFS, EDQUOT from a save on": for_ever,
    "EIO in each kind of call of the last save": last_save,
    "metrics.jsonl cannot be written for a while": rows,
    "events.jsonl cannot be written for a while, or ever": events,
    "disk full, at 12 moments; too little room foreseen": full,
    "old checkpoints cannot be removed": old_ones_stay,
}


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> Path:
    with workshop.desk() as desk:
        return workshop.reference(desk, recipe_of(workshop))


def tried(workshop: Workshop, reference: Path, cases: list[Case]) -> list[str | None]:
    recipe = recipe_of(workshop)
    return workshop.each(lambda desk, case: trial(desk, case, recipe, reference), cases)


def test_some_disk_faults_lose_nothing(workshop, reference):
    cases = [make(reference)[i] for make, chosen in QUICK.items() for i in chosen]
    lost = [problem for problem in tried(workshop, reference, cases) if problem]
    assert not lost, "\n".join(lost)


@pytest.mark.torture
@pytest.mark.parametrize("kind", TORTURE)
def test_no_disk_fault_loses_anything(workshop, reference, record: Record, kind: str):
    record(kind, tried(workshop, reference, TORTURE[kind](reference)))


@pytest.mark.torture
def test_a_tokenizer_of_transformers_that_cannot_be_written_loses_nothing(workshop, record: Record):
    recipe = recipe_with_a_tokenizer_of_transformers(workshop)
    with workshop.desk() as desk:
        reference = workshop.reference(desk, recipe)
    cases = tokenizer_of_transformers(reference)
    record(
        "the same where transformers' tokenizers write",
        workshop.each(lambda desk, case: trial(desk, case, recipe, reference), cases),
    )


def test_the_tokenizers_of_transformers_fail_with_an_os_error(world, tmp_path):
    tokenizer = as_transformers(load_tokenizer(world.folder / "tokenizer"))
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_tokenizer(tokenizer, tmp_path)


def test_the_failing_disk_sees_all_that_writes_a_checkpoint(reference):
    calls = calls_in(reference.with_suffix(".calls"))
    for folder in steps_saved(reference).values():
        aside = [(call, path) for call, path in calls if f".writing-{folder.name}" in path]
        names = {path.name for path in folder.iterdir()}
        for call in ("open", "write", "close"):  # safetensors writes under names of its own
            assert len({path for c, path in aside if c == call}) >= len(names), (folder.name, call)
        assert names <= {Path(path).name for call, path in aside if call == "sync"}
        assert ("rename", str(folder.resolve())) in calls
    assert sum(call == "write" and path.endswith("metrics.jsonl") for call, path in calls) >= 8


# What is in the way, where: (the path below the run, a file or a folder there, what a resume then does).
IN_THE_WAY = {
    "out_dir is a file": (".", "file", 2),
    "checkpoints is a file": ("checkpoints", "file", 2),
    "metrics.jsonl is a folder": ("metrics.jsonl", "folder", 2),
    "recipe.toml is a folder": ("recipe.toml", "folder", 2),
    "the next checkpoint is a file": ("checkpoints/step-00000004", "file", 0),
    "the next checkpoint is an empty folder": ("checkpoints/step-00000004", "folder", 0),
}


def in_the_way(desk: Desk, way: str, recipe: Path, reference: Path) -> str | None:
    """What went wrong with a resume, None if nothing did."""
    place, what, code = IN_THE_WAY[way]
    run = desk.new()
    shutil.copytree(reference, run, symlinks=True)
    forget_after(run, 2)
    path = run / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_text("") if what == "file" else path.mkdir()
    ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
    problem = None
    if ended.code != code or "Traceback" in ended.said or len(ended.errors) != (1 if code else 0):
        problem = f"exit code {ended.code}: {ended.said}"
    elif code == 0 and "step-00000004: not used" not in ended.out.replace("\n", ""):
        problem = f"it is not named: {ended.said}"
    elif code == 0:
        problem = difference(run, reference)
    return problem and f"{way}: {problem}"


def test_a_file_where_a_folder_should_be_gets_a_message_and_no_traceback(workshop, reference):
    recipe = recipe_of(workshop)
    problems = workshop.each(lambda desk, way: in_the_way(desk, way, recipe, reference), IN_THE_WAY)
    wrong = [problem for problem in problems if problem]
    assert not wrong, "\n".join(wrong)


def test_a_limit_on_the_size_of_files_keeps_the_checkpoint_before(workshop, reference):
    with workshop.desk() as desk:
        run = desk.new()
        shutil.copytree(reference, run, symlinks=True)
        forget_after(run, 2)
        size = (steps_saved(run)[2] / "model.safetensors").stat().st_size
        ended = desk.run("train", recipe_of(workshop), f"out_dir={run}", "--resume", max_file_bytes=size // 2)
        assert ended.code == 2, ended.said
        assert unclear(ended, {2}) is None
        assert whole_steps(run) == [2]
        assert resumed(desk, recipe_of(workshop), run, reference) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system in memory."""
    place = tmp_path / "small"
    place.mkdir()
    done = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=60)


LOOKS_EMPTY = Fault(free=10**12)  # so that it fills while it is written to


def mount(*args: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("mount") is None:
        return subprocess.CompletedProcess([], 1, "", "there is no `mount`")
    return subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, timeout=60)


def resize(place: Path, size: int) -> None:
    done = mount("-o", f"remount,size={size}", place)
    assert done.returncode == 0, done.stderr


def test_a_real_full_disk_keeps_what_was_saved_and_room_for_one_more_is_enough(workshop, reference, small_disk):
    size = disk_bytes(steps_saved(reference)[2])
    resize(small_disk, int(2.6 * size))
    recipe, run = recipe_of(workshop), small_disk / "run"
    with workshop.desk() as desk:
        ended = desk.run("train", recipe, f"out_dir={run}", fault=LOOKS_EMPTY)
        assert ended.code == 2, ended.said
        assert unclear(ended, {2, 4}) is None
        assert whole_steps(run) == [2, 4]
        resize(small_disk, 100 * 2**20)
        assert resumed(desk, recipe, run, reference) is None
        shutil.rmtree(run)
        resize(small_disk, int(2.6 * size))
        ended = desk.run("train", recipe, f"out_dir={run}", "checkpoint.keep_last=1", fault=LOOKS_EMPTY)
        assert ended.code == 0, ended.said
        assert difference(run, reference) is None


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder, *folder.iterdir()))


def test_a_read_only_disk_gets_a_message_and_keeps_the_run(workshop, reference, small_disk):
    run = small_disk / "run"
    resize(small_disk, 100 * 2**20)
    shutil.copytree(reference, run, symlinks=True)
    forget_after(run, 2)
    done = mount("-o", "remount,ro", small_disk)
    assert done.returncode == 0, done.stderr
    with workshop.desk() as desk:
        for args in ((run, "--resume"), (run, "--overwrite"), (small_disk / "new",)):
            ended = desk.run("train", recipe_of(workshop), f"out_dir={args[0]}", *args[1:])
            assert ended.code == 2, ended.said
            assert "Traceback" not in ended.said
            assert len(ended.errors) == 1
            assert str(args[0]) in ended.err
        assert whole_steps(run) == [2]
        done = mount("-o", "remount,rw", small_disk)
        assert done.returncode == 0, done.stderr
        assert resumed(desk, recipe_of(workshop), run, reference) is None


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_may_not_be_written_is_named(workshop, tmp_path, call):
    with workshop.desk() as desk:
        run = tmp_path / "parent" / "run"
        run.parent.mkdir()
        fault = Fault(call, "EACCES", times=0)
        ended = desk.run("train", recipe_of(workshop), f"out_dir={run}", fault=fault, below=run.parent)
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    assert len(ended.errors) == 1
    assert str(run) in ended.err
