"""What a checkpoint is written from: a copy of the state on the host, which later updates do not change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pertoken.checkpoints.read import LEDGER, OPTIMIZER_INDEX, STATE, WRITING, checkpoint_folder, optimizer_part
from pertoken.checkpoints.state import TrainerState
from pertoken.errors import CheckpointError
from pertoken.files import free_bytes, sync
from pertoken.folders.adapters import saved_state
from pertoken.folders.open import save_folder
from pertoken.model.protocol import LanguageModel, TorchModule
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import World, whole

__all__ = ["Snapshot", "or_say_why", "take_snapshot"]

_BESIDES = 32 * 2**20  # bytes that tokenizer, state and manifest may take


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint, on the host."""

    folder: Path
    step: int
    aside: Path  # where it is written until it is whole
    tensors: dict[str, Tensor] | None  # of the optimizer: this rank's rows where sharded, else all; None: not saved
    index: dict[str, Any] | None  # where the rows of which rank are; None if not sharded
    world: World
    write_model: Callable[[], None]  # weights and all that is not the optimizer's; rank 0's


def take_snapshot(
    run_dir: Path,
    *,
    model: LanguageModel,
    tokenizer: Any,
    eos_token_id: int,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    world: World,
    copy: bool,
    ledger: dict[str, Tensor] | None = None,
    with_optimizer: bool = True,
) -> Snapshot:
    """All that the checkpoint of `state.step` needs, once every rank has called it; `ledger` are the figures of all
    steps so far, on rank 0. Without the optimizer it is a model that no run can be resumed from.

    With `copy` the model may be trained on at once. Raises CheckpointError, on every rank, where there is no room.
    """
    folder = checkpoint_folder(run_dir, state.step)
    aside = folder.with_name(f"{WRITING}{folder.name}-{world.gather(os.getpid())[0]}")
    needed = sum(world.gather(_optimizer_bytes(optimizer))) if with_optimizer else 0
    needed += sum(_bytes(t) for t in saved_state(model).values())
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

    world.on_main(lambda: or_say_why(folder, make_room))
    try:
        weights = _whole_weights(model, world, copy=copy)
        tensors, index = _optimizer_tensors(model, optimizer, world, copy=copy) if with_optimizer else (None, None)
    except Exception as error:
        if not out_of_memory(error) or world.size > 1:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        remedy = "set checkpoint.async_save=false" if copy else "free memory and continue with resume=True"
        raise CheckpointError(f"{folder}: could not be saved (out of memory for a copy); {remedy}") from None

    def write_model() -> None:
        save_folder(model, aside, tokenizer=tokenizer, eos_token_id=eos_token_id, weights=weights)
        (aside / STATE).write_text(state.to_json(), encoding="utf-8")
        if ledger is not None:
            save_file(ledger, aside / LEDGER)
        if index is not None:
            (aside / OPTIMIZER_INDEX).write_text(json.dumps(index), encoding="utf-8")

    return Snapshot(folder, state.step, aside, tensors, index, world, write_model)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(_bytes(value.to_local() if hasattr(value, "to_local") else value) for value in values)


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    host = tensor.cpu().contiguous()
    return host.clone() if copy and host.data_ptr() == tensor.data_ptr() else host


def _whole_weights(model: LanguageModel, world: World, *, copy: bool) -> dict[str, Tensor]:
    """The state to save on the host, put together from its shards one by one; empty but on rank 0."""
    weights = {}
    for name, tensor in saved_state(model).items():
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


def or_say_why(folder: Path, work: Callable[[], None]) -> None:
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
