"""Signals and the time that is left: saved within a step, with the exit code that says why."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import ranks
from faults.conftest import Record
from faults.failing_disk import Fault
from faults.harness import (
    PATIENCE_S,
    Desk,
    Running,
    Streams,
    Workshop,
    difference,
    rows_so_far,
    steps_saved,
    wait_until,
    whole_steps,
)
from faults.kills import names_of_writing

STEPS = 60
SLOW = Fault("sync", sleep_ms=1000, times=0, match="checkpoints")  # a save takes ten seconds


@pytest.fixture(scope="session")
def recipe(workshop: Workshop) -> Path:
    return workshop.recipe(
        "signals",
        train__max_steps=STEPS,
        train__batch_size=2,
        checkpoint__save_interval=1000,
        checkpoint__keep_best=False,
        train__eval_interval=1000,
    )


@pytest.fixture(scope="session")
def reference(workshop: Workshop, recipe: Path) -> Path:
    with workshop.desk() as desk:
        return workshop.reference(desk, recipe)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_within_a_step_and_a_second_one_ends_at_once(workshop, recipe, reference, number):
    with workshop.desk() as desk:
        run = desk.new()
        running = desk.start("train", recipe, f"out_dir={run}")
        assert wait_until(lambda: rows_so_far(run) >= 5, running.process)
        running.process.send_signal(number)
        before = rows_so_far(run)
        ended = running.ended()
        assert ended.code == 128 + number, ended.said
        assert f"stopped by {number.name} after step" in ended.err
        step = rows_so_far(run)
        assert step <= before + 2  # the one that was under way, and one that ended while this process counted
        assert whole_steps(run) == [step]

        running = desk.start("train", recipe, f"out_dir={run}", "--resume", fault=SLOW, below=run)
        assert wait_until(lambda: rows_so_far(run) >= step + 2, running.process)
        running.process.send_signal(number)
        assert wait_until(lambda: bool(names_of_writing(run)), running.process)
        start = time.monotonic()
        running.process.send_signal(number)
        ended = running.ended()
        assert time.monotonic() - start < 5, "it finished what it was about"
        assert ended.code == 128 + number, ended.said
        assert "Traceback" not in ended.said
        assert whole_steps(run) == [step]

        ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
        assert ended.code == 0, ended.said
        assert difference(run, reference) is None


def test_sigusr1_saves_and_training_goes_on(workshop, recipe, reference):
    with workshop.desk() as desk:
        run = desk.new()
        running = desk.start("train", recipe, f"out_dir={run}")
        assert wait_until(lambda: rows_so_far(run) >= 5, running.process)
        running.process.send_signal(signal.SIGUSR1)
        ended = running.ended()
    assert ended.code == 0, ended.said
    assert difference(run, reference) is None
    first, last = steps_saved(run)
    assert 5 <= first < last == STEPS
    assert whole_steps(run) == [first, last]


def test_sighup_saves_and_ends_however_often_it_comes(workshop, recipe, reference):
    with workshop.desk() as desk:
        run = desk.new()
        running = desk.start("train", recipe, f"out_dir={run}")
        assert wait_until(lambda: rows_so_far(run) >= 5, running.process)
        for _ in range(5):  # a shell that loses its terminal passes on what its children have had already
            running.process.send_signal(signal.SIGHUP)
            time.sleep(0.002)
        ended = running.ended()
        assert ended.code == 129, ended.said
        assert "stopped by SIGHUP after step" in ended.err
        assert whole_steps(run) == [rows_so_far(run)]
        ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
        assert ended.code == 0, ended.said
        assert difference(run, reference) is None


def test_sighup_that_nohup_ignores_stays_ignored(workshop, recipe, reference):
    with workshop.desk() as desk:
        run = desk.new()
        running = desk.start("train", recipe, f"out_dir={run}", streams=Streams(nohup=True))
        assert wait_until(lambda: rows_so_far(run) >= 5, running.process)
        running.process.send_signal(signal.SIGHUP)
        ended = running.ended()
        assert ended.code == 0, ended.said
        assert difference(run, reference) is None


def preparing(desk: Desk, recipe: Path, *args: object) -> tuple[Path, Running]:
    """A run whose data is prepared slowly, in the middle of that."""
    run = desk.new()
    store = run.with_suffix(".store")
    slowly = Fault("write", sleep_ms=100, times=0)
    running = desk.start("train", recipe, f"out_dir={run}", f"data.store={store}", *args, fault=slowly, below=store)
    assert wait_until(lambda: store.is_dir() and any(store.iterdir()), running.process)
    time.sleep(0.05)
    return run, running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_preparation_ends_at_once_with_one_line(workshop, recipe, number):
    with workshop.desk() as desk:
        run, running = preparing(desk, recipe)
        running.process.send_signal(number)
        ended = running.ended()
        assert ended.code == 128 + number, ended.said
        assert ended.err.splitlines() == [
            f"error: stopped by {number.name} before the first step; there is nothing new to save"
        ]
        assert not run.exists()


def test_sigusr1_during_preparation_saves_after_the_first_step(workshop, recipe, reference):
    with workshop.desk() as desk:
        run, running = preparing(desk, recipe)
        running.process.send_signal(signal.SIGUSR1)
        ended = running.ended()
    assert ended.code == 0, ended.said
    assert difference(run, reference) is None
    assert whole_steps(run) == [1, STEPS]


@pytest.mark.torture
def test_a_signal_at_any_moment_leaves_what_a_resume_completes(workshop, recipe, reference, record: Record):
    with workshop.desk() as desk:
        start = time.monotonic()
        assert desk.run("train", recipe, f"out_dir={desk.new()}").code == 0
        duration_s = time.monotonic() - start

    def trial(desk: Desk, case: tuple[signal.Signals, int]) -> str | None:
        number, seed = case
        run = desk.new()
        running = desk.start("train", recipe, f"out_dir={run}", f"data.store={run.with_suffix('.store')}")
        time.sleep(random.Random(seed).uniform(0.02, duration_s))
        running.process.send_signal(number)
        code = running.process.wait(PATIENCE_S)
        if code not in (0, 128 + number, -number):  # the last: before `train` began to listen
            return f"{number.name}, seed {seed}: exit code {code}: {running.ended().err}"
        if whole_steps(run) != ([rows_so_far(run)] if rows_so_far(run) else []):
            return f"{number.name}, seed {seed}: rows {rows_so_far(run)}, saved {whole_steps(run)}"
        ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
        lost = difference(run, reference) if ended.code == 0 else ended.err
        return lost and f"{number.name}, seed {seed}: {lost}"

    cases = [(number, seed) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for seed in range(10)]
    record("SIGTERM, SIGINT, SIGHUP at a random moment, preparation too", workshop.each(trial, cases))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ranks_agree_on_a_signal_that_one_of_them_has_had(workshop, number):
    recipe, whole = ranks.recipe_of(workshop, "ddp"), ranks.reference(workshop, "ddp")
    with ExitStack() as stack:
        desks = [stack.enter_context(workshop.desk()) for _ in range(ranks.RANKS)]
        run = desks[0].new()
        command = ("train", recipe, f"out_dir={run}", "checkpoint.save_interval=1000")
        first, second = ranks.start_forks(desks, *command)
        assert wait_until(lambda: rows_so_far(run) >= 3, second.process)
        second.process.send_signal(number)
        codes = [running.ended().code for running in (first, second)]
        saved = whole_steps(run)
        if number != signal.SIGUSR1:
            assert codes == [128 + number] * 2
            assert saved == [rows_so_far(run)]
            codes = [running.ended().code for running in ranks.start_forks(desks, *command, "--resume")]
        else:
            assert len(saved) == 2
        assert codes == [0, 0]
    assert difference(run, whole) is None


def test_a_run_whose_time_is_up_is_saved_and_can_go_on(workshop, recipe, reference):
    with workshop.desk() as desk:
        run = desk.new()
        ended = desk.run("train", recipe, f"out_dir={run}", "train.max_minutes=0.005")
        assert ended.code == 0, ended.said
        assert "train.max_minutes=0.005: stopped after step" in ended.out.replace("\n", " ")
        step = rows_so_far(run)
        assert 1 <= step < STEPS
        assert whole_steps(run) == [step]
        ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
        assert ended.code == 0, ended.said
    assert difference(run, reference) is None


def test_a_rank_that_is_killed_leaves_the_last_whole_step_saved_by_the_other(workshop):
    recipe, whole = ranks.recipe_of(workshop, "ddp"), ranks.reference(workshop, "ddp")
    with ExitStack() as stack:
        desks = [stack.enter_context(workshop.desk()) for _ in range(ranks.RANKS)]
        run = desks[0].new()
        command = ("train", recipe, f"out_dir={run}", "checkpoint.save_interval=1000")
        first, second = ranks.start_forks(desks, *command)
        assert wait_until(lambda: rows_so_far(run) >= 4, second.process)
        second.process.send_signal(signal.SIGKILL)
        ended = first.ended()
        second.ended()
        assert ended.code == 70, ended.said
        step = rows_so_far(run)
        assert f"step {step} is saved; continue with --resume" in ended.err
        assert whole_steps(run) == [step]
        codes = [running.ended().code for running in ranks.start_forks(desks, *command, "--resume")]
        assert codes == [0, 0]
    assert difference(run, whole) is None


def test_sharded_ranks_say_that_they_cannot_save_without_each_other(workshop):
    recipe, whole = ranks.recipe_of(workshop, "fsdp"), ranks.reference(workshop, "fsdp")
    with ExitStack() as stack:
        desks = [stack.enter_context(workshop.desk()) for _ in range(ranks.RANKS)]
        run = desks[0].new()
        command = ("train", recipe, f"out_dir={run}")
        first, second = ranks.start_forks(desks, *command)
        assert wait_until(lambda: len(whole_steps(run)) == 1, second.process)
        second.process.send_signal(signal.SIGKILL)
        ended = first.ended()
        second.ended()
        assert ended.code == 70, ended.said
        assert 'train.parallel="fsdp", so no more was saved; --resume continues from the newest checkpoint' in ended.err
        codes = [running.ended().code for running in ranks.start_forks(desks, *command, "--resume")]
        assert codes == [0, 0]
    assert difference(run, whole) is None


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_torchrun_passes_a_signal_on_and_the_ranks_save(workshop, number):
    recipe, run = ranks.recipe_of(workshop, "ddp"), workshop.folder / f"torchrun-{number.name}"
    process = ranks.start_torchrun(
        "train", recipe, f"out_dir={run}", "train.max_steps=100000", "checkpoint.save_interval=100000"
    )
    assert wait_until(lambda: rows_so_far(run) >= 3, process)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) != 0  # the agent's own code
    assert whole_steps(run) == [rows_so_far(run)]


@pytest.mark.torture
def test_a_process_that_is_no_fork_is_stopped_by_sigterm_too(workshop, recipe):
    run = workshop.folder / "no-fork"
    command = [sys.executable, "-m", "pertoken", "train", str(recipe), f"out_dir={run}"]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert wait_until(lambda: rows_so_far(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert b"stopped by SIGTERM" in err
    assert whole_steps(run) == [rows_so_far(run)]
