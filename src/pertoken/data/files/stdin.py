"""Standard input as a file, which can be read as often as it is needed."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

from pertoken.data.files import limits
from pertoken.errors import DataError
from pertoken.files import cache_folder

__all__ = ["STDIN", "standard_input"]

STDIN = "-"  # the path that means it
_MOST_BYTES = 256 << 20


@cache
def standard_input() -> Path:
    """All of standard input in a file of the cache, named by its hash. Raises DataError.

    It can be read only once, so later calls give the same file. A run that is resumed needs the same content again.
    """
    folder = cache_folder() / "stdin"
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("data.path=-: nothing is piped into standard input; pipe data in, or name a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".reading-", delete=False) as aside:
            try:
                digest, size = hashlib.sha256(), 0
                while block := sys.stdin.buffer.read(limits.BLOCK_BYTES):
                    size += len(block)
                    if size > _MOST_BYTES:
                        what = f"more than {_MOST_BYTES >> 20} MiB in standard input; write it to a file, and name that"
                        raise DataError(f"data.path=-: {what}")
                    digest.update(block)
                    aside.write(block)
                if not size:
                    what = "standard input is empty; pipe the data in (a run that is resumed needs the same again)"
                    raise DataError(f"data.path=-: {what}")
                aside.close()
                file = folder / f"stdin-{digest.hexdigest()[:16]}"
                if not file.exists():
                    os.replace(aside.name, file)
                return file
            finally:
                Path(aside.name).unlink(missing_ok=True)
    except OSError as error:
        what = f"cannot be kept in {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        raise DataError(f"data.path=-: {what}") from None
