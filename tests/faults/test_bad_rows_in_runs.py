"""The table's line about malformed data: a training run of every kind in test_bad_rows.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults.conftest import Record
from tiny import World, pertoken

from pertoken.data.files import limits


def problem_with(kind: Any, world: World, folder: Path) -> str | None:
    """What is wrong with how a run met a bad row; None if nothing is."""
    folder.mkdir()
    path, out = kind.write(folder), folder / "run"
    settings = {
        "stage": kind.stage,
        "data__path": str(path),
        "data__eval_path": [],
        "data__store": str(folder / "kept"),
    }
    code, said, err = pertoken("train", world.write_recipe(out, **settings))
    where = f"{path}:{kind.line}: " if kind.line else f"{path}: "
    if code != 2 or "Traceback" in err:
        return f"{kind.name}: exit code {code}: {err[-1000:]}"
    if not err.startswith(f"error: {where}{kind.message}"):
        return f"{kind.name}: not named as {where}: {err[:1000]}"
    if out.exists() or "step 1 " in said:
        return f"{kind.name}: trained on"
    return None


@pytest.mark.torture
def test_no_bad_row_is_trained_on(world, tmp_path, record: Record, monkeypatch):
    bad = pytest.importorskip("faults.test_bad_rows")
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", bad.MAX_LINE_BYTES)
    problems = [problem_with(kind, world, tmp_path / f"{n}") for n, kind in enumerate(bad.KINDS)]
    record("a malformed row, file or encoding: named by file:line, none trained on", problems)
