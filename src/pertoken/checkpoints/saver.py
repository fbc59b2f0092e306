"""Writing a checkpoint, in the background where asked, so that training stops only to copy its state.

take_snapshot   every rank at once: what later updates do not change any more
write_part      this rank's files, into `.writing-step-N`; a thread's work, for it waits for no other rank
finish          rank 0, once every rank has written: manifest, verification, the rename that makes it a checkpoint
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pertoken.checkpoints.read import prune, set_best
from pertoken.checkpoints.snapshot import Snapshot, or_say_why, take_snapshot
from pertoken.checkpoints.state import TrainerState
from pertoken.checkpoints.write import finish, write_part
from pertoken.errors import CheckpointError
from pertoken.model.protocol import LanguageModel
from pertoken.training.parallel import World

__all__ = ["Outcome", "Progress", "Saver", "save_checkpoint"]


@dataclass(frozen=True)
class Outcome:
    """What became of a save."""

    step: int
    folder: Path
    problem: CheckpointError | None = None  # none: the checkpoint is there
    remark: str | None = None  # it is there, but something beside it went wrong


Progress = Literal["nothing", "writing", "written", "done"] | CheckpointError
"""Of a rank's part of the save; the others are told."""


class Saver:
    """Writes one checkpoint at a time. Every rank calls every method, after the same steps."""

    def __init__(self, world: World, *, keep_last: int | None = None) -> None:
        """`keep_last` checkpoints stay, and the best one; None: all."""
        self._world = world
        self._background = False
        self._keep_last = keep_last
        self._snapshot: Snapshot | None = None
        self._is_best = False
        self._thread: threading.Thread | None = None
        self._progress: Progress = "nothing"
        self._remark: str | None = None
        self._bug: BaseException | None = None

    @property
    def progress(self) -> Progress:
        """Of this rank's part, to be told to the others. Raises what a thread could not have expected."""
        if self._bug is not None:
            raise self._bug
        return self._progress

    def start(self, snapshot: Snapshot, *, background: bool, is_best: bool = False) -> None:
        """Write it, or begin to in the `background`; `advance` tells when it is over. Nothing else is under way."""
        assert self._snapshot is None, "one save at a time"
        self._snapshot, self._background = snapshot, background
        self._is_best, self._remark = is_best, None
        self._progress = "writing"
        alone = snapshot.index is None
        if alone and not self._world.is_main:
            self._progress = "written"
        else:
            self._work(lambda: write_part(snapshot), "written" if not alone else "done", then_finish=alone)

    def advance(self, of_all: Sequence[Progress]) -> Outcome | None:
        """Given every rank's progress: what became of the save if it is over, on every rank the same."""
        snapshot = self._snapshot
        if snapshot is None or "writing" in of_all:
            return None
        problem = next((p for p in of_all if isinstance(p, CheckpointError)), None)
        if problem is None and of_all[0] != "done":
            if self._world.is_main:
                self._progress = "writing"
                self._work(lambda: None, "done", then_finish=True)
            return None
        if problem is not None and self._world.is_main:
            shutil.rmtree(snapshot.aside, ignore_errors=True)
        self._snapshot, self._progress = None, "nothing"
        return Outcome(snapshot.step, snapshot.folder, problem, self._remark)

    def wait(self) -> Outcome | None:
        """Until nothing is under way: what became of it."""
        outcome = None
        while self._snapshot is not None and outcome is None:
            if self._thread is not None:
                self._thread.join()
            outcome = self.advance(self._world.gather(self.progress))
        return outcome

    def join(self) -> None:
        """Let this rank's thread finish what it writes, before an error ends the process. Sends no message."""
        if self._thread is not None:
            self._thread.join()

    def finish_alone(self) -> Outcome | None:
        """What became of a save that no other rank takes part in, when an error ends the run. Sends no message."""
        self.join()
        if self._bug is not None and self._snapshot is not None:
            shutil.rmtree(self._snapshot.aside, ignore_errors=True)
            return None
        return self.advance([self._progress])

    def _work(self, write: Callable[[], None], reached: Literal["written", "done"], *, then_finish: bool) -> None:
        snapshot = self._snapshot
        assert snapshot is not None

        def work() -> None:
            try:
                if self._background:
                    _give_way()
                or_say_why(snapshot.folder, write)
                if then_finish:
                    or_say_why(snapshot.folder, lambda: finish(snapshot))
                    self._remark = self._after(snapshot)
                self._progress = reached
            except CheckpointError as error:
                self._progress = error
            except BaseException as error:
                self._bug = error

        if self._background:
            self._thread = threading.Thread(target=work, name="saving", daemon=True)
            self._thread.start()
        else:
            work()

    def _after(self, snapshot: Snapshot) -> str | None:
        """`best`, and room for the next one; what goes wrong there costs no checkpoint."""
        run_dir = snapshot.folder.parent.parent
        try:
            if self._is_best:
                set_best(run_dir, snapshot.folder)
            if self._keep_last is not None:
                prune(run_dir, keep_last=self._keep_last, newest=snapshot.step)
        except OSError as error:
            return (
                f"{snapshot.folder}: saved, but the link to the best, or earlier ones, could not be changed ({error})"
            )
        return None


def save_checkpoint(
    run_dir: Path,
    *,
    model: LanguageModel,
    tokenizer: Any,
    eos_token_id: int,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    world: World | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNNNN` and return it. Raises CheckpointError.

    All ranks of `world` call it; rank 0 writes, and each rank its own part of what is sharded.
    """
    world = world or World()
    saver = Saver(world)
    snapshot = take_snapshot(
        run_dir,
        model=model,
        tokenizer=tokenizer,
        eos_token_id=eos_token_id,
        optimizer=optimizer,
        state=state,
        world=world,
        copy=False,
    )
    saver.start(snapshot, background=False)
    outcome = saver.wait()
    assert outcome is not None
    if outcome.problem is not None:
        raise outcome.problem
    return outcome.folder


def _give_way() -> None:
    """Let this thread run where training leaves a processor idle.

    The step's threads wait for each other many times a step: whoever takes half of one processor slows all of them.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
