"""The files of a checkpoint: written aside, synced, read back, and renamed into place.

Whatever the moment of a crash, a folder that is named as a checkpoint is whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from pertoken.checkpoints.read import (
    LEDGER,
    MANIFEST,
    OPTIMIZER,
    has_optimizer,
    optimizer_part,
    problem_with,
    put_damaged_aside,
    remove_checkpoint,
)
from pertoken.checkpoints.snapshot import Snapshot
from pertoken.files import sha256, sync

__all__ = ["finish", "write_part"]


def write_part(snapshot: Snapshot) -> None:
    """This rank's files."""
    world, aside = snapshot.world, snapshot.aside
    if world.is_main:
        snapshot.write_model()
    if snapshot.tensors is None:
        return
    name = OPTIMIZER if snapshot.index is None else optimizer_part(world.rank, world.size)
    save_file(snapshot.tensors, aside / name)


def finish(snapshot: Snapshot) -> None:
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
    before = None
    if folder.exists():  # the same step again, after a resume that passed over a damaged checkpoint
        weights_only = problem_with(folder, contents=False) is None and not has_optimizer(folder)
        before = put_damaged_aside(folder)
        before = before if weights_only else None
    os.replace(aside, folder)
    sync(folder.parent)
    if before is not None:  # or for the sake of its optimizer, when the run ended there
        remove_checkpoint(before)


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
