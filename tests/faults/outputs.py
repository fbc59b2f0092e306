"""One trial of an output that fails: a run that cannot be shown, or not in full, must be the undisturbed one."""

from __future__ import annotations

import os
import pty
import re
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults.failing_disk import Fault, calls_in
from faults.harness import Desk, Ended, Streams, Workshop, difference

STEPS = 6
SETTINGS = {
    "train__max_steps": STEPS,
    "train__batch_size": 2,
    "train__eval_interval": 3,
    "checkpoint__save_interval": 2,
    "checkpoint__keep_best": False,
    "log__log_interval": 1,
}
ERRNOS = ("EPIPE", "EIO", "ENOSPC")
ENCODINGS = ("ascii", "latin-1", "cp1252", "gbk", "koi8-r", "shift-jis")
DROPPED = "what cannot be shown is dropped"


@dataclass(frozen=True)
class Case:
    """What is wrong with the output, and whether all of it gets through all the same."""

    name: str
    fault: Fault | None = None
    streams: Streams = field(default_factory=Streams)
    encoding: str | None = None
    lost: bool = True  # some of stdout does not get through, which stderr says
    heard: bool = True  # stderr works


def recipe_of(workshop: Workshop) -> Path:
    return workshop.recipe("outputs", **SETTINGS)


def writes_to(desk: Desk, recipe: Path, descriptor: int, streams: Streams | None = None) -> int:
    """How often a run writes there."""
    run, log = desk.new(), desk.new()
    ended = desk.run("train", recipe, f"out_dir={run}", fault=Fault(descriptor=descriptor, log=log), streams=streams)
    assert ended.code == 0, ended.said
    return sum(call == "write" for call, _ in calls_in(log))


def at_each_write(writes: int) -> list[Case]:
    """Standard output fails at every of its writes, once or from there on."""
    return [
        Case(str(fault), fault)
        for errno in ERRNOS
        for nth in range(1, writes + 1)
        for times in (1, 0)
        for fault in [Fault("write", errno, nth, times, descriptor=1)]
    ]


def closed() -> list[Case]:
    """From the start: standard output, standard error, all three."""
    return [
        Case("stdout closed", streams=Streams(closed=(1,))),
        Case("stderr closed", streams=Streams(closed=(2,)), lost=False, heard=False),
        Case("all closed", streams=Streams(closed=(0, 1, 2)), heard=False),
    ]


def standard_error(writes: int) -> list[Case]:
    """It fails at every of its writes, when it is told that standard output is lost."""
    return [
        Case(f"stdout closed, {fault}", fault, Streams(closed=(1,)), heard=False)
        for errno in ERRNOS
        for nth in range(1, writes + 1)
        for times in (1, 0)
        for fault in [Fault("write", errno, nth, times, descriptor=2)]
    ]


def encodings() -> list[Case]:
    """Standard output that cannot hold every letter of the data, and is strict about it."""
    return [Case(f"{name}, strict", encoding=f"{name}:strict", lost=False) for name in ENCODINGS]


def trial(desk: Desk, case: Case, recipe: Path, reference: Path) -> str | None:
    """What was lost but output; None if nothing was."""
    run = desk.new()
    environment = {"PYTHONIOENCODING": case.encoding} if case.encoding is not None else None
    ended = desk.run("train", recipe, f"out_dir={run}", fault=case.fault, streams=case.streams, environment=environment)
    problem = wrong_with(ended, lost=case.lost, heard=case.heard) or difference(run, reference)
    return problem and f"{case.name}: {problem}"


def wrong_with(ended: Ended, *, lost: bool, heard: bool = True) -> str | None:
    """With the end of a run that was not disturbed but in what it shows."""
    if ended.code != 0:
        return f"exit code {ended.code}: {ended.err[-2000:]}"
    if re.search("Traceback|Exception ignored|Error", ended.said):
        return f"it should not say {ended.said[-2000:]}"
    if heard and ended.err.count(DROPPED) != int(lost):
        return f"stderr says {ended.err!r}"
    return None


@contextmanager
def terminal() -> Iterator[tuple[Path, Callable[[], None]]]:
    """The path of a terminal whose window is looked at, and what closes the window."""
    window, inside = pty.openpty()
    path, over = Path(os.ttyname(inside)), threading.Event()

    def look() -> None:
        while not over.is_set():
            if select.select([window], [], [], 0.02)[0]:
                with suppress(OSError):  # nobody has it open yet
                    os.read(window, 65536)

    def close() -> None:
        if not over.is_set():
            over.set()
            looking.join()
            os.close(window)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield path, close
    finally:
        close()
        os.close(inside)
