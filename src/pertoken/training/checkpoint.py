"""Checkpoints: a Hugging Face model folder plus the trainer's state, complete or absent. No pickle anywhere.

    checkpoints/step-00000300/
      config.json generation_config.json model.safetensors tokenizer files   what AutoModelForCausalLM opens
      optimizer.safetensors                                                  optimiser tensors by parameter name; where
                                                                             FSDP2 shards them, a file for each rank
                                                                             and optimizer.index.json
      trainer_state.json                                                     step, recipe, data fingerprint, scaler, ...
      manifest.json                                                          sizes and checksums, written last
    checkpoints/best -> step-00000200                                        the lowest evaluation loss

A checkpoint is written aside, synced, and renamed into place. A step draws no random number (the order of samples is a
function of the seed, and nothing drops out), so there is no random state to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pertoken.errors import CheckpointError, ModelError
from pertoken.model.folder import load_folder, save_folder
from pertoken.model.minimind import load_minimind
from pertoken.model.transformer import CausalLM
from pertoken.training.parallel import World, shard_like, whole

__all__ = [
    "Checkpoint",
    "load_model",
    "load_optimizer",
    "newest_checkpoint",
    "prune",
    "recipe_of",
    "resolve_model_folder",
    "save_checkpoint",
    "set_best",
]

_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
_OPTIMIZER_INDEX = "optimizer.index.json"


class Checkpoint:
    """A complete checkpoint folder and its trainer state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    model: CausalLM,
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
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name(f".writing-{folder.name}-{world.gather(os.getpid())[0]}")
    weights = _whole_weights(model, world)
    tensors, index = _optimizer_part(model, optimizer, world)

    def on_main(work: Callable[[], None]) -> None:
        world.on_main(lambda: _or_say_why(folder, work))

    def write_model() -> None:
        aside.mkdir(parents=True)
        save_folder(model, aside, tokenizer=tokenizer, eos_token_id=eos_token_id, weights=weights)
        (aside / _STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        if index is not None:
            (aside / _OPTIMIZER_INDEX).write_text(json.dumps(index), encoding="utf-8")

    def write_part() -> None:
        if index is not None:
            save_file(tensors, aside / _part_name(world.rank, world.size))
        elif world.is_main:
            save_file(tensors, aside / _OPTIMIZER)

    def put_in_place() -> None:
        _write_manifest(aside)
        replaced = aside.with_name(f"{aside.name}-replaced")
        if folder.exists():  # the same step again, after a resume from an earlier one
            os.replace(folder, replaced)
        os.replace(aside, folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    try:
        on_main(write_model)
        world.together(lambda: _or_say_why(folder, write_part))
        on_main(put_in_place)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _or_say_why(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: could not be saved ({error}); free space or choose another out_dir"
        ) from error


def _whole_weights(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The state dict on the host, put together from its shards one by one; empty but on rank 0."""
    weights = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor.detach())
        if world.is_main:
            weights[name] = full.cpu()
    return weights


def _optimizer_part(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """This rank's optimiser tensors, `NAME/KEY` -> tensor, for each parameter's state.

    Where parameters are sharded (by rows), these are this rank's rows, and the index says for every tensor which rows
    are in which file; else the index is None.
    """
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors, shapes = {}, {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            name, value = f"{names[parameter]}/{key}", value.detach()
            shapes[name] = list(value.shape)
            local = value.to_local() if hasattr(value, "to_local") else value
            tensors[name] = local.cpu().contiguous()
    if not any(hasattr(parameter, "to_local") for parameter in names):
        return tensors, None
    rows = world.gather({name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()})
    files = [_part_name(rank, world.size) for rank in range(world.size)]
    index = {
        name: {"shape": shape, "rows": {file: part[name] for file, part in zip(files, rows, strict=True)}}
        for name, shape in shapes.items()
    }
    return tensors, index


def _part_name(rank: int, size: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill `optimizer` with the saved state of any number of ranks. Raises CheckpointError where it does not fit."""
    tensors = _whole_optimizer_tensors(checkpoint.folder)
    for name, parameter in model.named_parameters():
        entries = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        for key, value in entries.items():
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint.folder / _OPTIMIZER}: {name}/{key} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}; the checkpoint belongs to another model"
                )
            # A fused AdamW keeps its step count on the parameter's device, as it does its moments.
            optimizer.state[parameter][key] = shard_like(value, parameter)


def _whole_optimizer_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """From one file, or from every rank's rows."""
    if not (folder / _OPTIMIZER_INDEX).exists():
        return load_file(folder / _OPTIMIZER)
    index = json.loads((folder / _OPTIMIZER_INDEX).read_text(encoding="utf-8"))
    parts = {file: load_file(folder / file) for file in sorted({f for entry in index.values() for f in entry["rows"]})}
    tensors = {}
    for name, entry in index.items():
        pieces = [parts[file][name] for file in entry["rows"]]
        # A number, such as AdamW's step count, is the same on every rank.
        tensors[name] = torch.cat(pieces).view(entry["shape"]) if entry["shape"] else pieces[0]
    return tensors


def _write_manifest(folder: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    for path in folder.iterdir():
        _sync(path)
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _sync(folder / _MANIFEST)
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder is not complete and intact; None if it is."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has the wrong size"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} fails its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest or a file cannot be read ({error})"
    return None


def _steps(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, whole or not."""
    found = [(int(m[1]), p) for p in (run_dir / "checkpoints").glob("step-*") if (m := _NAME.fullmatch(p.name))]
    yield from sorted(found, reverse=True)


def newest_checkpoint(run_dir: Path, *, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a run, and a line for each newer one that is damaged and left for inspection.

    With `at_most`, checkpoints of later steps are not looked at.
    """
    damaged: list[str] = []
    for step, folder in _steps(run_dir):
        if at_most is not None and step > at_most:
            continue
        problem = problem_with(folder)
        if problem is None:
            return Checkpoint(folder), damaged
        damaged.append(f"{folder}: not used, {problem}")
    return None, damaged


def set_best(run_dir: Path, folder: Path) -> None:
    """Point `checkpoints/best` at `folder`."""
    link = run_dir / "checkpoints" / "best"
    aside = link.with_name(f".best-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name, target_is_directory=True)
    if link.is_dir() and not link.is_symlink():  # the run was copied by something that follows links
        shutil.rmtree(link)
    os.replace(aside, link)


def prune(run_dir: Path, *, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one, and what a killed save left aside."""
    checkpoints = run_dir / "checkpoints"
    best = checkpoints / "best"
    best_name = os.readlink(best) if best.is_symlink() else None
    for _, folder in list(_steps(run_dir))[keep_last:]:
        if folder.name != best_name:
            shutil.rmtree(folder)
    for left in checkpoints.glob(".writing-*"):
        shutil.rmtree(left)


def resolve_model_folder(path: str | Path) -> Path:
    """The folder or `.pth` file that MODEL means: for a run, its newest valid checkpoint. Raises ModelError."""
    path = Path(path)
    if path.suffix == ".pth" and path.is_file():
        return path
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        checkpoint, damaged = newest_checkpoint(path)
        if checkpoint is None:
            raise ModelError("\n".join([f"{path}: a run without a valid checkpoint; train it first", *damaged]))
        return checkpoint.folder
    raise ModelError(f"{path}: not a run, not a model folder (no config.json) and not a MiniMind .pth file")


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe that a checkpoint was trained by, as a nested dict; None for any other model folder."""
    if not (folder / _STATE).is_file():
        return None
    recipe: dict[str, Any] = Checkpoint(folder).state["recipe"]
    return recipe


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model from a run, a checkpoint, a Hugging Face folder or a MiniMind `.pth`, with parameters in `dtype`.

    Raises ModelError where the path is none of these, or neither pertoken nor transformers has the architecture.
    """
    folder = resolve_model_folder(path)
    return load_minimind(folder, dtype=dtype) if folder.suffix == ".pth" else load_folder(folder, dtype=dtype)
