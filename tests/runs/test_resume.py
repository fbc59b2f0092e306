"""A resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import pertoken, rows_of, untimed

from pertoken import train
from pertoken.recipe.homes import OPTIMIZERS
from pertoken.runs.probe import environment
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric

FILES = ("model.safetensors", "optimizer.safetensors", "config.json")


def hashes(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def in_a_new_process(*args: object) -> None:
    result = subprocess.run([sys.executable, "-m", "pertoken", *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def lose_everything_after(run: Path, step: int) -> None:
    """What a crash leaves: the checkpoint of `step`, rows written since, and half a row."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_in_mid_epoch_after_an_evaluation_is_bitwise(world, tmp_path, dtype, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if dtype == "float64":
            pytest.skip("adamw8bit is not for float64")
    recipe = world.write_recipe(
        tmp_path / "recipe",
        train__dtype=dtype,
        train__optimizer=optimizer,
        train__max_steps=12,
        train__eval_interval=4,
        train__micro_batch_tokens=1500,
        checkpoint__save_interval=5,
        checkpoint__keep_last=10,
        checkpoint__keep_best=False,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    in_a_new_process("train", recipe, f"out_dir={whole}")
    shutil.copytree(whole, broken, symlinks=True)
    lose_everything_after(broken, 5)  # 7 steps make an epoch, the evaluation was at 4
    in_a_new_process("train", recipe, f"out_dir={broken}", "--resume")
    assert hashes(broken, 12) == hashes(whole, 12)
    assert untimed(rows_of(broken)) == untimed(rows_of(whole))
    state = [json.loads((r / "checkpoints/step-00000012/trainer_state.json").read_text()) for r in (whole, broken)]
    for s in state:
        s["recipe"].pop("out_dir")
    assert state[0] == state[1]


def test_sigint_saves_and_exits_130_and_the_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=120, checkpoint__save_interval=1000)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "pertoken", "train", str(recipe), f"out_dir={stopped}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by SIGINT" in err
    step = len(rows_of(stopped))
    assert 3 <= step < 120
    assert (stopped / "checkpoints" / f"step-{step:08d}").is_dir()
    end = f"train.max_steps={step + 3}"
    assert pertoken("train", recipe, f"out_dir={stopped}", end, "train.schedule=constant")[0] == 2
    code, _, err = pertoken("train", recipe, f"out_dir={stopped}", "--resume")
    assert code == 0, err
    assert pertoken("train", recipe, f"out_dir={whole}")[0] == 0
    assert hashes(stopped, 120) == hashes(whole, 120)


def test_what_may_not_change_is_refused_by_name_and_what_may_is_not(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=3)
    out = f"out_dir={tmp_path / 'run'}"
    assert pertoken("train", recipe, out)[0] == 0
    code, _, err = pertoken("train", recipe, out, "--resume", "train.learning_rate=1.0", "train.seed=7")
    assert code == 2
    assert "train.learning_rate=1.0: was 0.001" in err
    assert "train.seed=7: was 42" in err
    assert len(rows_of(tmp_path / "run")) == 3
    code, _, err = pertoken("train", recipe, out, "--resume", "train.max_steps=5", "log.log_interval=1")
    assert code == 0, err
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an instruction set of x86-64")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_instruction_set_is_not_taken_for_other_weights(world, tmp_path, monkeypatch, dtype):
    """It rounds otherwise, and a resume must allow for that."""
    run, settings = tmp_path / "run", {"train__dtype": dtype, "data__eval_path": []}
    train(world.recipe(run, **settings, train__max_steps=2))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    before = json.loads((checkpoint / "trainer_state.json").read_text())["environment"]
    recipe = world.write_recipe(tmp_path / "recipe", **settings, train__max_steps=3)
    other = "x86-64-v2" if os.environ.get("PERTOKEN_KERNELS_MARCH") == "x86-64" else "x86-64"
    monkeypatch.setenv("PERTOKEN_KERNELS_MARCH", other)
    in_a_new_process("train", recipe, f"out_dir={run}", "--resume")
    assert len(rows_of(run)) == 3
    resumed = environment(Precision(dtype, torch.device("cpu")), ranks=1, compiled=True)
    assert resumed != before
    assert resumed | {"instruction_sets": 0} == before | {"instruction_sets": 0}


def test_changed_data_is_refused_and_moved_data_is_not(world, tmp_path):
    chats = tmp_path / "chats.jsonl"
    shutil.copy(world.folder / "chats.jsonl", chats)
    recipe = world.write_recipe(tmp_path / "recipe", data__path=str(chats), train__max_steps=2)
    out = f"out_dir={tmp_path / 'run'}"
    assert pertoken("train", recipe, out)[0] == 0
    moved = chats.rename(tmp_path / "moved.jsonl")
    code, _, err = pertoken("train", recipe, out, "--resume", f"data.path={moved}", "train.max_steps=3")
    assert code == 0, err
    moved.write_text("".join(moved.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = pertoken("train", recipe, out, "--resume", f"data.path={moved}", "train.max_steps=4")
    assert code == 2
    assert "training data" in err


def test_resume_with_nothing_saved_starts_fresh_and_a_used_folder_is_refused(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=2)
    out = f"out_dir={tmp_path / 'run'}"
    assert pertoken("train", recipe, out, "--resume")[0] == 0
    code, _, err = pertoken("train", recipe, out)
    assert code == 2
    assert "--resume continues it, --overwrite replaces it" in err
    assert pertoken("train", recipe, out, "--overwrite", "train.seed=1")[0] == 0
    assert pertoken("train", recipe, out, "--overwrite", "--resume")[0] == 2


def test_overwriting_deletes_nothing_before_recipe_data_and_model_are_known_to_be_good(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=2)
    run = tmp_path / "run"
    assert pertoken("train", recipe, f"out_dir={run}")[0] == 0
    before = hashes(run, 2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    for mistake in (
        f"data.path={bad}",
        f"init_from={tmp_path}",
        "train.warmup_steps=2",
        "model.vocab_size=5",
        "train.learning_rate=0",
    ):
        assert pertoken("train", recipe, f"out_dir={run}", "--overwrite", mistake)[0] == 2
        assert hashes(run, 2) == before
        assert len(rows_of(run)) == 2
    code, _, err = pertoken("train", recipe, f"out_dir={run}", "--overwrite", f"init_from={run}")
    assert code == 0, err
    assert hashes(run, 2) != before


def test_a_folder_that_cannot_be_written_says_so(world, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=2)
    code, _, err = pertoken("train", recipe, f"out_dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert "cannot be written" in err


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=4, checkpoint__save_interval=2)
    run = tmp_path / "run"
    assert pertoken("train", recipe, f"out_dir={run}")[0] == 0
    before = hashes(run, 4)
    model = run / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    code, out, err = pertoken("train", recipe, f"out_dir={run}", "--resume")
    assert code == 0, err
    assert "model.safetensors fails its checksum" in out
    assert hashes(run, 4) == before
