"""What is kept of an error that nobody foresaw: a file to attach to an issue.

It holds versions, the command with its keys, and the stack: files, lines and code. It holds no value of a key, no local
variable and no message of an exception, since those may quote data; the message is on the command line's own line.

The file goes into the `out_dir` of a training run, where that exists, else into the directory for temporary files.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pertoken.cli.words import as_flags
from pertoken.text import one_line, plain, reason

__all__ = ["Unforeseen", "report_of", "say_unforeseen", "write_report"]

_PACKAGES = ("pertoken", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")
# An option, or a recipe's key: other words are values, such as a prompt "password=..." or "-...".
_KEY = re.compile(r"--[a-z][a-z-]*(?=[=]|$)|(stage|out_dir|init_from|(data|model|train|checkpoint|log)\.[a-z_]+)=")
_CHAINED = 5  # exceptions of a chain that are shown
_EX_SOFTWARE = 70  # of sysexits.h


class Unforeseen(Exception):
    """An error that nobody foresaw, and the folder for the report on it."""

    def __init__(self, error: Exception, folder: Path) -> None:
        super().__init__(str(error))
        self.error, self.folder = error, folder


def say_unforeseen(error: Exception, arguments: Sequence[str]) -> int:
    """The last net: one line on stderr that names a report, or the traceback after it where none can be written.

    With PERTOKEN_TRACEBACK=1 the traceback comes first, and no report. Returns the exit code.
    """
    folder = error.folder if isinstance(error, Unforeseen) else None
    error = error.error if isinstance(error, Unforeseen) else error
    notes = (as_flags(one_line(note)) for note in getattr(error, "__notes__", ()))
    line = "; ".join((f"error: {type(error).__name__}, which was not foreseen: {reason(error)}", *notes))
    if os.environ.get("PERTOKEN_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
        print(plain(line), file=sys.stderr)
        return _EX_SOFTWARE
    try:
        report = write_report(error, arguments, folder)
    except OSError as problem:
        print(plain(f"{line}; no report could be written ({problem.strerror}):"), file=sys.stderr)
        traceback.print_exception(error)
    else:
        line += f"; a report without data is in {report}; PERTOKEN_TRACEBACK=1 shows the traceback"
        print(plain(line), file=sys.stderr)
    return _EX_SOFTWARE


def write_report(error: BaseException, arguments: Sequence[str], folder: Path | None) -> Path:
    """Write the report on `error` into `folder`, or where that cannot be, into the directory for temporary files.

    `arguments` are the command line's, without the program. Returns the file; raises OSError where neither takes it.
    """
    content = report_of(error, arguments)
    folders = [folder] if folder is not None and folder.is_dir() else []
    for where in (*folders, None):
        try:
            return _write(content, where)
        except OSError:
            if where is None:
                raise
    raise AssertionError("the last of them returns or raises")


def _write(content: str, folder: Path | None) -> Path:
    """Into a new file that only its owner reads."""
    prefix = "error-" if folder is not None else "pertoken-error-"
    descriptor, name = tempfile.mkstemp(suffix=".txt", prefix=f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}-", dir=folder)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def report_of(error: BaseException, arguments: Sequence[str]) -> str:
    """The report's text."""
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    lines = [
        "pertoken ended with an error that was not foreseen. This file holds no data, no values and no messages.",
        "",
        f"command       pertoken {' '.join(_keys_of(arguments))}",
        f"rank          {rank} of {ranks}",
        f"python        {platform.python_version()} on {platform.platform()}",
        *(f"{name:<14}{_version(name)}" for name in _PACKAGES),
        "",
        *_stack(error),
    ]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _keys_of(arguments: Sequence[str]) -> list[str]:
    """The command's name, options and keys; "..." for every value."""
    shown = []
    for i, argument in enumerate(arguments):
        key = _KEY.match(argument)
        if i == 0 and re.fullmatch(r"[a-z]+", argument):
            shown.append(argument)
        else:
            shown.append("..." if key is None else key[0] + ("..." if key[0].endswith("=") else ""))
    return shown


def _stack(error: BaseException) -> list[str]:
    """The frames of an exception and of those that it comes from, the first cause first."""
    chain, current = list[BaseException](), error
    while len(chain) < _CHAINED and current not in chain:
        chain.append(current)
        before = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        if before is None:
            break
        current = before
    lines = []
    for one in reversed(chain):
        lines += ["Traceback (most recent call last):"]
        lines += [_without_home(text.rstrip("\n")) for text in traceback.format_tb(one.__traceback__)]
        lines += [f"{type(one).__module__}.{type(one).__qualname__}", ""]
    return lines


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text if home in ("~", "/", "") else text.replace(home, "~")
