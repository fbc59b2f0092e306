"""Which files in `out_dir` are a run's, so that `--overwrite` removes these alone.

`.pertoken.json` lists what the run has made, as paths relative to `out_dir`; checkpoints list their files themselves,
in their manifests. Runs of earlier versions have no list: of theirs only what can be told by its content counts.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterable
from pathlib import Path

import tomli_w

from pertoken.checkpoints.ledger import lines_of, parsed
from pertoken.checkpoints.read import remove_checkpoints
from pertoken.errors import RecipeError
from pertoken.files import free_name, plain_file, write_whole
from pertoken.recipe.schema import Recipe

__all__ = ["LIST", "claim", "holds_a_run", "keep_others_aside", "remove_run"]

LIST = ".pertoken.json"
_FIXED = ("recipe.toml", "metrics.jsonl")
_IN_A_ROW = {"step", "loss_sum", "num_tokens", "positions"}
_IN_A_RECIPE = {"stage", "out_dir", "model", "data", "train", "checkpoint", "log"}  # users leave out what has a default


def claim(out_dir: Path, paths: Iterable[Path], *, anew: bool = False) -> None:
    """Note that the run makes `paths`, files or whole folders in `out_dir`; others are passed over. `anew` forgets what
    is noted already. Raises OSError."""
    inside = [str(path.relative_to(out_dir)) for path in paths if path.is_relative_to(out_dir)]
    noted = [] if anew else _noted(out_dir)
    everything = sorted({*noted, *inside})
    if everything != noted or not (out_dir / LIST).exists():
        write_whole(out_dir / LIST, json.dumps({"written": everything}, indent=1) + "\n")


def holds_a_run(out_dir: Path) -> bool:
    """Whether something is there that a new run would have to replace."""
    return any(os.path.lexists(out_dir / name) for name in (*_FIXED, "checkpoints", *_noted(out_dir)))


def remove_run(out_dir: Path) -> list[str]:
    """Remove what an earlier run wrote into `out_dir`; the names of what is left. Raises OSError.

    What is left of the run after a crash can be resumed, or removed by another call: the list goes last, with the next
    run's `claim`.
    """
    remove_checkpoints(out_dir)
    noted = _noted(out_dir)
    ours = [*noted, *(name for name in _FIXED if name not in noted and _is_ours(out_dir / name))]
    for name in sorted(ours, key=lambda name: name in _FIXED):
        _remove(out_dir, out_dir / name)
    left = [path for path in sorted(out_dir.iterdir()) if path.name not in (LIST, ".lock")]
    return [
        str(path.relative_to(out_dir))
        for entry in left
        for path in (sorted(entry.iterdir()) if entry.name == "checkpoints" and entry.is_dir() else [entry])
    ]


def keep_others_aside(out_dir: Path) -> list[str]:
    """Rename files that are not the run's, and whose names it needs; what to say of each. Raises OSError."""
    said = []
    for name in _FIXED:
        path = out_dir / name
        if path.is_file() and name not in _noted(out_dir) and not _is_ours(path):
            aside = free_name(path, "kept")
            os.replace(path, aside)
            said.append(f"{path}: not written by pertoken; it is {aside.name} now")
    return said


def _noted(out_dir: Path) -> list[str]:
    """The paths in the list; none where there is no list, or it is none of ours."""
    try:
        names = json.loads(plain_file(out_dir / LIST).read_text(encoding="utf-8"))["written"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and _is_below(name)] if isinstance(names, list) else []


def _is_below(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name


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
    if path.name == "metrics.jsonl":
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
