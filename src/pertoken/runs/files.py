"""Which files in `out_dir` are a run's, so that a run that replaces it removes these alone.

The run's list (`tracking/run_files.py`) names what it has made; checkpoints list their files themselves, in their
manifests. Runs of earlier versions have no list: of theirs only what can be told by its content counts.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import tomli_w

from pertoken.checkpoints.read import remove_checkpoints
from pertoken.errors import RecipeError
from pertoken.files import free_name
from pertoken.recipe.schema import Recipe
from pertoken.tracking.events import is_event
from pertoken.tracking.ledger import lines_of, parsed
from pertoken.tracking.run_files import LIST, claimed

__all__ = ["EVENTS", "METRICS", "RECIPE", "holds_a_run", "keep_others_aside", "remove_run"]

RECIPE, METRICS, EVENTS = "recipe.toml", "metrics.jsonl", "events.jsonl"
_FIXED = (RECIPE, METRICS)
_IN_A_ROW = {"step", "loss_sum", "num_tokens", "positions"}
_IN_A_RECIPE = {"stage", "out_dir", "model", "data", "train", "checkpoint", "log"}  # users leave out what has a default


def holds_a_run(out_dir: Path) -> bool:
    """Whether something is there that a new run would have to replace."""
    return any(os.path.lexists(out_dir / name) for name in (*_FIXED, "checkpoints", *claimed(out_dir)))


def remove_run(out_dir: Path) -> list[str]:
    """Remove what an earlier run wrote into `out_dir`; the names of what is left. Raises OSError.

    What is left of the run after a crash can be resumed, or removed by another call: the list goes last, with the next
    run's `claim`.
    """
    remove_checkpoints(out_dir)
    noted = claimed(out_dir)
    ours = [*noted, *(name for name in (*_FIXED, EVENTS) if name not in noted and _is_ours(out_dir / name))]
    for name in sorted(ours, key=lambda name: name in _FIXED):
        _remove(out_dir, out_dir / name)
    left = [path for path in sorted(out_dir.iterdir()) if path.name not in (LIST, ".lock")]
    return [
        str(path.relative_to(out_dir))
        for entry in left
        for path in (sorted(entry.iterdir()) if entry.name == "checkpoints" and entry.is_dir() else [entry])
    ]


def keep_others_aside(out_dir: Path, *, continues: bool) -> list[str]:
    """Rename files that are not the run's, and whose names it needs; what to say of each. Raises OSError.

    Of a run that `continues` from a checkpoint recipe and rows are its own, whatever is in them; events need not be,
    since earlier versions wrote none.
    """
    said = []
    for name in (EVENTS,) if continues else (*_FIXED, EVENTS):
        path = out_dir / name
        if path.is_file() and name not in claimed(out_dir) and not _is_ours(path):
            aside = free_name(path, "kept")
            os.replace(path, aside)
            said.append(f"{path}: not written by pertoken; it is {aside.name} now")
    return said


def _remove(out_dir: Path, path: Path) -> None:
    """A file, a link, or a folder with all in it; then the links to it beside it, and folders that are empty now."""
    for parent in path.relative_to(out_dir).parents:
        if (out_dir / parent).is_symlink() and parent != Path():
            return  # what lies behind a link is somewhere else
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    parent = path.parent
    while parent != out_dir and parent.is_dir():
        for link in parent.iterdir():  # wandb's latest-run, debug.log
            if link.is_symlink() and (parent / os.readlink(link)).is_relative_to(path):
                link.unlink()
        if any(parent.iterdir()):
            return
        parent.rmdir()
        parent = parent.parent


def _is_ours(path: Path) -> bool:
    """Whether the content says that pertoken wrote it: rows of steps, or a recipe as it writes one."""
    if not path.is_file() or path.is_symlink():
        return False
    if path.name == EVENTS:
        first = next(lines_of(path), b"")
        return not first or is_event(first)
    if path.name == METRICS:
        first = next(lines_of(path), b"")
        row = parsed(first) or {}
        return not first or row.keys() >= _IN_A_ROW or row.get("lost") is True
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
        Recipe.parse(values)
    except (OSError, ValueError, RecursionError, RecipeError):
        return False
    return values.keys() >= _IN_A_RECIPE and tomli_w.dumps(values) == text
