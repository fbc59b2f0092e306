"""Writing a checkpoint, in the background where asked, so that training stops only to copy its state.

    take_snapshot   every rank at once: what later updates do not change any more
    _write          this rank's files, into `.writing-step-N`; a thread's work, for it waits for no other rank
    _finish         rank 0, once every rank has written: manifest, verification, the rename that makes it a checkpoint

Whatever the moment of a crash, a folder that is named as a checkpoint is whole.
"""

from __future__ import annotations

import json
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pertoken.checkpoints.ledger import LEDGER
from pertoken.checkpoints.read import (
    MANIFEST,
    OPTIMIZER,
    OPTIMIZER_INDEX,
    STATE,
    WRITING,
    checkpoint_folder,
    optimizer_part,
    prune,
    put_damaged_aside,
    set_best,
)
from pertoken.errors import CheckpointError
from pertoken.files import free_bytes, sha256, sync
from pertoken.folders.open import save_folder
from pertoken.model.protocol import LanguageModel, TorchModule
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import World, whole

__all__ = ["Outcome", "Progress", "Saver", "Snapshot", "save_checkpoint", "take_snapshot"]

_BESIDES = 32 * 2**20  # bytes that tokenizer, state and manifest may take


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint, on the host."""

    folder: Path
    step: int
    aside: Path  # where it is written until it is whole
    tensors: dict[str, Tensor]  # of the optimizer: this rank's rows where sharded, else all of it
    index: dict[str, Any] | None  # where the rows of which rank are; None if not sharded
    world: World
    write_model: Callable[[], None]  # weights and all that is not the optimizer's; rank 0's


@dataclass(frozen=True)
class Outcome:
    """What became of a save."""

    step: int
    folder: Path
    problem: CheckpointError | None = None  # none: the checkpoint is there
    remark: str | None = None  # it is there, but something beside it went wrong


Progress = Literal["nothing", "writing", "written", "done"] | CheckpointError
"""Of a rank's part of the save; the others are told."""


def take_snapshot(
    run_dir: Path,
    *,
    step: int,
    model: LanguageModel,
    tokenizer: Any,
    eos_token_id: int,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    copy: bool,
    ledger: dict[str, Tensor] | None = None,
) -> Snapshot:
    """All that the checkpoint of `step` needs, once every rank has called it. `state` is JSON, and gets the step;
    `ledger` are the figures of all steps so far, on rank 0.

    With `copy` the model may be trained on at once. Raises CheckpointError, on every rank, where there is no room.
    """
    folder = checkpoint_folder(run_dir, step)
    aside = folder.with_name(f"{WRITING}{folder.name}-{world.gather(os.getpid())[0]}")
    needed = sum(world.gather(_optimizer_bytes(optimizer))) + sum(_bytes(t) for t in model.state_dict().values())
    needed += sum(_bytes(column) for column in (ledger or {}).values())

    def make_room() -> None:
        free = free_bytes(aside.parent)
        if free < needed + _BESIDES:
            raise CheckpointError(
                f"{folder}: could not be saved (it takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free); "
                "free space or choose another out_dir"
            )
        if not aside.parent.exists():
            aside.parent.mkdir()
            sync(run_dir)
        aside.mkdir()

    world.on_main(lambda: _or_say_why(folder, make_room))
    try:
        weights = _whole_weights(model, world, copy=copy)
        tensors, index = _optimizer_tensors(model, optimizer, world, copy=copy)
    except Exception as error:
        if not out_of_memory(error) or world.size > 1:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        remedy = "set checkpoint.async_save=false" if copy else "free memory and go on with --resume"
        raise CheckpointError(f"{folder}: could not be saved (out of memory for a copy); {remedy}") from None

    def write_model() -> None:
        save_folder(model, aside, tokenizer=tokenizer, eos_token_id=eos_token_id, weights=weights)
        (aside / STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        if ledger is not None:
            save_file(ledger, aside / LEDGER)
        if index is not None:
            (aside / OPTIMIZER_INDEX).write_text(json.dumps(index), encoding="utf-8")

    return Snapshot(folder, step, aside, tensors, index, world, write_model)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(_bytes(value.to_local() if hasattr(value, "to_local") else value) for value in values)


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    host = tensor.cpu().contiguous()
    return host.clone() if copy and host.data_ptr() == tensor.data_ptr() else host


def _whole_weights(model: TorchModule, world: World, *, copy: bool) -> dict[str, Tensor]:
    """The state dict on the host, put together from its shards one by one; empty but on rank 0."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor.detach())
        if world.is_main:
            weights[name] = _on_host(full, copy=copy)
    return weights


def _optimizer_tensors(
    model: TorchModule, optimizer: torch.optim.Optimizer, world: World, *, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The optimizer's tensors that this rank writes, `NAME/KEY` -> tensor, for each parameter's state.

    Where parameters are sharded (by rows), these are this rank's rows, and the index says for every tensor which rows
    are in which file. Else rank 0 has all and the index is None.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    sharded = any(hasattr(parameter, "to_local") for parameter in names)
    tensors, shapes = {}, {}
    if sharded or world.is_main:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                name, value = f"{names[parameter]}/{key}", value.detach()
                shapes[name] = list(value.shape)
                tensors[name] = _on_host(value.to_local() if hasattr(value, "to_local") else value, copy=copy)
    if not sharded:
        return tensors, None
    rows = world.gather({name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()})
    files = [optimizer_part(rank, world.size) for rank in range(world.size)]
    index = {
        name: {"shape": shape, "rows": {file: part[name] for file, part in zip(files, rows, strict=True)}}
        for name, shape in shapes.items()
    }
    return tensors, index


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
            self._work(lambda: _write(snapshot), "written" if not alone else "done", then_finish=alone)

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
                _or_say_why(snapshot.folder, write)
                if then_finish:
                    _or_say_why(snapshot.folder, lambda: _finish(snapshot))
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
    step: int,
    model: LanguageModel,
    tokenizer: Any,
    eos_token_id: int,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNNNN` and return it. `state` is JSON and gets the step. Raises CheckpointError.

    All ranks of `world` call it; rank 0 writes, and each rank its own part of what is sharded.
    """
    world = world or World()
    saver = Saver(world)
    snapshot = take_snapshot(
        run_dir,
        step=step,
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


def _write(snapshot: Snapshot) -> None:
    """This rank's files."""
    world, aside = snapshot.world, snapshot.aside
    if world.is_main:
        snapshot.write_model()
    name = OPTIMIZER if snapshot.index is None else optimizer_part(world.rank, world.size)
    save_file(snapshot.tensors, aside / name)


def _finish(snapshot: Snapshot) -> None:
    """Make a checkpoint of the files that all ranks have written."""
    aside, folder = snapshot.aside, snapshot.folder
    files = {}
    for path in sorted(aside.iterdir()):
        sync(path)
        _read_back(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    if folder.exists():  # the same step again, after a resume that passed over a damaged checkpoint
        put_damaged_aside(folder)
    os.replace(aside, folder)
    sync(folder.parent)


def _read_back(path: Path) -> None:
    """Raise where a file is not what such a file must be: a disk may lose writes without a word."""
    if path.suffix == ".safetensors" or path.name == LEDGER:
        with safe_open(path, "pt") as tensors:  # compares the header with the file's size
            tensors.keys()
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path.name} reads back as something else: {error}") from None


def _or_say_why(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        if out_of_memory(error):
            raise CheckpointError(f"{folder}: could not be saved (out of memory); free memory") from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise CheckpointError(
            f"{folder}: could not be saved ({error}); free space or choose another out_dir"
        ) from error
