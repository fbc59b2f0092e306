"""The benchmarks still run: each script's --help, the loss head whole, how figures are taken and claims judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
LIGHT = [
    "bench",
    "families",
    "finetune",
    "gpu",
    "head",
    "lora",
    "memory",
    "norm",
    "pretrain",
    "saving",
    "shakespeare",
    "smollm",
    "startup",
]  # these import no torch by themselves


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / f"{name}.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def common() -> ModuleType:
    return load("common")


@pytest.mark.parametrize("name", LIGHT)
def test_every_script_says_how_to_run_it(name):
    result = script(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{name}.py" in result.stdout
    assert "--out" in result.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in LIGHT and name != "prepare"])
def test_what_the_others_import_is_still_there(name):
    assert callable(load(name).main)


def test_every_script_is_named_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"`{name}.py`" not in readme] == []


def test_the_head_is_measured_with_errors_against_float64(tmp_path):
    few = ["--shapes", "64x16x300", "--shares", "0.5", "--rounds", 1, "--passes", 2]
    where = ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    result = script("head", *few, *where, "--only", "pertoken")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "head.json").read_text())
    assert [row["head"] for row in found["rows"]] == ["pertoken"]
    for row in found["rows"]:
        assert 0 < row["s"]["min"] <= row["s"]["median"] <= row["s"]["max"]
        assert all(0 < float(row[f"{what} error"]) < 0.02 for what in ("d hidden", "d head"))
    assert {line["verdict"] for line in found["claims"]} == {"not measured"}  # of another shape
    assert found["machine"]["threads"] == 1
    assert "pertoken" in (tmp_path / "out" / "head.md").read_text()


def test_a_process_is_stopped_after_a_step_and_its_memory_is_seen(common):
    code = "x = bytearray(200_000_000)\nfor i in range(1, 1000):\n print('step', i); import time; time.sleep(0.05)"
    finished = common.run(common.python("-c", code), stop_after=3)
    steps = finished.steps()
    assert 3 in steps
    assert max(steps) < 20
    assert steps[1] < steps[2] < steps[3] <= finished.wall_s
    assert 200e6 < finished.peak_bytes < 400e6


def test_only_lines_that_end_a_step_count(common):
    lines = ["step        16 samples, about 9", "step  3  loss 1.2  lr 1", "step 4\n", "steps 7 over 1 epoch"]
    assert common.Finished(1.0, 0, [(float(i), line) for i, line in enumerate(lines)]).steps() == {3: 1.0, 4: 2.0}


def test_a_process_that_fails_says_why(common):
    with pytest.raises(common.Failed, match="exit code 3: out of luck"):
        common.run(common.python("-c", "print('out of luck'); raise SystemExit(3)"))
    with pytest.raises(common.Failed, match=r"stopped after 0 s"):
        common.run(common.python("-c", "import time; time.sleep(60)"), limit_s=0.2)


def test_contenders_alternate_and_one_that_failed_is_left_out(common):
    seen = []

    def fail(round_: int) -> None:
        seen.append(f"c{round_}")
        raise common.Failed("no")

    contenders = {"a": lambda r: seen.append(f"a{r}"), "b": lambda r: seen.append(f"b{r}"), "c": fail}
    results, reasons = common.alternate(contenders, 2)
    assert seen == ["a0", "b0", "c0", "b1", "a1"]
    assert ({name: len(found) for name, found in results.items()}, reasons) == ({"a": 2, "b": 2, "c": 0}, {"c": "no"})


@pytest.mark.parametrize(
    ("measured", "bounds", "verdict"),
    [
        (2.4, {"at_least": 2.4}, "passed"),
        (2.39, {"at_least": 2.4}, "not passed"),
        (0.5, {"at_most": 0.5}, "passed"),
        (0.51, {"at_most": 0.5}, "not passed"),
        (None, {"at_most": 0.5}, "not measured"),
    ],
)
def test_a_claim_is_judged_by_its_bound(common, measured, bounds, verdict):
    assert common.claim("x", measured, **bounds)["verdict"] == verdict


@pytest.mark.slow
def test_a_resumed_run_is_timed_from_the_position_it_is_given(tmp_path):
    few = ["--samples", 3000, "--position", 1600, "--rounds", 1, "--models", "tiny"]
    result = script("startup", *few, "--out", tmp_path / "out", "--work", tmp_path / "work")
    assert result.returncode == 0, result.stderr
    (line,) = json.loads((tmp_path / "out" / "startup.json").read_text())["claims"]
    assert line["measured"] is not None
    rows = [
        json.loads(row) for row in (tmp_path / "work" / "3000" / "resumed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[100]["step"] == 101  # the step after 1,600 samples
    assert rows[100]["positions"] == [1600, 1616]


def test_what_is_missing_is_named_and_nothing_is_passed(tmp_path):
    result = script("bench", "--only", "smollm", "shakespeare", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["not_run"]) == {"smollm", "shakespeare"}
    assert "no --model given" in found["not_run"]["smollm"]
    assert "nowhere" in found["not_run"]["shakespeare"]
    assert found["claims"] == []
    assert "not run" in (tmp_path / "bench.md").read_text()
