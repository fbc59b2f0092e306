"""The numeric tests under other instruction sets: what a smaller processor, or another library, would compute.

    python tests/isa.py [--settings avx2,baseline] [files or other arguments of pytest]

Each setting is a process of its own. It fails if a test fails, and if the libraries do not do what it asks for.
What this processor lacks is not emulated: such a setting is reported as not run, and running none at all is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

CHOICE = "numeric and not slow and not torture"
THREADS, TORCH, ONEDNN, MKL, KERNELS = (
    "OMP_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "PERTOKEN_KERNELS_MARCH",
)


@dataclass(frozen=True)
class Setting:
    """`asked`: environment variables beside one thread; `needs`: the processor's flags, as in /proc/cpuinfo."""

    asked: dict[str, str]
    needs: frozenset[str] = field(default_factory=frozenset)


SETTINGS = {
    "native": Setting({}),
    "two threads": Setting({THREADS: "2"}),
    "avx2": Setting(
        {TORCH: "avx2", ONEDNN: "AVX2", MKL: "AVX2", KERNELS: "x86-64-v3"},
        frozenset({"avx2", "fma", "bmi2"}),
    ),
    "avx512": Setting(  # without bfloat16 and AMX
        {TORCH: "avx512", ONEDNN: "AVX512_CORE", MKL: "AVX512", KERNELS: "x86-64-v4"},
        frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ),
    "baseline": Setting(
        {TORCH: "default", ONEDNN: "SSE41", MKL: "COMPATIBLE", KERNELS: "x86-64"},
        frozenset({"sse4_1"}),
    ),
}

# What oneDNN calls itself, and the widest registers that the compiler may use.
_ONEDNN_NAMES = {
    "SSE41": "Intel SSE4.1",
    "AVX2": "Intel AVX2",
    "AVX512_CORE": "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions",
}
_WIDEST = {"x86-64": "xmm", "x86-64-v3": "ymm", "x86-64-v4": "zmm"}
_ONE_OF_EACH = """
import torch
torch.nn.functional.conv2d(torch.randn(2, 8, 8, 8), torch.randn(8, 8, 3, 3))  # oneDNN's
torch.randn(9, 48) @ torch.randn(48, 97)  # MKL's, where torch has it
"""


def in_force() -> dict[str, str]:
    """What computes in a process with this environment, found by computing."""
    import torch

    from pertoken.errors import CompilerError
    from pertoken.kernels.build import load_library

    loud = {**os.environ, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    said = subprocess.run([sys.executable, "-c", _ONE_OF_EACH], env=loud, capture_output=True, text=True).stdout
    onednn, mkl = re.search(r",cpu,isa:(.*)", said), re.search(r"MKL_VERBOSE [A-Z]*GEMM.* CNR:(\w+)", said)
    try:
        load_library(torch.float32)
        kernels = _widest_registers()
    except CompilerError:
        kernels = "no compiler"
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "oneDNN": onednn[1] if onednn else "not used",
        "MKL's reproducible mode": mkl[1] if mkl else "not used",
        "kernels": kernels,
    }


def _widest_registers() -> str:
    """That the kernels in this process were compiled for."""
    library = next((m[1] for m in re.finditer(r" (/\S+/pertoken/kernels/\S+\.so)$", _mapped(), re.MULTILINE)), None)
    if library is None or shutil.which("objdump") is None:
        return "unknown"
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    return next((name for name in ("zmm", "ymm", "xmm") if f"%{name}" in code), "none")


def _mapped() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""


def ignored(asked: dict[str, str], found: dict[str, str]) -> list[str]:
    """The variables in `asked` that `found` does not show to be in force."""
    mkl = found["MKL's reproducible mode"]
    obeyed = {
        THREADS: lambda value: found["threads"] == value,
        TORCH: lambda value: found["torch"].lower() == value,
        ONEDNN: lambda value: found["oneDNN"] in (_ONEDNN_NAMES[value], "not used"),
        # MKL takes a branch that it does not grant to this make of processor as AUTO.
        MKL: lambda value: mkl in (value, "not used") or (mkl == "AUTO" and value != "COMPATIBLE"),
        KERNELS: lambda value: found["kernels"] in (_WIDEST[value], "no compiler", "unknown"),
    }
    return [f"{name}={value}" for name, value in asked.items() if not obeyed[name](value)]


def lacking(setting: Setting) -> list[str]:
    """What this processor would need for it."""
    try:
        flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    return sorted(setting.needs - set(flags[1].split() if flags else ()))


def run(name: str, arguments: list[str]) -> tuple[str, bool | None]:
    """What to say of a setting, and whether it passed; None where it was not run."""
    setting = SETTINGS[name]
    if missing := lacking(setting):
        return f"not run: this processor has no {', '.join(missing)}", None
    asked = {THREADS: "1"} | setting.asked
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k not in (TORCH, ONEDNN, MKL, KERNELS)} | asked
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")  # keeps code of other settings apart
        shown = subprocess.run(
            [sys.executable, __file__, "--show"],
            env=environment | {"XDG_CACHE_HOME": folder},
            stdout=subprocess.PIPE,
            text=True,
        )
        if shown.returncode != 0:
            return "FAILED: torch does not start", False
        found = json.loads(shown.stdout)
        print(f"\n{name}: {found}", flush=True)
        if wrong := ignored(asked, found):
            return f"FAILED: has no effect: {', '.join(wrong)}", False
        report = Path(folder) / "report.xml"
        # `arguments` last: of two -m pytest takes the later one.
        command = [sys.executable, "-m", "pytest", "-q", "-m", CHOICE, f"--junitxml={report}", *arguments]
        if asked[THREADS] == "1":
            command += ["-n", "auto", "--dist", "loadfile"]
        code = subprocess.run(command, env=environment).returncode
        try:
            counts = ElementTree.parse(report).find("testsuite")
        except (OSError, ElementTree.ParseError):
            counts = None
    if counts is None:
        return f"FAILED: pytest exited with {code}", False
    bad = int(counts.attrib["failures"]) + int(counts.attrib["errors"])
    text = f"{counts.attrib['tests']} tests, {bad} failed, {counts.attrib['skipped']} skipped"
    return f"{text}, {time.monotonic() - start:.0f} s", code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names with commas between: %(default)s")
    parser.add_argument("--show", action="store_true", help="only what is in force in this environment, as JSON")
    options, arguments = parser.parse_known_args()
    if options.show:
        print(json.dumps(in_force()))
        return 0
    names = options.settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--settings: {', '.join(unknown)}: not one of {', '.join(SETTINGS)}")
    results = {name: run(name, arguments) for name in names}
    print()
    for name, (text, _) in results.items():
        print(f"{name:12} {text}")
    outcomes = {passed for _, passed in results.values()}
    return 0 if True in outcomes and False not in outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
