"""Several ranks that train together, as forks of the servers or under torchrun, and some of them killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from faults.harness import PATIENCE_S, Desk, Process, Running, Workshop, difference, rows_so_far, torn_event, wait_until
from faults.kills import SETTINGS, STEPS, kill_in_a_save, lost_by_a_kill

RANKS = 2
INTERVAL = 3


@dataclass(frozen=True)
class RankKill:
    parallel: str
    whom: str  # "one" rank, or "all"
    in_save: bool
    seed: int
    torchrun: bool = False


def recipe_of(workshop: Workshop, parallel: str) -> Path:
    return workshop.recipe(f"ranks-{parallel}", **SETTINGS, train__parallel=parallel)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_forks(desks: list[Desk], *args: object) -> list[Running]:
    """`pertoken ARGS` on each desk, as torchrun would start its workers."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(desks))}
    return [
        desk.start(*args, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, desk in enumerate(desks)
    ]


def start_torchrun(*args: object) -> subprocess.Popen[bytes]:
    place = ["--nproc-per-node", str(RANKS), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *place, "-m", "pertoken", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name may hold spaces and brackets; the state and the parent come after its last bracket.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def reference(workshop: Workshop, parallel: str) -> Path:
    """The undisturbed run on two ranks."""
    recipe = recipe_of(workshop, parallel)
    run = workshop.folder / f"ranks-{parallel}-reference"
    if not run.exists():
        with ExitStack() as stack:
            desks = [stack.enter_context(workshop.desk()) for _ in range(RANKS)]
            for ended in [r.ended() for r in start_forks(desks, "train", recipe, f"out_dir={run}")]:
                assert ended.code == 0, ended.said
    return run


def trial(workshop: Workshop, kill: RankKill) -> str | None:
    """What was lost; None if nothing was. Needs every desk, so such trials come one after another."""
    rng, recipe, whole = (
        random.Random(f"{kill}"),
        recipe_of(workshop, kill.parallel),
        reference(workshop, kill.parallel),
    )
    with ExitStack() as stack:
        desks = [stack.enter_context(workshop.desk()) for _ in range(RANKS)]
        run = desks[0].new()
        command = ("train", recipe, f"out_dir={run}")
        problem = (_killed_torchrun if kill.torchrun else _killed_forks)(desks, kill, run, rng, command)
        if problem is None:
            if kill.torchrun:
                codes = [start_torchrun(*command, "--resume").wait(PATIENCE_S)]
            else:
                codes = [r.ended().code for r in start_forks(desks, *command, "--resume")]
            problem = f"the resume ended with {codes}" if any(codes) else difference(run, whole) or torn_event(run)
    return problem and f"{kill}: {problem}"


def _killed_forks(
    desks: list[Desk], kill: RankKill, run: Path, rng: random.Random, command: tuple[object, ...]
) -> str | None:
    for attempt in range(10):
        processes = [r.process for r in start_forks(desks, *command, *(("--overwrite",) if attempt else ()))]
        victims = processes if kill.whom == "all" else [rng.choice(processes)]

        def now(victims: list[Process] = victims) -> None:
            for process in victims:
                process.send_signal(signal.SIGKILL)

        if kill.in_save:
            killed = kill_in_a_save(processes[0], run, rng, 6, now)
        else:
            killed = _after_some_rows(processes[0], run, rng, now)
        codes = [process.wait(PATIENCE_S) for process in processes]
        if killed and all(codes):
            return lost_by_a_kill(run, [], INTERVAL)
    return "it could not be killed in time"


def _after_some_rows(process: Process, run: Path, rng: random.Random, kill: object) -> bool:
    wanted = rng.randint(0, STEPS - 2)
    if not wait_until(lambda: rows_so_far(run) >= wanted, process):
        return False
    time.sleep(rng.uniform(0.0, 0.02))
    assert callable(kill)
    kill()
    return True


def _killed_torchrun(
    desks: list[Desk], kill: RankKill, run: Path, rng: random.Random, command: tuple[object, ...]
) -> str | None:
    for attempt in range(4):
        agent = start_torchrun(*command, *(("--overwrite",) if attempt else ()))
        wanted = rng.randint(1, STEPS // 2)
        there = wait_until(lambda wanted=wanted: rows_so_far(run) >= wanted, agent)  # type: ignore[misc]
        workers = children_of(agent.pid)
        if there and len(workers) == RANKS:
            victims = [agent.pid, *workers] if kill.whom == "all" else [rng.choice(workers)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        code = agent.wait(PATIENCE_S)
        for pid in workers:  # whose parent may be gone
            _wait_until_gone(pid)
        if there and code != 0:
            return lost_by_a_kill(run, [], INTERVAL)
    return "it could not be killed in time"


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while _runs(pid):
        assert time.monotonic() < deadline, f"worker {pid} is left over"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
