"""Compiles decoder.c for this machine, keeps the result in the cache, and opens it.

The environment variable PERTOKEN_KERNELS_MARCH names the instruction set to compile for, in place of this machine's
own: a value of the compiler's `-march`, such as x86-64-v3. The compiler's complaint about an unknown value is a
CompilerError.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from pertoken.errors import CompilerError

__all__ = ["load_library"]

_SOURCE = Path(__file__).with_name("decoder.c")
_TIMEOUT_S = 120
_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_Machines = tuple[list[str], ...]
# Tried in turn: not every compiler knows the processor, prefers wide vectors, or has OpenMP.
_MACHINE_FLAGS: _Machines = (
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-fopenmp"],
)


@cache
def load_library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for activations of `dtype`, bfloat16 or float32; compiled in about two seconds if not in the cache
    ($XDG_CACHE_HOME/pertoken/kernels, else ~/.cache/pertoken/kernels).

    OpenMP's threads are torch's own: both link against the one libgomp that is loaded already.
    Raises CompilerError where there is no C compiler, or none of its versions will do.
    """
    assert dtype in (torch.bfloat16, torch.float32), dtype
    if sys.platform == "win32":
        raise CompilerError("the kernels are not built on Windows")
    compiler = _compiler()
    if compiler is None:
        raise CompilerError("no C compiler (cc, gcc or clang) is on the PATH")
    define = "-DBFLOAT16" if dtype == torch.bfloat16 else "-DFLOAT32"
    machines = _machine_flags()
    target = _cache_folder() / f"{_key(compiler, machines, define)}.so"
    try:
        if not target.exists():
            _compile(compiler, machines, define, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CompilerError(f"{target}: {error.strerror or error}") from None


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


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pertoken" / "kernels"


def _key(compiler: str, machines: _Machines, define: str) -> str:
    """Of all that decides the result: a home folder may be shared between machines of several kinds."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        pass
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
    parts = (_SOURCE.read_text(encoding="utf-8"), repr((_FLAGS, machines)), define, version, processor)
    return hashlib.sha256("\0".join((*parts, platform.machine())).encode()).hexdigest()[:32]


def _compile(compiler: str, machines: _Machines, define: str, target: Path) -> None:
    """Built aside and renamed into place, so that two processes do not disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        aside = Path(folder) / "kernels.so"
        complaint = ""
        for machine in machines:
            command = [compiler, *_FLAGS, *machine, define, "-o", str(aside), str(_SOURCE), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                complaint = f"no result within {_TIMEOUT_S} s"
                continue
            if done.returncode == 0:
                aside.rename(target)
                return
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
    raise CompilerError(f"{compiler} cannot compile the kernels: {complaint.strip()}")
