"""Checkpoints: a Hugging Face model folder plus the trainer's state, complete or absent. No pickle anywhere.

    checkpoints/step-00000300/
      config.json generation_config.json model.safetensors tokenizer files   what AutoModelForCausalLM opens
      optimizer.safetensors                                                  optimiser tensors by parameter name
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pertoken.errors import CheckpointError, ModelError
from pertoken.model.folder import load_folder, save_folder
from pertoken.model.hf import load_minimind
from pertoken.model.transformer import CausalLM

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
) -> Path:
    """Write `checkpoints/step-NNNNNNNN` and return it. `state` is JSON and gets the step. Raises CheckpointError."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        save_folder(model, aside, tokenizer=tokenizer, eos_token_id=eos_token_id)
        save_file(_optimizer_tensors(model, optimizer), aside / _OPTIMIZER)
        (aside / _STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        _write_manifest(aside)
        replaced = aside.with_name(f"{aside.name}-replaced")
        if folder.exists():  # the same step again, after a resume from an earlier one
            os.replace(folder, replaced)
        os.replace(aside, folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: could not be saved ({error}); free space or choose another out_dir"
        ) from error
    return folder


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`NAME/KEY` -> tensor, for each parameter's state."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill `optimizer` with the saved state. Raises CheckpointError where it does not fit."""
    tensors = load_file(checkpoint.folder / _OPTIMIZER)
    for name, parameter in model.named_parameters():
        entries = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        for key, value in entries.items():
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint.folder / _OPTIMIZER}: {name}/{key} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}; the checkpoint belongs to another model"
                )
            # A fused AdamW keeps its step count on the parameter's device, as it does its moments.
            optimizer.state[parameter][key] = value.to(parameter.device)


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


def newest_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a run, and a line for each newer one that is damaged and left for inspection."""
    damaged: list[str] = []
    for _, folder in _steps(run_dir):
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
