"""Compiles decoder.c for this machine, keeps the result in the cache, and opens it.

A kept library's name ends with the checksum of its content, which is compared before it is opened: one that is empty,
cut short or otherwise damaged is compiled again and replaced.

The environment variable PERTOKEN_KERNELS_MARCH names the instruction set to compile for, in place of this machine's
own: a value of the compiler's `-march`, such as x86-64-v3. The machine must have it. The compiler's complaint about an
unknown value is a CompilerError.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from pertoken.errors import CompilerError
from pertoken.text import one_line

__all__ = ["load_library"]

_SOURCE = Path(__file__).with_name("decoder.c")
_VERSION_TIMEOUT_S = 15
_TIMEOUT_S = 60
_COMPLAINT_CHARS = 200
_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_Machines = tuple[list[str], ...]
# Tried in turn: not every compiler knows the processor or prefers wide vectors. Each has OpenMP, without which all
# would be one thread.
_MACHINE_FLAGS: _Machines = (
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-fopenmp"],
)


class _NoAnswer(CompilerError):
    """The compiler hangs, so that trying it with other flags or in another place would only take as long again."""


def load_library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for activations of `dtype`, bfloat16 or float32; compiled in about two seconds if not in the cache
    ($XDG_CACHE_HOME/pertoken/kernels, else ~/.cache/pertoken/kernels), or if that cannot be written.

    OpenMP's threads are torch's own: both link against the one libgomp that is loaded already.
    Raises CompilerError where there is no C compiler, or none of its versions will do; asked once in a process.
    """
    assert dtype in (torch.bfloat16, torch.float32), dtype
    found = _found(dtype)
    if isinstance(found, str):
        raise CompilerError(found)
    return found


@cache
def _found(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library, or why there is none: a failure is not tried again at every call."""
    if sys.platform == "win32":
        return "the kernels are not built on Windows"
    compiler = _compiler()
    if compiler is None:
        return "no C compiler (cc, gcc or clang) is on the PATH"
    command = [compiler, *_FLAGS, "-DBFLOAT16" if dtype == torch.bfloat16 else "-DFLOAT32"]
    try:
        key = _key(command)
        folder = _cache_folder()
        return (folder and _kept(folder, key)) or _made(command, folder, key)
    except CompilerError as error:
        return str(error)


def _machine_flags() -> _Machines:
    """Those to try, for the instruction set that the user names, if any."""
    march = os.environ.get("PERTOKEN_KERNELS_MARCH")
    if not march:
        return _MACHINE_FLAGS
    named = f"-march={march}"
    return ([named, "-mprefer-vector-width=512", "-fopenmp"], [named, "-fopenmp"], [named])


def _compiler() -> str | None:
    candidates = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def _cache_folder() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():  # others are to be ignored, says its specification
        return Path(base) / "pertoken" / "kernels"
    try:
        return Path.home() / ".cache" / "pertoken" / "kernels"
    except RuntimeError:  # no home
        return None


def _key(command: list[str]) -> str:
    """Of all that decides the result: a home folder may be shared between machines of several kinds."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        pass
    _, version = _run([command[0], "--version"], _VERSION_TIMEOUT_S)
    parts = (_source(), repr((command[1:], _machine_flags())), version, processor, platform.machine())
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:32]


def _source() -> str:
    return _SOURCE.read_text(encoding="utf-8")


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library that an earlier process left, if it is whole."""
    with suppress(OSError, CompilerError):  # not there, not to be read or not to be opened: another is made
        for path in sorted(folder.glob(f"{key}-*.so")):
            if path.is_file() and path.name == _name(key, path.read_bytes()):
                return _opened(path)
    return None


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _made(command: list[str], folder: Path | None, key: str) -> ctypes.CDLL:
    """Compiled aside and renamed into place, so that two processes do not disturb each other. Where that place cannot
    be written, or runs no code, it is compiled in the system's place for temporary files, and not kept."""
    why: Exception | None = None
    for place in (folder, None) if folder is not None else (None,):
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=place, prefix="pertoken-building-", ignore_cleanup_errors=True
            ) as aside:
                made = Path(aside) / "kernels.so"
                _compile(command, made)
                library = _opened(made)
                if place is not None:
                    with suppress(OSError):
                        _keep(made, place, key)
                return library
        except _NoAnswer:
            raise
        except (CompilerError, OSError) as error:
            why = error
    raise CompilerError(str(why) if isinstance(why, CompilerError) else f"the kernels cannot be kept: {why}")


def _keep(made: Path, folder: Path, key: str) -> None:
    """Under its final name, once it is on the disk; what an earlier process left damaged is removed."""
    kept = folder / _name(key, made.read_bytes())
    _sync(made)
    made.replace(kept)
    _sync(folder)
    for path in folder.glob(f"{key}-*.so"):
        if path != kept:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path) -> ctypes.CDLL:
    """Raises CompilerError where it lacks a kernel."""
    library = ctypes.CDLL(str(path))
    for name in re.findall(r"^void (\w+)\(", _source(), re.MULTILINE):
        if not hasattr(library, name):
            raise CompilerError(f"the compiled kernels lack {name}")
    return library


def _compile(command: list[str], out: Path) -> None:
    complaint = ""
    for machine in _machine_flags():
        code, said = _run([*command, *machine, "-o", str(out), str(_SOURCE), "-lm"], _TIMEOUT_S)
        if code == 0 and out.is_file():
            return
        lines = said.strip().splitlines() or [f"it ended with code {code}"]
        complaint = next((line for line in lines if "error" in line), lines[0])
    raise CompilerError(f"{command[0]} cannot compile the kernels: {one_line(complaint.strip()[:_COMPLAINT_CHARS])}")


def _run(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Its exit code and what it says, in whatever bytes. What takes too long is ended, with all that it has started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise CompilerError(f"{one_line(command[0])} cannot be run: {error}") from None
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:  # an interrupt too
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _NoAnswer(f"{command[0]} gave no answer within {timeout_s} s") from None
        raise
    return process.returncode, said.decode("utf-8", "replace")
