"""The folder of a store, written once, checked whenever it is opened.

    samples.arrow   an Arrow IPC file, one row per sample (see columns.py)
    store.json      format_version, files, settings, counts, the checksums of the other two, and its own
    skipped.txt     the bad rows that were skipped, one line each

It is built aside and renamed into place, so a folder of that name was whole once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pertoken.data.store.columns import Columns, join
from pertoken.data.store.sums import damaged_block
from pertoken.errors import DataError
from pertoken.files import sha256, sync

__all__ = ["FORMAT_VERSION", "SKIPPED", "Check", "Damaged", "open_folder", "put_in_place", "write_folder"]

Check = Literal["none", "sample", "full"]

FORMAT_VERSION = 6  # of the folder: raise it when it is written otherwise; the samples, and their fingerprint, stay

SKIPPED = "skipped.txt"
_SAMPLES, _META = "samples.arrow", "store.json"
_NO_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # the store may well be whole


class Damaged(Exception):
    """A store's folder that cannot be used; the message says what is wrong with it."""


def write_folder(folder: Path, samples: Sequence[Path], skipped: Sequence[Path], meta: dict[str, Any]) -> None:
    """Make `folder`, which may be there from an interrupted build, of the parts' files. Raises OSError.

    `skipped` are files of lines to put together; none: no file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sums: dict[str, Any] = {"samples": join(samples, folder / _SAMPLES)}
    if skipped:
        with (folder / SKIPPED).open("wb") as listed:
            for part in skipped:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, listed)
        sync(folder / SKIPPED)
        sums["skipped"] = sha256(folder / SKIPPED)
    content = {"format_version": FORMAT_VERSION, **meta, "sums": sums}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1, ensure_ascii=False)
    (folder / _META).write_text(text, encoding="utf-8")
    sync(folder / _META)


def open_folder(folder: Path, check: Check) -> tuple[Columns, dict[str, Any]] | None:
    """The samples and what `write_folder` was given as `meta`; None where there is no such folder.

    "sample" reads store.json, the list of skipped rows, the columns of numbers and some blocks of the samples, drawn
    anew each time; "full" reads everything; "none" only store.json.
    Raises Damaged where something is missing or differs from its checksum, and for a folder of an earlier version;
    DataError where it cannot be known, and for a folder of a newer version, which is left as it is.
    """
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta.pop("checksum") != _checksum(meta):
            raise Damaged(f"{_META} differs from its checksum")
        _check_version(folder, meta.pop("format_version", 0))
        sums = meta.pop("sums")
        skipped, samples = sums.get("skipped"), sums["samples"]
        if check != "none":
            if skipped is not None and sha256(folder / SKIPPED) != skipped:
                raise Damaged(f"{SKIPPED} differs from its checksum")
            if what := damaged_block(folder / _SAMPLES, samples, full=check == "full"):
                raise Damaged(what)
        columns = Columns(folder / _SAMPLES)
        if check != "none" and (name := columns.damaged(samples["columns"])) is not None:
            raise Damaged(f"the column {name} of {_SAMPLES} differs from its checksum")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename or _SAMPLES).name} is missing") from None
    except OSError as error:  # pyarrow's errors are OSError or ValueError too
        if error.errno in _NO_DAMAGE:
            raise DataError(
                f"{folder}: cannot be read ({error.strerror}); data.store can name another folder"
            ) from None
        raise Damaged(f"cannot be read ({error.strerror or error})") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Damaged(f"{_META} or {_SAMPLES} is not what pertoken writes") from None
    return columns, meta


def _check_version(folder: Path, version: int) -> None:
    """A store's name holds its version, so another one is there only if somebody renamed its folder."""
    if version > FORMAT_VERSION:
        raise DataError(
            f"{folder}: a token store of a newer pertoken (format_version {version}, this one knows {FORMAT_VERSION}); "
            "update pertoken, or name another folder with data.store"
        )
    if version < FORMAT_VERSION:
        raise Damaged(f"of an earlier pertoken, format_version {version}")


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a finished store to its name. One that another process has put there meanwhile is left, if it is whole."""
    try:
        aside.rename(folder)
    except OSError:
        try:
            if open_folder(folder, "full") is not None:
                return
        except Damaged:
            shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
