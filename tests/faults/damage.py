"""One trial of a damaged checkpoint: the newest of a run, spoilt, and the resume that has to do without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.harness import Desk, difference, problem_of, steps_saved


def _truncate(path: Path, outside: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(path: Path, outside: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _grow(path: Path, outside: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path, outside: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path, outside: Path) -> None:
    path.unlink()


def _link_outside(path: Path, outside: Path) -> None:
    """To the same content, so that only the link is wrong."""
    outside.mkdir(exist_ok=True)
    shutil.copy(path, outside / path.name)
    path.unlink()
    path.symlink_to(outside / path.name)


def _make_a_folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "truncated": _truncate,
    "a bit flipped": _flip_a_bit,
    "a byte more": _grow,
    "emptied": _empty,
    "missing": _remove,
    "a link to outside": _link_outside,
    "a folder in its place": _make_a_folder,
}


def contents(folder: Path) -> dict[str, bytes | str]:
    """What is there: bytes of files, targets of links."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "a folder"
        for path in sorted(folder.iterdir())
    }


def copy_of(reference: Path, run: Path) -> Path:
    """The run with its two newest checkpoints; the newest is returned."""
    shutil.copytree(reference, run, symlinks=True)
    *older, _, newest = steps_saved(run).values()
    for folder in older:
        shutil.rmtree(folder)
    return newest


def trial(desk: Desk, file: str, damage: str, recipe: Path, reference: Path) -> str | None:
    """What was lost; None if nothing was."""
    run = desk.new()
    newest = copy_of(reference, run)
    DAMAGES[damage](newest / file, run.with_name(f"{run.name}-outside"))
    left = contents(newest)
    ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
    problem = None
    if ended.code != 0 or "Traceback" in ended.said:
        problem = f"exit code {ended.code}: {ended.err[-2000:]}"
    elif f"{newest}: not used" not in ended.said.replace("\n", ""):
        problem = f"the damaged one is not named: {ended.said}"
    elif not any(contents(folder) == left for folder in (run / "checkpoints").iterdir() if folder.is_dir()):
        problem = "the damaged one is gone"
    elif problem_of(newest) is not None:
        problem = f"the step was not saved again: {problem_of(newest)}"
    problem = problem or difference(run, reference)
    return problem and f"{file} {damage}: {problem}"
