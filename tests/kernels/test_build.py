"""The kernels are compiled once for a processor, and where they cannot be, that is said."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.engines.choice import Choice
from pertoken.engines.choose import choose_engine
from pertoken.errors import CompilerError, RecipeError
from pertoken.kernels import build
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

CPU = torch.device("cpu")
FLAGS = build._FLAGS
CONFIG = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded. What is compiled is compiled quickly, not well."""
    monkeypatch.setattr(build, "_FLAGS", ["-O0", *FLAGS[1:]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._found.cache_clear()
    yield tmp_path / "pertoken" / "kernels"
    build._found.cache_clear()


def chosen(model: CausalLM, how: str, dtype: str = "float32", before: bool | None = None) -> Choice:
    return choose_engine(model, how, dtype=dtype, device=CPU, total_steps=10, before=before)


def test_compiled_once_for_each_dtype_and_then_found(cold, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        Kernels(dtype)
    made = {path: path.stat().st_mtime_ns for path in cold.iterdir()}
    assert len(made) == 2
    build._found.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    Kernels(torch.float32)
    assert {path: path.stat().st_mtime_ns for path in cold.iterdir()} == made


def test_without_a_compiler_training_goes_on_and_says_so_once(cold, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    model = CausalLM(CONFIG.resolve(20))
    choice = chosen(model, "auto", "bfloat16")
    assert (choice.compiled, choice.engine) == (False, "plain")
    assert "no C compiler" in choice.remark
    with pytest.raises(RecipeError, match=r'train\.engine="cpu": no C compiler .* set it to "auto" or "plain"'):
        chosen(model, "cpu", "bfloat16")


def test_a_compiler_that_fails_is_quoted(cold, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'decoder.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(CompilerError, match="no such thing"):
        Kernels(torch.float32)
    assert list(cold.iterdir()) == []


def test_an_instruction_set_that_the_user_names_is_compiled_for_and_kept_by_itself(cold, monkeypatch):
    baseline = {"x86_64": "x86-64", "aarch64": "armv8-a"}.get(platform.machine())
    if baseline is None:
        pytest.skip("no name of an instruction set is known for this machine")
    Kernels(torch.float32)
    build._found.cache_clear()
    monkeypatch.setenv("PERTOKEN_KERNELS_MARCH", baseline)
    Kernels(torch.float32)
    for_this_machine, named = cold.iterdir()
    assert for_this_machine.name.split("-")[0] != named.name.split("-")[0]
    assert for_this_machine.read_bytes() != named.read_bytes()


def test_an_instruction_set_that_the_compiler_does_not_know_is_its_complaint(cold, monkeypatch):
    monkeypatch.setenv("PERTOKEN_KERNELS_MARCH", "no-such-processor")
    with pytest.raises(CompilerError, match="no-such-processor"):
        Kernels(torch.float32)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "longer": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_replaced_and_then_found(cold, monkeypatch, damage):
    Kernels(torch.float32)
    (kept,) = cold.iterdir()
    good = kept.read_bytes()
    kept.unlink()  # not written over: it is mapped
    kept.write_bytes(damage(good))
    build._found.cache_clear()
    Kernels(torch.float32)
    (replaced,) = cold.iterdir()
    assert replaced.read_bytes() == good
    build._found.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    Kernels(torch.float32)


def test_a_damaged_library_that_another_content_replaces_is_removed(cold):
    Kernels(torch.float32)
    (kept,) = cold.iterdir()
    key = kept.name.split("-")[0]
    (cold / f"{key}-{32 * '0'}.so").write_bytes(b"another compiler's, damaged")
    kept.rename(cold / f"{key}-{32 * 'f'}.so")
    build._found.cache_clear()
    Kernels(torch.float32)
    assert [path.name for path in cold.iterdir()] == [kept.name]


def test_two_processes_replace_a_damaged_library_at_once(cold, monkeypatch):
    monkeypatch.setattr(build, "_FLAGS", FLAGS)  # theirs
    Kernels(torch.float32)
    (kept,) = cold.iterdir()
    good = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(b"")
    code = (
        "import torch; from pertoken.kernels.ops import Kernels\nKernels(torch.float32).glu_forward(torch.ones(2, 2))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [path.read_bytes() for path in cold.iterdir()] == [good]


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    compiler = folder / "cc"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


OUTPUT = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done; '
VERSION = '[ "$1" = --version ] && exit 0; '
COMPILERS = {
    "no program": ("neither a script nor a program", "cannot be run: .*Exec format error"),
    "no interpreter": ("#!/no/such/interpreter\n", "cannot be run: .*No such file"),
    "hangs": (f"#!/bin/sh\n{VERSION}sleep 600", "gave no answer within 1 s"),
    "hangs at its version": ("#!/bin/sh\nsleep 600", "gave no answer within 1 s"),
    "prints bytes": (
        "#!/bin/sh\nprintf 'error: \\377\\376 \\033[31m' >&2\nexit 1",
        "cannot compile the kernels: error: ",
    ),
    "prints lines": ("#!/bin/sh\nprintf 'one\\ntwo\\n' >&2\nexit 1", "cannot compile the kernels: one$"),
    "is killed": ("#!/bin/sh\nkill -9 $$", "ended with code -9"),
    "makes nothing": ("#!/bin/sh\nexit 0", "ended with code 0"),
    "makes no library": (f"#!/bin/sh\n{VERSION}{OUTPUT}echo nonsense > $out", "invalid ELF header|too short"),
    "makes a library without kernels": (
        f"#!/bin/sh\n{VERSION}{OUTPUT}echo | {shutil.which('cc')} -shared -fPIC -x c - -o $out",
        "the compiled kernels lack norm_forward",
    ),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the messages are Linux's")
@pytest.mark.parametrize(("script", "why"), COMPILERS.values(), ids=COMPILERS)
def test_a_compiler_that_fails_in_any_way_means_the_plain_path_and_one_line(cold, monkeypatch, tmp_path, script, why):
    use_compiler(monkeypatch, tmp_path, script)
    monkeypatch.setattr(build, "_TIMEOUT_S", 1)
    monkeypatch.setattr(build, "_VERSION_TIMEOUT_S", 1)
    model = CausalLM(CONFIG.resolve(20))
    started = time.monotonic()
    choice = chosen(model, "auto")
    assert time.monotonic() - started < 30
    assert not choice.compiled
    assert choice.remark.isprintable()
    assert re.search(why, choice.remark), choice.remark
    assert not cold.exists() or list(cold.iterdir()) == []
    with pytest.raises(RecipeError, match=r"train\.engine"):
        chosen(model, "cpu")


def test_a_compiler_that_hangs_is_ended_with_what_it_started(cold, monkeypatch, tmp_path):
    use_compiler(monkeypatch, tmp_path, f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child\nwait")
    monkeypatch.setattr(build, "_VERSION_TIMEOUT_S", 1)
    with pytest.raises(CompilerError, match="no answer"):
        Kernels(torch.float32)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                break  # ended, and nobody has asked for it yet
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the compiler's child lives")


def test_a_failure_is_not_tried_again_at_every_call(cold, monkeypatch, tmp_path):
    use_compiler(monkeypatch, tmp_path, f"#!/bin/sh\necho >> {tmp_path}/runs; exit 1")
    for _ in range(3):
        with pytest.raises(CompilerError):
            Kernels(torch.float32)
    first = len((tmp_path / "runs").read_text())
    with pytest.raises(CompilerError):
        Kernels(torch.float32)
    assert len((tmp_path / "runs").read_text()) == first <= 1 + 2 * len(build._MACHINE_FLAGS)


def _a_file_in_its_place(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")


def _no_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def _refused(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, cache: Path, code: int) -> None:
    """A call of `owner` fails where it is about the cache."""
    real = getattr(owner, name)

    def refused(path: Any, *args: Any, **settings: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if where.startswith(str(cache.parent)):
            raise OSError(code, os.strerror(code))
        return real(path, *args, **settings)

    monkeypatch.setattr(owner, name, refused)


PLACES: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "a file in its place": _a_file_in_its_place,
    "no home": _no_home,
    "not to be written": lambda patch, cache: _refused(patch, Path, "mkdir", cache, errno.EACCES),
    "read-only": lambda patch, cache: _refused(patch, os, "mkdir", cache, errno.EROFS),
    "full": lambda patch, cache: _refused(patch, os, "fsync", cache, errno.ENOSPC),
    "without a rename": lambda patch, cache: _refused(patch, Path, "replace", cache, errno.ENOSPC),
    "runs no code": lambda patch, cache: _refused(patch, build.ctypes, "CDLL", cache, errno.EPERM),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_where_nothing_can_be_kept_kernels_are_compiled_all_the_same(cold, monkeypatch, place):
    place(monkeypatch, cold)
    model = CausalLM(CONFIG.resolve(20))
    choice = chosen(model, "auto")
    assert choice.compiled
    assert choice.remark is None
    Kernels(torch.float32).add_residual(torch.ones(2, 2), torch.ones(2, 2))
    assert not cold.is_dir() or list(cold.iterdir()) == []


def test_where_no_place_can_be_written_that_is_said(cold, monkeypatch):
    _a_file_in_its_place(monkeypatch, cold)
    monkeypatch.setattr(build.tempfile, "tempdir", str(cold / "none"))
    with pytest.raises(CompilerError, match=r"the kernels cannot be kept: .*none"):
        Kernels(torch.float32)


@pytest.mark.parametrize(
    ("how", "dtype", "before", "expected"),
    [
        ("auto", "bfloat16", None, True),
        ("auto", "float32", None, True),
        ("auto", "float64", None, False),
        ("auto", "float32", False, False),  # as the run was started
        ("auto", "float32", True, True),
        ("cpu", "float32", False, True),
        ("plain", "float32", True, False),
    ],
)
def test_the_decision(how, dtype, before, expected):
    choice = chosen(CausalLM(CONFIG.resolve(20)), how, dtype, before)
    assert choice.compiled == expected
    assert choice.engine == ("cpu" if expected else "plain")
    assert choice.remark is None


def test_cpu_refuses_a_precision_without_kernels():
    with pytest.raises(RecipeError, match="bfloat16 and float32, not for float64"):
        chosen(CausalLM(CONFIG.resolve(20)), "cpu", "float64")


def test_one_openmp_serves_kernels_and_torch():
    code = (
        "import torch; from pertoken.kernels.ops import Kernels; Kernels(torch.float32)\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
