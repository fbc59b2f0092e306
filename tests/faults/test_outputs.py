"""What a run shows may be lost at any moment, and nothing of the run with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.conftest import Record
from faults.failing_disk import Fault
from faults.harness import PATIENCE_S, Streams, Workshop, difference, rows_so_far, wait_until, whole_steps
from faults.outputs import (
    DROPPED,
    Case,
    at_each_write,
    closed,
    encodings,
    recipe_of,
    standard_error,
    terminal,
    trial,
    writes_to,
    wrong_with,
)

LONG = ("train.max_steps=120", "checkpoint.save_interval=1000", "train.eval_interval=1000")


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> Path:
    with workshop.desk() as desk:
        return workshop.reference(desk, recipe_of(workshop))


@pytest.fixture(scope="session")
def long_reference(workshop: Workshop) -> Path:
    run = workshop.folder / "outputs-long-reference"
    with workshop.desk() as desk:
        ended = desk.run("train", recipe_of(workshop), f"out_dir={run}", *LONG)
    assert ended.code == 0, ended.said
    return run


def tried(workshop: Workshop, reference: Path, cases: list[Case]) -> list[str | None]:
    recipe = recipe_of(workshop)
    return workshop.each(lambda desk, case: trial(desk, case, recipe, reference), cases)


def counted(workshop: Workshop, descriptor: int, streams: Streams | None = None) -> int:
    with workshop.desk() as desk:
        return writes_to(desk, recipe_of(workshop), descriptor, streams)


def test_output_that_fails_costs_no_step(workshop, reference):
    writes = counted(workshop, 1)
    assert writes > 8, "a run of six steps shows each of them"
    each = at_each_write(writes)
    errors = standard_error(counted(workshop, 2, Streams(closed=(1,))))
    lost = tried(workshop, reference, [each[1], each[-2], *closed(), errors[0], encodings()[0]])
    assert not [problem for problem in lost if problem], lost


@pytest.mark.torture
def test_output_that_fails_at_any_write_costs_no_step(workshop, reference, record: Record):
    record(
        "EPIPE, EIO, ENOSPC at each write to standard output",
        tried(workshop, reference, at_each_write(counted(workshop, 1))),
    )


@pytest.mark.torture
def test_closed_streams_and_narrow_encodings_cost_no_step(workshop, reference, record: Record):
    errors = standard_error(counted(workshop, 2, Streams(closed=(1,))))
    record("standard streams closed; standard error fails; encodings", tried(workshop, reference, errors + closed()))
    record("six narrow encodings, strict", tried(workshop, reference, encodings()))


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_run_that_is_refused_keeps_its_exit_code_when_it_cannot_say_why(workshop, descriptor):
    with workshop.desk() as desk:
        fault = Fault("write", "EPIPE", times=0, descriptor=descriptor)
        ended = desk.run("train", recipe_of(workshop), f"out_dir={desk.new()}", "train.epochs=-1", fault=fault)
    assert ended.code == 2
    assert len(ended.errors) == (1 if descriptor == 1 else 0)


def test_a_reader_that_leaves_costs_no_step(workshop, reference, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with workshop.desk() as desk:
        run = desk.new()
        running = desk.start("train", recipe_of(workshop), f"out_dir={run}", streams=Streams(out=pipe))
        assert wait_until(lambda: rows_so_far(run) >= 1, running.process)
        os.close(reader)
        ended = running.ended()
        assert ended.code == 0, ended.err
        assert ended.err.count(DROPPED) <= 1  # none where it had shown all before
        assert "Traceback" not in ended.err
        assert difference(run, reference) is None


@pytest.mark.parametrize("nohup", [False, True], ids=["SIGHUP", "nohup"])
def test_a_terminal_that_closes_stops_the_run_saved_unless_nohup_says_otherwise(workshop, long_reference, nohup: bool):
    recipe = recipe_of(workshop)
    with workshop.desk() as desk, terminal() as (path, close):
        run = desk.new()
        streams = Streams(out=path, nohup=nohup)
        running = desk.start("train", recipe, f"out_dir={run}", *LONG, streams=streams)
        assert wait_until(lambda: rows_so_far(run) >= 5, running.process)
        close()
        ended = running.ended()
        if nohup:
            assert wrong_with(ended, lost=True) is None
        else:
            assert ended.code == 129, ended.err
            assert whole_steps(run) == [rows_so_far(run)]
            assert rows_so_far(run) < 120
            ended = desk.run("train", recipe, f"out_dir={run}", *LONG, "--resume")
            assert ended.code == 0, ended.said
        assert difference(run, long_reference) is None


@pytest.mark.parametrize("command", [("new", "sft"), ("--help",)])
@pytest.mark.parametrize(("errno", "code"), [("EPIPE", 141), ("ENOSPC", 2), ("EIO", 2)])
def test_a_command_whose_result_is_its_output_says_that_it_was_lost(workshop, command, errno, code):
    with workshop.desk() as desk:
        ended = desk.run(*command, fault=Fault("write", errno, times=0, descriptor=1))
    assert ended.code == code
    assert len(ended.errors) == (0 if errno == "EPIPE" else 1)
    assert len(ended.err.splitlines()) == len(ended.errors)


def test_a_process_whose_reader_has_left_ends_with_0_and_python_adds_nothing(workshop, reference):
    run = workshop.folder / "outputs-process"
    command = [sys.executable, "-m", "pertoken", "train", str(recipe_of(workshop)), f"out_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE_S)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert [DROPPED in line for line in done.stderr.decode().splitlines()] == [True]
    assert difference(run, reference) is None
