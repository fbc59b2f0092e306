"""The kernels are compiled once for a processor, and where they cannot be, that is said."""

from __future__ import annotations

import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pertoken.errors import CompilerError, RecipeError
from pertoken.kernels import build
from pertoken.kernels.ops import Kernels
from pertoken.model.transformer import CausalLM
from pertoken.model_config import ModelConfig
from pertoken.training.compilation import compile_model
from pertoken.training.precision import Precision

CPU = torch.device("cpu")
CONFIG = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library.cache_clear()
    yield tmp_path / "pertoken" / "kernels"
    build.load_library.cache_clear()


def test_compiled_once_for_each_dtype_and_then_found(cold, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        Kernels(dtype)
    made = {path: path.stat().st_mtime_ns for path in cold.iterdir()}
    assert len(made) == 2
    build.load_library.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    Kernels(torch.float32)
    assert {path: path.stat().st_mtime_ns for path in cold.iterdir()} == made


def test_without_a_compiler_training_goes_on_and_says_so_once(cold, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    model = CausalLM(CONFIG.resolve(20))
    precision = Precision("bfloat16", CPU)
    compiled, remark = compile_model(model, "auto", precision, total_steps=10, before=None)
    assert not compiled
    assert not model.native
    assert "no C compiler" in remark
    with pytest.raises(RecipeError, match=r'train\.compile="on": no C compiler .* set it to "auto" or "off"'):
        compile_model(model, "on", precision, total_steps=10, before=None)


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
    made = build.load_library(torch.float32)._name
    build.load_library.cache_clear()
    monkeypatch.setenv("PERTOKEN_KERNELS_MARCH", baseline)
    named = build.load_library(torch.float32)._name
    assert made != named
    assert Path(made).read_bytes() != Path(named).read_bytes()


def test_an_instruction_set_that_the_compiler_does_not_know_is_its_complaint(cold, monkeypatch):
    monkeypatch.setenv("PERTOKEN_KERNELS_MARCH", "no-such-processor")
    with pytest.raises(CompilerError, match="no-such-processor"):
        Kernels(torch.float32)


def test_a_cache_that_cannot_be_written_is_named(cold, monkeypatch, tmp_path):
    (tmp_path / "pertoken").write_text("a file where the folder should be")
    with pytest.raises(CompilerError, match="pertoken"):
        Kernels(torch.float32)


@pytest.mark.parametrize(
    ("how", "dtype", "before", "expected"),
    [
        ("auto", "bfloat16", None, True),
        ("auto", "float32", None, True),
        ("auto", "float64", None, False),
        ("auto", "float32", False, False),  # as the run was started
        ("auto", "float32", True, True),
        ("on", "float32", False, True),
        ("off", "float32", True, False),
    ],
)
def test_the_decision(how, dtype, before, expected):
    model = CausalLM(CONFIG.resolve(20))
    compiled, remark = compile_model(model, how, Precision(dtype, CPU), total_steps=10, before=before)
    assert compiled == model.native == expected
    assert remark is None


def test_on_refuses_a_precision_without_kernels():
    with pytest.raises(RecipeError, match="bfloat16 and float32, not for float64"):
        compile_model(CausalLM(CONFIG.resolve(20)), "on", Precision("float64", CPU), total_steps=10, before=None)


def test_one_openmp_serves_kernels_and_torch():
    code = (
        "import torch; from pertoken.kernels.ops import Kernels; Kernels(torch.float32)\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
