"""Standard output and standard error of a command: what happens when nobody can be shown anything any more.

A terminal closes, `| head` has seen enough, the disk under a log is full, a stream was closed from the start. For
training, output is never worth a step: what cannot be shown is dropped, which is said once. For a command whose result
is its output, OutputLost ends it, so that the exit code tells. Standard error is always dropped.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from pertoken.errors import OutputLost

__all__ = ["Output", "own_streams"]


class Output:
    """A text stream around `stream` (None: closed from the start) whose failures are dropped or OutputLost, nothing
    else. Each write is tried, so a log continues when its disk has room again."""

    def __init__(self, stream: TextIO | None, *, needed: bool, told: Output | None = None) -> None:
        """`needed`: raise OutputLost. Else the first failure is said to `told`."""
        self._stream = stream
        self._needed = needed
        self._told = told
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # letters that its encoding lacks

    def drop_failures(self) -> None:
        """From now on, what cannot be written is not needed."""
        self._needed = False

    def write(self, text: str) -> int:
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: OSError | ValueError) -> None:
        if self._needed:
            reader_left = isinstance(error, BrokenPipeError)
            raise OutputLost("" if reader_left else f"standard output: could not be written ({error})") from None
        if self._told is not None:
            told, self._told = self._told, None
            told.write(f"standard output: {error}; what cannot be shown is dropped, the work continues\n")
            told.flush()

    def let_go(self) -> None:
        """Write what is left. Where that fails it is lost for good, so that Python does not try again as it ends, and
        end with an exit code of its own."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, cast(TextIO, self._stream).fileno())
                os.close(nothing)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("the stream was closed from the start")
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # an AttributeError where there is none


@contextmanager
def own_streams() -> Iterator[Output]:
    """`sys.stdout` and `sys.stderr` as Outputs while inside; the former, needed until it is told otherwise."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    err = Output(sys.stderr, needed=False)
    out = Output(sys.stdout, needed=True, told=err)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        out.let_go()
        err.let_go()


def _fill_closed_descriptors() -> None:
    """Open /dev/null where a standard stream is closed: else the next file would get its number, and whatever a C
    library prints there would end up in a checkpoint."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
                os.set_inheritable(opened, True)
