"""The data files that a recipe's paths mean."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from pertoken.errors import DataError
from pertoken.text import names, reason

__all__ = ["SUFFIXES", "find_files"]

SUFFIXES = (".jsonl", ".parquet", ".txt")
_OF_A_RUN = ("metrics.jsonl", "checkpoints", "tensorboard", "wandb")  # beside its recipe.toml
_OF_A_STORE = ("store.json", "samples.arrow")


def find_files(paths: Sequence[str], on_message: Callable[[str], None] = lambda text: None) -> list[Path]:
    """The data files that `paths` (files, folders, globs) name, in the order given, each one once.

    A folder means every .jsonl, .parquet and .txt file below it, sorted; so does a glob. Hidden files of a folder, and
    what pertoken has written there (a run's metrics and checkpoints, a token store), are passed over, and `on_message`
    is told of them. A file that is named itself is always taken.
    Raises DataError where a path names nothing that can be read.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            for file in _matches(path, on_message):
                str(file).encode()
                found.setdefault(file.resolve(), file)
        except UnicodeEncodeError:
            raise DataError(f"{path}: a name there is not UTF-8, so no message could name it; rename it") from None
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user's home, a NUL
            raise DataError(f"{path}: cannot be read ({reason(error)}); correct data.path") from None
    return list(found.values())


def _matches(path: str, on_message: Callable[[str], None]) -> list[Path]:
    here = Path(path).expanduser()
    known = ", ".join(SUFFIXES)
    if here.is_file():
        if here.suffix not in SUFFIXES:
            raise DataError(f"{path}: cannot read {here.suffix or 'a file without a suffix'}; give one of {known}")
        return [here]
    if here.is_dir():
        candidates = sorted(here.rglob("*"))
    elif glob.has_magic(path):
        candidates = [Path(match) for match in sorted(glob.glob(str(here), recursive=True))]
    else:
        raise DataError(f"{path}: no such file or folder; correct data.path")
    files = [file for file in candidates if file.suffix in SUFFIXES and file.is_file()]
    root = here if here.is_dir() else None
    ours = _written_by_us(files, root)
    left = [file for file in files if file not in ours]
    shown = names(str(file.relative_to(root) if root else file) for file in ours)
    listed = f"{len(ours)} hidden or written by pertoken: {shown}"
    if not left:
        but = f" but {listed}" if ours else ""
        raise DataError(f"{path}: no {known} file found there{but}; correct data.path")
    if ours:
        on_message(f"data.path={path}: files passed over, {listed}")
    return left


def _written_by_us(files: Iterable[Path], root: Path | None) -> set[Path]:
    """Those that a run or a build wrote; also, below `root`, the hidden ones."""

    @cache
    def is_run(folder: Path) -> bool:
        return (folder / "recipe.toml").is_file() and any((folder / name).exists() for name in _OF_A_RUN[:2])

    @cache
    def is_store(folder: Path) -> bool:
        return all((folder / name).is_file() for name in _OF_A_STORE)

    def is_ours(file: Path) -> bool:
        parts = file.relative_to(root).parts if root is not None else ()
        if any(part.startswith(".") for part in parts):
            return True
        steps = zip([file, *file.parents], file.parents, strict=False)
        return any((step.name in _OF_A_RUN and is_run(folder)) or is_store(folder) for step, folder in steps)

    return {file for file in files if is_ours(file)}
