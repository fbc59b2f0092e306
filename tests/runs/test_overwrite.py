"""--overwrite removes what the run wrote, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import pertoken, rows_of

from pertoken.checkpoints.read import newest_checkpoint, prune
from pertoken.runs.files import remove_run
from pertoken.tracking.run_files import LIST, claim


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run of 4 steps with three checkpoints, logged to TensorBoard."""
    run = tmp_path_factory.mktemp("overwrite") / "run"
    recipe = world.write_recipe(
        run,
        train__max_steps=4,
        checkpoint__save_interval=2,
        checkpoint__keep_last=9,
        log__trackers=["tensorboard"],
    )
    assert pertoken("train", recipe)[0] == 0
    assert (run / "tensorboard").is_dir()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def overwritten(finished: Path, run: Path, *more: str) -> str:
    """What `train --overwrite` said, for a run of two steps that saves once."""
    settings = ("train.max_steps=2", "log.trackers=[]", *more)
    code, out, err = pertoken("train", finished.with_suffix(".toml"), f"out_dir={run}", "--overwrite", *settings)
    assert code == 0, err
    return " ".join(out.split())


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


OTHERS = (
    "notes.txt",
    "wandb/run-1/output.log",
    "tensorboard/other/events.out.tfevents.1",
    "tensorboard/events.out.tfevents.0.mine",
    "checkpoints/epoch-1/model.pt",
    "checkpoints/step-00000001/weights.bin",
    "checkpoints/step-00000002/evaluated.json",
)


def test_files_of_others_stay_and_are_said_and_all_of_the_run_goes(finished, run):
    for name in OTHERS:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("not pertoken's")
    said = overwritten(finished, run)
    kept = {n for n in files_in(run) if not (run / n).is_symlink() and (run / n).read_bytes() == b"not pertoken's"}
    assert {Path(name).name for name in kept} == {Path(name).name for name in OTHERS}
    for entry in ("notes.txt", "wandb", "tensorboard", "checkpoints/epoch-1", "checkpoints/step-00000002"):
        assert entry in said.split("did not write it:")[1]
    assert len(rows_of(run)) == 2
    assert not list(run.rglob("step-00000004"))
    ours = [name for name in files_in(run) - kept if not name.startswith("checkpoints/step-00000002/")]
    assert sorted(ours) == [LIST, "checkpoints/best", "events.jsonl", "metrics.jsonl", "recipe.toml"]


def test_nothing_is_said_where_nothing_is_left(finished, run):
    assert "left in" not in overwritten(finished, run)
    assert not (run / "tensorboard").exists()


def test_a_folder_with_no_more_than_other_tools_files_is_no_run(finished, tmp_path):
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "x").write_text("not pertoken's")
    code, _, err = pertoken("train", finished.with_suffix(".toml"), f"out_dir={tmp_path / 'run'}", "log.trackers=[]")
    assert code == 0, err


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_a_recipe_and_metrics_that_are_not_a_runs_are_kept_under_another_name(finished, tmp_path, how):
    run = tmp_path / "run"
    run.mkdir()
    text = "# mine\n" + finished.with_suffix(".toml").read_text()
    (run / "recipe.toml").write_text(text)
    (run / "metrics.jsonl").write_text('{"accuracy": 0.5}\n')
    settings = ("train.max_steps=2", "log.trackers=[]")
    code, out, err = pertoken("train", finished.with_suffix(".toml"), f"out_dir={run}", how, *settings)
    assert code == 0, err
    assert (run / "recipe.toml.kept-1").read_text() == text
    assert (run / "metrics.jsonl.kept-1").read_text() == '{"accuracy": 0.5}\n'
    assert "not written by pertoken; it is recipe.toml.kept-1 now" in " ".join(out.split())
    assert len(rows_of(run)) == 2


def test_a_plain_recipe_of_the_users_own_is_kept_too(finished, tmp_path):
    """Formatted as pertoken formats its own, but with what a user writes alone."""
    run = tmp_path / "run"
    run.mkdir()
    text = 'stage = "pretrain"\nout_dir = "other"\n\n[data]\npath = "texts"\ntokenizer = "tok"\n'
    (run / "recipe.toml").write_text(text)
    settings = ("train.max_steps=2", "log.trackers=[]")
    code, _, err = pertoken("train", finished.with_suffix(".toml"), f"out_dir={run}", "--overwrite", *settings)
    assert code == 0, err
    assert (run / "recipe.toml.kept-1").read_text() == text


def test_of_a_run_without_a_list_what_is_told_by_its_content_goes(finished, run):
    """As those of earlier versions are."""
    (run / LIST).unlink()
    said = overwritten(finished, run)
    assert "did not write it: tensorboard" in said
    assert not [name for name in files_in(run) if "kept" in name or "step-00000004" in name]


def test_links_are_removed_as_links_and_never_followed(finished, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / "checkpoints", elsewhere / "checkpoints")
    shutil.move(run / "tensorboard", elsewhere / "tensorboard")
    shutil.move(run / "metrics.jsonl", elsewhere / "metrics.jsonl")
    for name in ("checkpoints", "tensorboard", "metrics.jsonl"):
        (run / name).symlink_to(elsewhere / name)
    before = files_in(elsewhere)
    overwritten(finished, run)
    assert files_in(elsewhere) == before
    assert not (run / "checkpoints").is_symlink()
    assert not (run / "metrics.jsonl").is_symlink()
    assert newest_checkpoint(run)[0].step == 2


@pytest.mark.parametrize("name", ["../outside.txt", "/{outside}", "", ".", "tensorboard/../../outside.txt"])
def test_a_list_that_names_files_outside_is_not_obeyed(run, tmp_path, name):
    outside = tmp_path / "outside.txt"
    outside.write_text("not pertoken's")
    (run / LIST).write_text(json.dumps({"written": [name.format(outside=str(outside)[1:])]}))
    remove_run(run)
    assert outside.exists()
    assert run.exists()


class Crash(BaseException):
    pass


def test_a_crash_anywhere_leaves_a_run_to_resume_or_one_to_overwrite_and_nothing_of_others(finished, tmp_path):
    resumable, calls = 0, 0
    while True:
        run = Path(shutil.copytree(finished, tmp_path / f"run-{calls}", symlinks=True))
        (run / "checkpoints" / "step-00000002" / "mine").write_text("not pertoken's")
        left = calls

        def fails(real):
            def call(*args, **kwargs):
                nonlocal left
                if not left:
                    raise Crash
                left -= 1
                return real(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "rmdir"), (os, "unlink")):
                patch.setattr(owner, name, fails(getattr(owner, name)))
            try:
                remove_run(run)
                crashed = False
            except Crash:
                crashed = True
        checkpoint, _ = newest_checkpoint(run)
        if checkpoint is not None:
            assert checkpoint.step == 4
            assert (run / "metrics.jsonl").exists()
            resumable += 1
        assert remove_run(run) == ["checkpoints/step-00000002"]
        assert files_in(run) == {LIST, "checkpoints/step-00000002/mine"}
        calls += 1
        if not crashed:
            break
    assert resumable > 5
    assert calls > 20


def test_pruning_and_a_copied_best_leave_what_others_put_into_a_checkpoint(run):
    (run / "checkpoints" / "step-00000002" / "mine").write_text("not pertoken's")
    (run / "checkpoints" / "best").unlink()
    prune(run, keep_last=1, newest=4)
    assert [path.name for path in (run / "checkpoints" / "step-00000002").iterdir()] == ["mine"]


def test_what_wandb_wrote_for_the_run_goes_and_other_runs_of_it_stay(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    run = tmp_path / "run"
    (run / "wandb" / "run-other").mkdir(parents=True)
    (run / "wandb" / "run-other" / "log").write_text("not pertoken's")
    settings = (f"out_dir={run}", "train.max_steps=2", 'log.trackers=["wandb"]')
    code, _, err = pertoken("train", finished.with_suffix(".toml"), *settings)
    assert code == 0, err
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    overwritten(finished, run)
    assert files_in(run / "wandb") == {"run-other/log"}


def test_the_list_is_whole_after_every_claim_and_names_each_path_once(tmp_path):
    for _ in range(2):
        claim(tmp_path, [tmp_path / "b", tmp_path / "a", tmp_path.parent / "elsewhere"])
    assert json.loads((tmp_path / LIST).read_text()) == {"format_version": 1, "written": ["a", "b"]}
