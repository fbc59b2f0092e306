"""A disk that fails where a test says: failing_disk.c, compiled, and what tells it when to fail."""

from __future__ import annotations

import errno as codes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("failing_disk.c")


@dataclass(frozen=True)
class Fault:
    """Calls of one kind fail, on files below the folder whose path has `match` in it: the `nth` and the `times - 1`
    after it (0: all after it), with the errno of that name, or only late.

    With `bytes` it is a full disk instead: room for so many bytes more. With `free`, statvfs tells of so many bytes.
    With `descriptor` it is that one, whatever it is open on, instead of files.
    A line for every call goes to `log`.
    """

    call: str = ""
    errno: str = ""
    nth: int = 1
    times: int = 1
    match: str = ""
    bytes: int | None = None
    free: int | None = None
    descriptor: int | None = None
    sleep_ms: int = 0
    log: Path | None = None

    def environment(self, folder: Path) -> dict[str, str]:
        """For a process that has the shim loaded."""
        values = {
            "FOLDER": folder.resolve(),
            "CALL": self.call,
            "ERRNO": getattr(codes, self.errno) if self.errno else 0,
            "NTH": self.nth,
            "TIMES": self.times,
            "MATCH": self.match,
            "SLEEP_MS": self.sleep_ms,
            "BYTES": self.bytes,
            "FREE": self.free,
            "FD": self.descriptor,
            "LOG": self.log,
        }
        return {f"FAILING_DISK_{name}": str(value) for name, value in values.items() if value not in (None, "")}

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"disk full after {self.bytes} bytes"
        if self.free is not None:
            return f"{self.free} bytes left"
        often = {0: "for ever", 1: "once"}.get(self.times, f"{self.times} times")
        return f"{self.errno or f'{self.sleep_ms} ms'} at {self.call} {self.nth} of {self._where()}, {often}"

    def _where(self) -> str:
        return self.match or "all" if self.descriptor is None else f"descriptor {self.descriptor}"


def compile_shim(folder: Path) -> Path:
    """The shared library for LD_PRELOAD. Skips the test where there is no C compiler, or no LD_PRELOAD."""
    compiler = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (path := which(name))), None)
    if compiler is None or not Path("/proc/self/fd").is_dir():
        pytest.skip("needs a C compiler and Linux, to make a disk fail")
    target = folder / "failing_disk.so"
    command = [compiler, "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(target), str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=120)
    return target


def which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def calls_in(log: Path) -> list[tuple[str, str]]:
    """(call, path) of every call in a log, in their order."""
    return [(call, path) for call, _, path in (line.partition(" ") for line in log.read_text().splitlines())]
