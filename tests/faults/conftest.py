"""Fixtures of the fault tests, and the table that `make torture` ends with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.failing_disk import compile_shim
from faults.harness import Workshop
from tiny import World

_TABLE: pytest.StashKey[list[tuple[str, int, int, float]]] = pytest.StashKey()
Record = Callable[[str, list[str | None]], None]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a disk fail."""
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def workshop(world: World, shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Two servers that start runs, with the failing disk in each."""
    made = Workshop(world, tmp_path_factory.mktemp("workshop"), shim)
    made.open()
    yield made
    made.close()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(fault, problems): a line of the table, a problem or None per trial; fails where something was lost."""
    start = time.monotonic()

    def add(fault: str, problems: list[str | None]) -> None:
        lost = [problem for problem in problems if problem is not None]
        lines = request.config.stash.setdefault(_TABLE, [])
        lines.append((fault, len(problems), len(problems) - len(lost), time.monotonic() - start))
        assert not lost, f"{fault}: {len(lost)} of {len(problems)}:\n" + "\n".join(lost)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_TABLE, [])
    if not lines or config.option.markexpr != "torture":
        return
    write = terminalreporter.write_line
    write("")
    write("| fault | tried | nothing lost | seconds |")
    write("|---|---:|---:|---:|")
    for fault, tried, kept, elapsed_s in lines:
        write(f"| {fault} | {tried} | {kept} | {elapsed_s:.0f} |")
    write("")
