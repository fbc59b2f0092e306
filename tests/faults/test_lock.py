"""One process at a time trains into an out_dir, and a crash leaves it free."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults.harness import PATIENCE_S, Workshop, rows_so_far, wait_until, whole_steps
from tiny import rows_of


@pytest.fixture
def endless(workshop: Workshop) -> Path:
    """The recipe of a run that a test has to stop."""
    return workshop.recipe("endless", train__max_steps=10**6, train__batch_size=4, checkpoint__save_interval=5)


def test_a_second_process_is_refused_with_the_pid_of_the_first_which_goes_on(workshop, endless):
    with workshop.desk() as one, workshop.desk() as two:
        run = one.new()
        first = one.start("train", endless, f"out_dir={run}").process
        assert wait_until(lambda: rows_so_far(run) >= 6, first)
        for flags in ((), ("--resume",), ("--overwrite",)):
            ended = two.run("train", endless, f"out_dir={run}", *flags)
            assert ended.code == 2, ended.said
            assert "Traceback" not in ended.said
            assert len(ended.errors) == 1
            if flags:  # else it is enough that a run is there
                assert str(first.pid) in ended.err
        rows = rows_so_far(run)
        assert wait_until(lambda: rows_so_far(run) > rows + 2, first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(PATIENCE_S) == 143
        steps = [row["step"] for row in rows_of(run)]
        assert steps == list(range(1, len(steps) + 1))
        assert whole_steps(run)[-1] == len(steps)


def test_a_killed_process_leaves_no_lock(workshop, endless):
    with workshop.desk() as one, workshop.desk() as two:
        run = one.new()
        first = one.start("train", endless, f"out_dir={run}").process
        assert wait_until(lambda: rows_so_far(run) >= 6, first)
        first.send_signal(signal.SIGKILL)
        assert first.wait(PATIENCE_S) == -signal.SIGKILL
        rows = rows_so_far(run)
        second = two.start("train", endless, f"out_dir={run}", "--resume").process
        assert wait_until(lambda: rows_so_far(run) > rows + 2, second)
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == 143
