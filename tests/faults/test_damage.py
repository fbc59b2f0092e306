"""Damaged checkpoints: named, left for inspection, and done without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from faults import disk
from faults.conftest import Record
from faults.damage import DAMAGES, contents, copy_of, trial
from faults.failing_disk import Fault
from faults.harness import Workshop, difference, steps_saved, whole_steps

QUICK = [
    ("model.safetensors", "a bit flipped"),
    ("optimizer.safetensors", "truncated"),
    ("trainer_state.json", "a link to outside"),
    ("manifest.json", "emptied"),
    ("tokenizer.json", "missing"),
    ("manifest.json", "a folder in its place"),
]


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> Path:
    with workshop.desk() as desk:
        return workshop.reference(desk, disk.recipe_of(workshop))


def tried(workshop: Workshop, reference: Path, damages: list[tuple[str, str]]) -> list[str | None]:
    recipe = disk.recipe_of(workshop)
    return workshop.each(lambda desk, damage: trial(desk, *damage, recipe, reference), damages)


def test_a_damaged_newest_checkpoint_is_named_left_and_done_without(workshop, reference):
    lost = [problem for problem in tried(workshop, reference, QUICK) if problem]
    assert not lost, "\n".join(lost)


@pytest.mark.torture
def test_no_damage_to_any_file_loses_anything(workshop, reference, record: Record):
    files = [path.name for path in sorted(steps_saved(reference)[disk.STEPS].iterdir())]
    damages = [(file, damage) for file in files for damage in DAMAGES]
    record(f"each file of the newest checkpoint: {', '.join(DAMAGES)}", tried(workshop, reference, damages))


@pytest.mark.parametrize(("interval", "left"), [(1, [7]), (2, [6])])
def test_a_damaged_newest_never_costs_the_last_whole_one(workshop, reference, interval, left):
    """With one checkpoint kept, and a disk that fails when the damaged step is saved again."""
    with workshop.desk() as desk:
        run = desk.new()
        newest = copy_of(reference, run)
        (newest / "model.safetensors").unlink()
        damaged = contents(newest)
        fault = Fault("open", "ENOSPC", times=0, match=f".writing-{newest.name}")
        settings = ("checkpoint.keep_last=1", f"checkpoint.save_interval={interval}")
        ended = desk.run(
            "train", disk.recipe_of(workshop), f"out_dir={run}", "--resume", *settings, fault=fault, below=run
        )
        assert ended.code == 2, ended.said
        assert whole_steps(run) == left
        assert any(contents(folder) == damaged for folder in (run / "checkpoints").iterdir())
        assert disk.resumed(desk, disk.recipe_of(workshop), run, reference) is None


def test_where_every_checkpoint_is_damaged_nothing_is_deleted_and_nothing_trained(workshop, reference):
    with workshop.desk() as desk:
        run = desk.new()
        copy_of(reference, run)
        for folder in steps_saved(run).values():
            (folder / "optimizer.safetensors").write_bytes(b"")
        before = {folder.name: contents(folder) for folder in steps_saved(run).values()}
        ended = desk.run("train", disk.recipe_of(workshop), f"out_dir={run}", "--resume")
        assert ended.code == 2, ended.said
        assert "Traceback" not in ended.said
        for folder in steps_saved(run).values():
            assert f"{folder}: not used" in ended.said.replace("\n", "")
        assert {folder.name: contents(folder) for folder in steps_saved(run).values()} == before


def _point_outside(newest: Path, outside: Path) -> None:
    """The manifest lists a file that is elsewhere."""
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "model.safetensors").rename(outside / "model.safetensors")
    manifest["files"][f"../../../{outside.name}/model.safetensors"] = manifest["files"].pop("model.safetensors")
    (newest / "manifest.json").write_text(json.dumps(manifest))


def _list_nothing(newest: Path, outside: Path) -> None:
    """Where nothing is listed, nothing is missing."""
    (newest / "manifest.json").write_text('{"files": {}}')
    (newest / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [_point_outside, _list_nothing])
def test_a_checkpoint_that_leads_out_of_its_folder_or_lists_nothing_is_not_used(workshop, reference, spoil):
    with workshop.desk() as desk:
        run = desk.new()
        newest = copy_of(reference, run)
        outside = run.with_name(f"{run.name}-outside")
        outside.mkdir()
        spoil(newest, outside)
        there = sorted(path.name for path in outside.rglob("*"))
        ended = desk.run("train", disk.recipe_of(workshop), f"out_dir={run}", "--resume")
        assert ended.code == 0, ended.said
        assert f"{newest}: not used" in ended.said.replace("\n", "")
        assert difference(run, reference) is None
        assert sorted(path.name for path in outside.rglob("*")) == there
        shutil.rmtree(outside)


def test_a_checkpoint_moved_elsewhere_with_a_link_in_its_place_is_not_deleted_through_the_link(workshop, reference):
    with workshop.desk() as desk:
        run = desk.new()
        shutil.rmtree(copy_of(reference, run))
        (newest,) = steps_saved(run).values()
        elsewhere = run.with_name(f"{run.name}-elsewhere")
        newest.rename(elsewhere)
        newest.symlink_to(elsewhere)
        before = contents(elsewhere)
        ended = desk.run("train", disk.recipe_of(workshop), f"out_dir={run}", "--resume", "checkpoint.keep_last=1")
        assert "Traceback" not in ended.said
        assert contents(elsewhere) == before
        assert ended.code == 0, ended.said
        assert difference(run, reference) is None
