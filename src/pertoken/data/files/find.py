"""The data files that a recipe's paths mean."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pertoken.data.files.kinds import COMPRESSED, SUFFIXES, kind_of
from pertoken.data.files.passed_over import PassedOver, sort_out
from pertoken.data.files.splits import split_of
from pertoken.data.files.stdin import STDIN, standard_input
from pertoken.errors import DataError
from pertoken.files import plain_file
from pertoken.text import names, reason

__all__ = ["SUFFIXES", "find_files"]

Tell = Callable[[str], None]


def find_files(paths: Sequence[str], on_message: Tell = lambda text: None, *, key: str = "data.path") -> list[Path]:
    """The data files that `paths` (files, folders, globs, "-" for standard input) name, in the order given.

    A file that is named itself is always taken, and so is one that a glob with its suffix finds. A folder, or any
    other glob, means every data file below it, sorted, but hidden files and what pertoken has written there (a run's
    metrics and checkpoints, a token store). Of a dataset's splits `key` "data.path" means train, "data.eval_path" the
    others. `on_message` is told what is passed over.
    Raises DataError where a path names nothing that can be read, and for a file that is named twice.
    """
    found: dict[Path, str] = {}
    for path in paths:
        try:
            for file in _matches(path, on_message, key):
                str(file).encode()
                if (before := found.get(plain_file(file).resolve())) is not None:
                    again = f"{file}: named twice in {key}" + (f", also as {before}" if before != str(file) else "")
                    once = "name it once, and to train on it more often make it one of [[data.sources]] with repeat = 2"
                    raise DataError(f"{again}; {'name it once' if key == 'data.eval_path' else once}")
                found[file.resolve()] = str(file)
        except UnicodeEncodeError:
            raise DataError(f"{path}: a name there is not UTF-8, so no message could name it; rename it") from None
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user's home, a NUL
            raise DataError(f"{path}: cannot be read ({reason(error)}); correct {key}") from None
    return [Path(file) for file in found.values()]


def _matches(path: str, on_message: Tell, key: str) -> list[Path]:
    if path == STDIN:
        return [standard_input()]
    here = Path(path).expanduser()
    if here.is_dir():
        return _of_a_dataset(path, sort_out(sorted(here.rglob("*")), here), here, on_message, key)
    if not here.exists() and glob.has_magic(path):
        found = [Path(match) for match in sorted(glob.glob(str(here), recursive=True))]
        names_kind = here.suffix != "" and not glob.has_magic(here.suffix)
        return _of_a_dataset(path, sort_out(found, None, names_kind=names_kind), here, on_message, key)
    if not here.exists():
        raise DataError(f"{path}: no such file or folder; correct {key}")
    kind = kind_of(here)
    if not _fits(here, kind.format):
        on_message(f"{key}={path}: read as {kind}, by its content")
    return [here]


def _fits(file: Path, format: str) -> bool:
    """Whether the name says what the content is."""
    suffixes = {".ndjson": "jsonl", ".txt": "text"}
    said = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED][-1:] or [""]
    return suffixes.get(said[0], said[0].removeprefix(".")) == format.split("_")[0]


def _of_a_dataset(path: str, found: PassedOver, here: Path, on_message: Tell, key: str) -> list[Path]:
    """Those of the splits that are wanted, of what a folder or a glob gives. Raises DataError where none is left."""
    is_folder = here.is_dir()
    root = here if is_folder else _above_the_signs(here)
    splits = {file: split_of(file.relative_to(root)) for file in found.data}
    if not is_folder and split_of(Path(re.sub(r"[*?\[\]]", " ", str(here.relative_to(root))))) == "held_out":
        splits = dict.fromkeys(found.data)  # the glob names the split itself
    wanted, evaluates = found.data, key == "data.eval_path"
    if "held_out" in splits.values():
        wanted = [file for file in found.data if (splits[file] == "held_out") == evaluates]
    others = [file for file in found.data if file not in wanted]
    told = [found.told(root)] if found.others or found.ours else []
    if others:
        shown = names(str(file.relative_to(root)) for file in others)
        remedy = "; name one in data.eval_path" if wanted and key == "data.path" else ""
        told.append(f"not {'evaluated' if evaluates else 'trained'}: {shown}{remedy}")
    if not wanted:
        known = f"{', '.join(SUFFIXES)}, compressed or not"
        nothing = f"no data file found there ({known})" if not found.data else "only splits that are not for training"
        but = f" but {'; '.join(told)}" if told else ""
        raise DataError(f"{path}: {nothing}{but}; correct {key}, or name the file itself")
    for line in told:
        on_message(f"{key}={path}: {line}")
    return wanted


def _above_the_signs(pattern: Path) -> Path:
    """The last folder of a glob that is named in full."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))
