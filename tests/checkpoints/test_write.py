"""Saving costs a copy, a failure costs nothing but itself, and a resume knows when it would not continue the run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pertoken, row_of, rows_of, untimed

from pertoken import train
from pertoken.checkpoints import read as checkpoint_module
from pertoken.checkpoints import saver as saving
from pertoken.checkpoints import snapshot
from pertoken.errors import CheckpointError, Interrupted
from pertoken.tracking.listener import Listener
from pertoken.tracking.metrics_file import MetricsFile

DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Told(Listener):
    """Remembers, and does `at[step]` after that step."""

    def __init__(self, at=None):
        self.messages, self.saves, self.at = [], [], at or {}

    def message(self, text):
        self.messages.append(text)

    def saved(self, folder):
        self.saves.append(folder.name)

    def stepped(self, row, summary):
        self.at.get(row.step, lambda: None)()


def contents(run, step):
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def steps_saved(run):
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def repair_manifest(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def test_what_is_saved_in_the_background_is_what_is_saved_at_once(world, tmp_path):
    for name in (True, False):
        recipe = world.recipe(
            tmp_path / str(name), train__max_steps=6, checkpoint__save_interval=2, checkpoint__async_save=name
        )
        told = Told()
        train(recipe, listener=told)
        assert told.saves == [f"step-{n:08d}" for n in (2, 4, 6)]
    for step in (4, 6):
        assert contents(tmp_path / "True", step) == contents(tmp_path / "False", step)


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(world, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    keys = {"train__max_steps": 6, "checkpoint__save_interval": 2, "checkpoint__keep_last": 9}
    train(world.recipe(whole, **keys))
    three_steps_later, write, saw = threading.Event(), saving.write_part, []

    def slow_write(snapshot):
        if snapshot.step == 2:
            saw.append(three_steps_later.wait(60))
        write(snapshot)

    monkeypatch.setattr(saving, "write_part", slow_write)
    told = Told({3: three_steps_later.set})
    train(world.recipe(run, **keys), listener=told)
    assert saw == [True]
    assert told.saves == [f"step-{n:08d}" for n in (2, 4, 6)]
    for step in (2, 4, 6):
        assert contents(run, step) == contents(whole, step)


def test_an_error_lets_the_checkpoint_under_way_be_finished(world, tmp_path, monkeypatch):
    write, failed = saving.write_part, threading.Event()

    def slow_write(snapshot):
        failed.wait(60)
        time.sleep(0.5)
        write(snapshot)

    def fail():
        failed.set()
        raise RuntimeError("something else")

    monkeypatch.setattr(saving, "write_part", slow_write)
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="something else"):
        train(world.recipe(run, train__max_steps=6, checkpoint__save_interval=2), listener=Told({3: fail}))
    found, damaged = checkpoint_module.newest_checkpoint(run)
    assert (found.step, damaged) == (3, [])
    assert steps_saved(run) == [2, 3]  # the one under way, and the last whole step


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("where", ["write_part", "finish"])
def test_a_save_that_fails_is_said_and_training_goes_on_to_the_next(world, tmp_path, monkeypatch, background, where):
    real = getattr(saving, where)

    def failing(snapshot):
        if snapshot.step == 4:
            raise DISK_FULL
        real(snapshot)

    monkeypatch.setattr(saving, where, failing)
    told, run = Told(), tmp_path / "run"
    keys = {"train__max_steps": 8, "checkpoint__save_interval": 2, "checkpoint__keep_last": 9, "data__eval_path": []}
    train(world.recipe(run, **keys, checkpoint__async_save=background), listener=told)
    assert told.saves == [f"step-{n:08d}" for n in (2, 6, 8)]
    assert steps_saved(run) == [2, 6, 8]
    (message,) = told.messages
    assert "step-00000004: could not be saved ([Errno 28]" in message
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("keep_last", [1, 3])
def test_a_last_save_that_fails_ends_with_an_error_and_the_checkpoint_before_it(
    world, tmp_path, monkeypatch, keep_last
):
    real = saving.finish

    def failing(snapshot):
        if snapshot.step == 5:
            raise DISK_FULL
        real(snapshot)

    whole, run = tmp_path / "whole", tmp_path / "run"
    keys = {"train__max_steps": 5, "checkpoint__save_interval": 2, "checkpoint__keep_last": keep_last}
    train(world.recipe(whole, **keys))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "finish", failing)
        with pytest.raises(CheckpointError, match="step-00000005: could not be saved"):
            train(world.recipe(run, **keys))
    assert steps_saved(run) == [4] if keep_last == 1 else [2, 4]
    train(world.recipe(run, **keys), resume=True)
    assert contents(run, 5) == contents(whole, 5)
    assert untimed(rows_of(run)) == untimed(rows_of(whole))


def test_where_there_is_no_room_nothing_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "free_bytes", lambda folder: 10)
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"it takes 0\.00 GB, 0\.00 GB are free"):
        train(world.recipe(run, train__max_steps=2))
    assert not (run / "checkpoints").exists()
    assert len(rows_of(run)) == 2


def test_rows_that_the_disk_refuses_are_written_when_it_takes_them(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)

    class Full:
        """Takes half a row, then nothing."""

        def __init__(self, real):
            self.real, self.left = real, 8

        def write(self, content):
            if not self.left:
                raise DISK_FULL
            written = self.real.write(content[: self.left])
            self.left -= written
            return written

        def __getattr__(self, name):
            return getattr(self.real, name)

    assert file.write(row_of(1)) is None
    disk = file._file._file
    file._file._file = Full(disk)
    assert file.write(row_of(2)).errno == errno.ENOSPC
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    with pytest.raises(CheckpointError, match="Free space"):
        file.sync()
    assert file.write(row_of(3)) is None  # it was said already
    file._file._file = disk
    assert file.write(row_of(4)) is None
    file.sync()
    file.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_no_whole_checkpoint_goes_for_the_sake_of_a_damaged_one(world, tmp_path, keep_last):
    run = tmp_path / "run"
    keys = {"train__max_steps": 9, "checkpoint__save_interval": 3, "checkpoint__keep_best": False}
    train(world.recipe(run, **keys, checkpoint__keep_last=9))
    for step in (6, 9):
        (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"x")
    told = Told()
    keys |= {"checkpoint__save_interval": 2, "train__max_steps": 10, "checkpoint__keep_last": keep_last}
    recipe = world.recipe(run, **keys)
    stop = Told({4: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(Interrupted):
        train(recipe, resume=True, listener=stop)
    assert len(stop.messages) == 2  # one for each that was passed over
    assert steps_saved(run) == ([4, 6, 9] if keep_last == 1 else [3, 4, 6, 9])
    train(recipe, resume=True, listener=told)
    assert steps_saved(run) == ([9, 10] if keep_last == 1 else [8, 9, 10])
    kept = run / "checkpoints" / "damaged-step-00000006"
    assert (kept / "model.safetensors").read_bytes() == b"x"
    assert checkpoint_module.problem_with(run / "checkpoints/step-00000009") is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_resume_refuses_weights_that_give_another_loss(world, tmp_path, dtype):
    run = tmp_path / "run"
    recipe = world.write_recipe(run, train__max_steps=3, train__dtype=dtype)
    assert pertoken("train", recipe)[0] == 0
    folder = run / "checkpoints" / "step-00000003"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    repair_manifest(folder)
    before = (run / "metrics.jsonl").read_bytes()
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=4")
    assert code == 2
    assert "chats.jsonl:" in err
    assert "weights, data or code are no longer those of the run" in err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert steps_saved(run) == [3]
    code, out, err = pertoken("train", recipe, "--resume", "--force", "train.max_steps=4")
    assert code == 0, err
    assert "going on, though the loss of" in out
    assert len(rows_of(run)) == 4


def test_a_resume_under_other_conditions_goes_on_within_rounding_and_says_so(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.write_recipe(run, train__max_steps=3, train__dtype="bfloat16")
    assert pertoken("train", recipe)[0] == 0
    code, out, err = pertoken("train", recipe, "--resume", "train.max_steps=4", "train.engine=plain")
    assert code == 0, err
    assert "within rounding" in out
    assert "no longer" not in out


def test_changed_data_is_named_file_by_file_and_forced(world, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = (world.folder / "chats.jsonl").read_text().splitlines(keepends=True)
    for i, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        (data / name).write_text("".join(lines[i::3]))
    run = tmp_path / "run"
    recipe = world.write_recipe(run, data__path=str(data), train__max_steps=2)
    assert pertoken("train", recipe)[0] == 0
    (data / "a.jsonl").rename(data / "moved.jsonl")
    (data / "b.jsonl").write_text("".join(lines[2::3]))
    (data / "c.jsonl").unlink()
    (data / "d.jsonl").write_text(lines[0])
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=3")
    assert code == 2
    assert f"{data}/b.jsonl changed, {data}/d.jsonl is new" in err
    assert "moved" not in err
    code, out, err = pertoken("train", recipe, "--resume", "--force", "train.max_steps=3")
    assert code == 0, err
    assert "--force: going on, though the training data" in out


def test_force_alone_means_nothing(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "run")
    assert pertoken("train", recipe, "--force")[0] == 2


def test_time_is_up_after_a_step_saved_and_the_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(world.recipe(whole, train__max_steps=5))
    told = Told()
    result = train(world.recipe(run, train__max_steps=5, train__max_minutes=1e-9), listener=told)
    assert result.step == 1
    assert "train.max_minutes=1e-09: stopped after step 1 of 5, saved" in told.messages[0]
    result = train(world.recipe(run, train__max_steps=5), resume=True)
    assert result.step == 5
    assert contents(run, 5) == contents(whole, 5)


def test_sigusr1_saves_and_goes_on_and_a_second_sigterm_stops_at_once(world, tmp_path):
    run = tmp_path / "run"
    told = Told({2: lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    train(world.recipe(run, train__max_steps=4, checkpoint__save_interval=100), listener=told)
    assert told.saves == ["step-00000002", "step-00000004"]

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="stopped at once by a second SIGTERM") as caught:
        train(world.recipe(stopped, train__max_steps=4, checkpoint__save_interval=100), listener=Told({2: twice}))
    assert caught.value.exit_code == 143
    assert steps_saved(stopped) == []
    train(world.recipe(stopped, train__max_steps=4, checkpoint__save_interval=100), resume=True)
    assert contents(stopped, 4) == contents(run, 4)


def test_two_processes_do_not_train_into_one_folder(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.recipe(run, train__max_steps=2)
    refused = []

    def meanwhile():
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} trains into it"):
                train(recipe, **how)
            refused.append(how)

    train(recipe, listener=Told({1: meanwhile}))
    assert len(refused) == 3
    assert not (run / ".lock").exists()
    assert len(rows_of(run)) == 2
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    train(recipe, resume=True)


def test_a_checkpoint_whose_files_lead_elsewhere_is_not_used(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.recipe(run, train__max_steps=4, checkpoint__save_interval=2, checkpoint__keep_best=False)
    train(recipe)
    folder = run / "checkpoints" / "step-00000004"
    outside = shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(outside)
    found, (line,) = checkpoint_module.newest_checkpoint(run)
    assert found.step == 2
    assert "model.safetensors leads out of the folder" in line
    assert torch.is_tensor(next(iter(load_file(outside).values())))
