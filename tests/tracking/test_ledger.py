"""A lost or edited metrics.jsonl costs no checkpoint, and no row that can be kept or rebuilt."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import pertoken, row_of, rows_of, untimed

from pertoken.tracking.ledger import Ledger
from pertoken.tracking.metrics_file import MetricsFile

STEPS, SAVED = 10, 7
KNOWN = "epoch loss loss_sum num_tokens grad_norm lr samples positions".split()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    """A run of 10 steps, saved after 7, with float16's skipped steps and an evaluation."""
    run = tmp_path_factory.mktemp("ledger") / "run"
    recipe = world.write_recipe(
        run,
        train__max_steps=STEPS,
        train__eval_interval=4,
        train__dtype="float16",
        checkpoint__save_interval=SAVED,
        checkpoint__keep_last=9,
        checkpoint__keep_best=False,
    )
    assert pertoken("train", recipe)[0] == 0
    return run


def hashes(run: Path, step: int) -> list[str]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    ]


def interrupted(undisturbed: Path, folder: Path) -> Path:
    """As a crash after step 9 leaves it."""
    run = Path(shutil.copytree(undisturbed, folder / "run", symlinks=True))
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:9]))
    return run


def changed(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], None], list[int]]] = {  # and the steps whose rows are then to be rebuilt
    "deleted": (Path.unlink, [1, 2, 3, 4, 5, 6, 7]),
    "emptied": (lambda path: path.write_bytes(b""), [1, 2, 3, 4, 5, 6, 7]),
    "an edited line": (changed(lambda rows: [*rows[:3], rows[3].replace(b'"loss": ', b'"loss": 1'), *rows[4:]]), [4]),
    "an edited learning rate": (changed(lambda rows: [*rows[:6], rows[6].replace(b'"lr": ', b'"lr": 1')]), [7]),
    "truncated": (changed(lambda rows: [*rows[:4], rows[4][:50]]), [5, 6, 7]),
    "a line removed": (changed(lambda rows: rows[:2] + rows[3:]), [3]),
    "two lines swapped": (changed(lambda rows: [rows[0], rows[2], rows[1], *rows[3:]]), []),
    "a line twice": (changed(lambda rows: [*rows[:2], rows[1], *rows[2:]]), []),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 100), [1, 2, 3, 4, 5, 6, 7]),
    "garbage in between": (changed(lambda rows: [*rows[:2], b"\xff\0\n", *rows[2:]]), []),
    "Windows line ends": (changed(lambda rows: [row.replace(b"\n", b"\r\n") for row in rows]), []),
    "no newline at its end": (changed(lambda rows: [*rows[:6], rows[6].strip()]), []),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_metrics_file_costs_no_step_and_no_row_that_can_be_kept(undisturbed, tmp_path, damage):
    change, rebuilt = DAMAGES[damage]
    run = interrupted(undisturbed, tmp_path)
    path = run / "metrics.jsonl"
    change(path)
    damaged = path.read_bytes() if path.exists() else b""
    recipe = undisturbed.with_suffix(".toml")
    code, out, err = pertoken("train", recipe, f"out_dir={run}", "--resume")
    assert code == 0, err
    assert hashes(run, STEPS) == hashes(undisturbed, STEPS)
    rows, expected = untimed(rows_of(run)), untimed(rows_of(undisturbed))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "row N is line N"
    assert [row["step"] for row in rows if row.get("rebuilt")] == rebuilt
    for row, other in zip(rows, expected, strict=True):
        extra = [key for key in ("eval_loss", "eval_bits_per_byte", "skipped") if key in other]
        keys = [*KNOWN, *extra] if row.get("rebuilt") else list(other)
        assert {key: row[key] for key in keys} == {key: other[key] for key in keys}
    said = " ".join(out.split())
    assert "metrics.jsonl: not as the run wrote it" in said
    kept = list(run.glob("metrics.jsonl.damaged-*"))
    assert [file.read_bytes() for file in kept] == ([damaged] if damaged else [])


def test_a_mended_file_is_not_mended_again_by_the_next_resume(undisturbed, tmp_path):
    run = interrupted(undisturbed, tmp_path)
    path, folder = run / "metrics.jsonl", run / "checkpoints" / f"step-{SAVED:08d}"
    DAMAGES["an edited line"][0](path)
    first = MetricsFile(path, last_step=SAVED, ledger=Ledger.load(folder, SAVED))
    first.close()
    before = path.read_bytes()
    second = MetricsFile(path, last_step=SAVED, ledger=Ledger.load(folder, SAVED))
    second.close()
    assert (first.remark is None, second.remark) == (False, None)
    assert path.read_bytes() == before


def test_an_intact_file_is_left_as_it_is_and_nothing_is_said(undisturbed, tmp_path):
    run = interrupted(undisturbed, tmp_path)
    code, out, err = pertoken("train", undisturbed.with_suffix(".toml"), f"out_dir={run}", "--resume")
    assert code == 0, err
    assert "not as the run wrote it" not in out
    assert untimed(rows_of(run)) == untimed(rows_of(undisturbed))


def test_without_a_copy_in_the_checkpoint_what_is_lost_is_marked_and_the_resume_continues(undisturbed, tmp_path):
    """Checkpoints of earlier versions have none."""
    run = interrupted(undisturbed, tmp_path)
    folder = run / "checkpoints" / f"step-{SAVED:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop("metrics.ledger")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.ledger").unlink()
    DAMAGES["a line removed"][0](run / "metrics.jsonl")
    code, out, err = pertoken("train", undisturbed.with_suffix(".toml"), f"out_dir={run}", "--resume")
    assert code == 0, err
    assert "rows of steps 3 are lost" in " ".join(out.split())
    assert hashes(run, STEPS) == hashes(undisturbed, STEPS)
    rows = rows_of(run)
    assert rows[2] == {"step": 3, "lost": True}
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_rows_of_562500_steps_take_less_than_70_bytes_a_step_in_a_checkpoint():
    ledger = Ledger()
    for step in range(1, 1001):
        ledger.add(row_of(step), b"%d" % step)
    size = sum(column.numel() * column.element_size() for column in ledger.tensors().values())
    assert size < 70 * 1000
