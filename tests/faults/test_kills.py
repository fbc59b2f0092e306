"""SIGKILL at any moment: the resumed run is the undisturbed one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import ranks
from faults.conftest import Record
from faults.harness import PATIENCE_S, Workshop, difference, rows_so_far, wait_until
from faults.kills import KINDS, STEPS, Kill, recipe_of, trial

KILLS = 100
QUICK = [
    Kill("dense", in_save=False, seed=0),
    Kill("evaluations and the best kept", in_save=True, seed=0),
    Kill("experts", in_save=True, seed=0),
]
RANK_KILLS = [
    ranks.RankKill(parallel, whom, in_save, seed)
    for parallel in ("ddp", "fsdp")
    for whom in ("one", "all")
    for in_save in (False, True)
    for seed in range(2)
]
TORCHRUN_KILLS = [
    ranks.RankKill(parallel, whom, False, 0, torchrun=True) for parallel in ("ddp", "fsdp") for whom in ("one", "all")
]


def tried(workshop: Workshop, kills: list[Kill]) -> list[str | None]:
    def reference(kind: str) -> Path:
        with workshop.desk() as desk:
            return workshop.reference(desk, recipe_of(workshop, kind))

    references = {kind: reference(kind) for kind in dict.fromkeys(kill.kind for kill in kills)}
    return workshop.each(
        lambda desk, kill: trial(
            desk,
            kill,
            recipe_of(workshop, kill.kind),
            references[kill.kind],
            workshop.durations_s[references[kill.kind]],
        ),
        kills,
    )


def test_a_killed_run_resumes_to_the_same_weights_and_rows(workshop):
    lost = [problem for problem in tried(workshop, QUICK) if problem]
    assert not lost, "\n".join(lost)


@pytest.mark.torture
@pytest.mark.parametrize("in_save", [False, True], ids=["at any moment", "inside of a save"])
def test_a_hundred_kills_lose_nothing(workshop, record: Record, in_save):
    kinds = list(KINDS)
    kills = [Kill(kinds[i % len(kinds)], in_save, seed=i, twice=i % 4 == 3) for i in range(KILLS // 2)]
    where = "inside of a save" if in_save else "at a random moment"
    record(f"SIGKILL {where}, {len(kinds)} kinds of run", tried(workshop, kills))


@pytest.mark.torture
def test_killed_ranks_lose_nothing(workshop, record: Record):
    record("SIGKILL of one or all of 2 ranks, DDP and FSDP", [ranks.trial(workshop, kill) for kill in RANK_KILLS])


@pytest.mark.torture
def test_ranks_killed_under_torchrun_lose_nothing(workshop, record: Record):
    record("the same under torchrun", [ranks.trial(workshop, kill) for kill in TORCHRUN_KILLS])


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """started(*args): `python -m pertoken ARGS`, a process of its own."""

    def start(*args: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pertoken", *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start


@pytest.mark.torture
def test_killed_processes_that_are_no_forks_lose_nothing(workshop, started, record: Record):
    def killed(desk: object, seed: int) -> str | None:
        kind = list(KINDS)[seed]
        rng, recipe, run = random.Random(seed), recipe_of(workshop, kind), workshop.folder / f"process-{seed}"
        process = started("train", recipe, f"out_dir={run}")
        wanted = rng.randint(0, STEPS // 2)
        wait_until(lambda: run.exists() and rows_so_far(run) >= wanted, process)
        process.send_signal(signal.SIGKILL)
        if process.wait(PATIENCE_S) != -signal.SIGKILL:
            return f"{kind}: it ended before"
        code = started("train", recipe, f"out_dir={run}", "--resume").wait(PATIENCE_S)
        return f"{kind}: the resume ended with {code}" if code else difference(run, references[seed])

    seeds = range(6)
    with workshop.desk() as desk:
        references = [workshop.reference(desk, recipe_of(workshop, list(KINDS)[seed])) for seed in seeds]
    record("SIGKILL of `python -m pertoken`, started anew", workshop.each(killed, seeds))
