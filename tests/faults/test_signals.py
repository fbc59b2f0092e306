"""Signals and the time that is left: saved within a step, with the exit code that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import ranks
from faults.failing_disk import Fault
from faults.harness import PATIENCE_S, Workshop, difference, rows_so_far, steps_saved, wait_until, whole_steps
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
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
        if number == signal.SIGTERM:
            assert codes == [143, 143]
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
