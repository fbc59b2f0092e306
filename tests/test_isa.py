"""`make test-isa` tests what it says it does, or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import isa
import pytest

FOUND = {"torch": "AVX2", "threads": "1", "oneDNN": "Intel AVX2", "MKL's reproducible mode": "AVX2", "kernels": "ymm"}


@pytest.mark.numeric
def test_what_the_environment_asks_for_is_in_force():
    """In each of the settings' own processes, too."""
    names = isa.THREADS, isa.TORCH, isa.ONEDNN, isa.MKL, isa.KERNELS
    assert isa.ignored({name: os.environ[name] for name in names if name in os.environ}, isa.in_force()) == []


def test_the_smallest_setting_takes_effect(tmp_path):
    setting = isa.SETTINGS["baseline"]
    if missing := isa.lacking(setting):
        pytest.skip(f"this processor has no {missing}")
    shown = subprocess.run(
        [sys.executable, isa.__file__, "--show"],
        env={**os.environ, **setting.asked, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(shown.stdout)
    assert isa.ignored(setting.asked, found) == []
    assert found["torch"] == "DEFAULT"


@pytest.mark.parametrize("name", isa.SETTINGS["avx512"].asked)
def test_a_variable_without_effect_is_named(name):
    assert isa.ignored(isa.SETTINGS["avx2"].asked | {isa.THREADS: "1"}, FOUND) == []
    wrong = FOUND | {"MKL's reproducible mode": "OFF"}
    value = isa.SETTINGS["avx512"].asked[name]
    assert isa.ignored({name: value}, wrong) == [f"{name}={value}"]


def test_a_processor_that_lacks_a_setting_is_told_apart_from_one_that_passes(monkeypatch):
    monkeypatch.setitem(isa.SETTINGS, "no such", isa.Setting({}, frozenset({"no_such_flag"})))
    assert isa.run("no such", []) == ("not run: this processor has no no_such_flag", None)
    monkeypatch.setattr("sys.argv", ["isa.py", "--settings", "no such"])
    assert isa.main() == 1, "nothing was tested"


def test_a_failing_test_fails_its_setting(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\n@pytest.mark.numeric\ndef test_it():\n    assert False\n")
    arguments = ["--rootdir", str(tmp_path), "-c", str(Path(__file__).parents[1] / "pyproject.toml"), str(file)]
    text, passed = isa.run("native", arguments)
    assert passed is False
    assert text.startswith("1 tests, 1 failed")
