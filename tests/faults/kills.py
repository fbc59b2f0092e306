"""One trial of a SIGKILL: a run of some kind, killed at some moment, resumed to its end."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.harness import PATIENCE_S, Desk, Process, Workshop, difference, torn_event, whole_steps

from pertoken.recipe.schema import CheckpointConfig

STEPS, INTERVAL = 18, 3
SAVE_S = 0.03  # about what a save takes
SETTINGS = {
    "train__max_steps": STEPS,
    "train__batch_size": 4,  # of 101 chats
    "train__eval_interval": 100,
    "checkpoint__save_interval": INTERVAL,
    "checkpoint__keep_best": False,
}
EXPERTS = {"model__use_moe": True, "model__num_experts": 4, "model__aux_loss_coef": 0.1}
MUON = {"train__optimizer": "muon", "train__muon_learning_rate": 4e-3}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense in bfloat16": {"train__dtype": "bfloat16"},
    "dense in float16 with a scaler": {"train__dtype": "float16"},
    "Muon": MUON,
    "Muon in bfloat16": MUON | {"train__dtype": "bfloat16"},
    "experts": EXPERTS,
    "experts, Muon, bfloat16": EXPERTS | MUON | {"train__dtype": "bfloat16"},
    "experts in float16": EXPERTS | {"train__dtype": "float16"},
    "many micro-batches": {"train__micro_batch_tokens": 400},
    "compiled": {"train__compile": "on"},
    "not compiled": {"train__compile": "off"},
    "over the ends of epochs": {"train__batch_size": 12},
    "evaluations and the best kept": {"train__eval_interval": 4, "checkpoint__keep_best": True},
    "a save each step, one kept": {"checkpoint__save_interval": 1, "checkpoint__keep_last": 1},
}
if "async_save" in CheckpointConfig.model_fields:
    KINDS |= {"saved in the foreground": {"checkpoint__async_save": False}}


@dataclass(frozen=True)
class Kill:
    """`share` of the way through the run, or of the way through a save; the seed of what is left to chance."""

    kind: str
    in_save: bool
    seed: int
    twice: bool = False


def recipe_of(workshop: Workshop, kind: str) -> Path:
    name = re.sub(r"\W+", "-", kind)
    return workshop.recipe(f"kill-{name}", **(SETTINGS | KINDS[kind]))


def names_of_writing(run: Path) -> set[str]:
    try:
        return {p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".writing-")}
    except OSError:
        return set()


def kill_in_a_save(process: Process, run: Path, rng: random.Random, most: int, kill: Callable[[], None]) -> bool:
    """Kill while a save that chance names is under way; whether it came to that."""
    left = names_of_writing(run)  # by a run that was killed before
    wanted, seen = rng.randint(1, most), set[str]()
    while len(seen) < wanted:
        if process.poll() is not None:
            return False
        seen |= names_of_writing(run) - left
        time.sleep(0.0002)
    time.sleep(rng.uniform(0.0, SAVE_S))
    kill()
    process.wait(PATIENCE_S)
    return bool(names_of_writing(run) - left)


def kill_at_random(process: Process, rng: random.Random, duration_s: float, kill: Callable[[], None]) -> bool:
    """Kill at any moment of a run that takes so long; whether it came to that."""
    deadline = time.monotonic() + rng.uniform(0.0, duration_s)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    if process.poll() is not None:
        return False
    kill()
    return process.wait(PATIENCE_S) == -signal.SIGKILL


def trial(desk: Desk, kill: Kill, recipe: Path, reference: Path, duration_s: float) -> str | None:
    """What was lost; None if nothing was. Runs that end before the kill are made again."""
    rng = random.Random(f"{kill}")
    run = desk.new()
    resume: tuple[str, ...] = ()
    for _ in range(2 if kill.twice else 1):
        problem = _killed(desk, kill, recipe, run, rng, duration_s, resume)
        if problem is not None:
            return f"{kill}: {problem}"
        resume = ("--resume",)
    ended = desk.run("train", recipe, f"out_dir={run}", "--resume")
    if ended.code != 0:
        return f"{kill}: the resume ended with {ended.code}: {ended.err[-2000:]}"
    lost = difference(run, reference) or torn_event(run)
    return lost and f"{kill}: {lost}"


def _killed(
    desk: Desk, kill: Kill, recipe: Path, run: Path, rng: random.Random, duration_s: float, resume: tuple[str, ...]
) -> str | None:
    """Kill a run; what is wrong with what is left."""
    for attempt in range(20):
        flags = resume if attempt == 0 else ("--overwrite",)
        before = whole_steps(run) if flags == resume else []
        process = desk.start("train", recipe, f"out_dir={run}", *flags).process

        def now(process: Process = process) -> None:
            process.send_signal(signal.SIGKILL)

        if kill.in_save:
            killed = kill_in_a_save(process, run, rng, max(1, 6 - attempt // 2), now)
        else:
            killed = kill_at_random(process, rng, duration_s * 0.95**attempt, now)
        process.wait(PATIENCE_S)
        if killed:
            return lost_by_a_kill(run, before, INTERVAL)
    return "it could not be killed in time"


def lost_by_a_kill(run: Path, before: list[int], interval: int) -> str | None:
    """Whether a checkpoint that was there, or the one before that which was being written, is there no more."""
    newest = max(whole_steps(run), default=0)
    expected = max([0, *before, *(int(name.split("-")[2]) - interval for name in names_of_writing(run))])
    return f"the newest whole checkpoint is of step {newest}, not {expected}" if newest < expected else None
