"""Checkpoints: a Hugging Face model folder plus the trainer's state, complete or absent. No pickle anywhere.

    checkpoints/step-00000300/
      config.json generation_config.json model.safetensors tokenizer files   what AutoModelForCausalLM opens; of an
                                                                             adapter what PeftModel opens:
                                                                             adapter_config.json and
                                                                             adapter_model.safetensors, and
                                                                             pertoken_base.json, its base's checksums
      optimizer.safetensors                                                  optimizer tensors by parameter name; where
                                                                             FSDP2 shards them, a file for each rank
                                                                             and optimizer.index.json; none with
                                                                             checkpoint.save_optimizer=false
      metrics.ledger                                                         the figures of every step so far
      trainer_state.json                                                     step, recipe, data fingerprint, scaler, ...
      manifest.json                                                          sizes and checksums, written last
    checkpoints/best -> step-00000200                                        the lowest evaluation loss

A checkpoint is written aside, synced, and renamed into place (write.py). A step draws no random number (the order of
samples is a function of the seed, and nothing drops out), so there is no random state to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pertoken.checkpoints.state import read_state
from pertoken.errors import CheckpointError, ModelError, RecipeError
from pertoken.files import plain_file, sha256, user_path
from pertoken.folders.adapters import base_folder, is_adapter, read_adapter
from pertoken.folders.gguf import load_gguf
from pertoken.folders.minimind import load_minimind
from pertoken.folders.open import load_folder
from pertoken.gguf_file import is_gguf
from pertoken.hub.fetch import on_disk
from pertoken.model.protocol import LanguageModel, TorchModule
from pertoken.recipe.schema import Recipe
from pertoken.text import one_line, reason
from pertoken.training.optimizers import Optimizer
from pertoken.training.parallel import shard_like

__all__ = [
    "LEDGER",
    "MANIFEST",
    "OPTIMIZER",
    "OPTIMIZER_INDEX",
    "STATE",
    "WRITING",
    "Checkpoint",
    "base_of",
    "checkpoint_folder",
    "has_optimizer",
    "has_tokenizer",
    "load_model",
    "load_optimizer",
    "newest_checkpoint",
    "optimizer_part",
    "problem_with",
    "prune",
    "put_damaged_aside",
    "recipe_of",
    "remove_checkpoint",
    "remove_checkpoints",
    "remove_unfinished",
    "resolve_model_folder",
    "set_best",
    "tokenizer_folder",
    "whole_optimizer_tensors",
]

LEDGER = "metrics.ledger"  # safetensors by another name: its checksums cover timings, so equal runs differ in it
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_INDEX = "optimizer.index.json"
WRITING = ".writing-"  # how the name of a folder begins that is not whole yet
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint:
    """A complete checkpoint folder and its trainer state. Raises CheckpointError where that is none of pertoken's, or
    a newer version's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / STATE
        try:
            text = plain_file(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); restore the file") from None
        self.state, self.remarks = read_state(text, path)  # and what to say of keys that are no more

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was saved under, with the keys of this version. Raises CheckpointError."""
        try:
            return Recipe.parse(self.state.recipe)
        except RecipeError as error:
            raise CheckpointError(f"{self.folder / STATE}: recipe: {one_line(str(error))}") from None


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def optimizer_part(rank: int, size: int) -> str:
    """The name of a rank's file where the optimizer's state is sharded."""
    return f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"


def has_optimizer(folder: Path) -> bool:
    """Whether a run can be resumed from a whole checkpoint: not with `checkpoint.save_optimizer=false`."""
    return (folder / OPTIMIZER).exists() or (folder / OPTIMIZER_INDEX).exists()


def load_optimizer(checkpoint: Checkpoint, model: TorchModule, optimizer: Optimizer) -> None:
    """Fill `optimizer` with the saved state of any number of ranks. Raises CheckpointError where it does not fit."""
    tensors = whole_optimizer_tensors(checkpoint.folder)
    for name, parameter in model.named_parameters():
        entries = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        if not entries:  # frozen, or without a gradient so far
            continue
        needed = optimizer.new_state(parameter)
        where = f"{checkpoint.folder / OPTIMIZER}: {name}"
        if entries.keys() != needed.keys():
            raise CheckpointError(
                f"{where} has {', '.join(sorted(entries))}, the optimizer needs {', '.join(sorted(needed))}; "
                "the checkpoint belongs to another optimizer"
            )
        for key, value in entries.items():
            if value.shape != needed[key].shape:
                raise CheckpointError(
                    f"{where}/{key} has shape {tuple(value.shape)}, the optimizer needs {tuple(needed[key].shape)}; "
                    "the checkpoint belongs to another model"
                )
            # On the device of what the optimizer would make itself, and as that is sharded.
            optimizer.state[parameter][key] = shard_like(value, needed[key])


def whole_optimizer_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """From one file, or from every rank's rows."""
    if not (folder / OPTIMIZER_INDEX).exists():
        return load_file(folder / OPTIMIZER)
    index = json.loads((folder / OPTIMIZER_INDEX).read_text(encoding="utf-8"))
    files = sorted({file for entry in index.values() for file in entry["rows"]})
    if outside := [file for file in files if not _lies_in(folder, file)]:
        raise CheckpointError(f"{folder / OPTIMIZER_INDEX}: names {outside[0]!r}, which is outside of the checkpoint")
    parts = {file: load_file(folder / file) for file in files}
    tensors = {}
    for name, entry in index.items():
        pieces = [parts[file][name] for file in entry["rows"]]
        # A number, such as AdamW's step count, is the same on every rank.
        tensors[name] = torch.cat(pieces).view(entry["shape"]) if entry["shape"] else pieces[0]
    return tensors


def _lies_in(folder: Path, name: str) -> bool:
    """Whether it is the plain name of a file in the folder, which no link leads out of."""
    path = folder / name
    return path.name == name and path.resolve().parent == folder.resolve()


def problem_with(folder: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint folder is not complete and intact; None if it is. Without `contents` only sizes are compared."""
    try:
        if not _lies_in(folder, MANIFEST):
            return f"{MANIFEST} leads out of the folder"
        files = json.loads(plain_file(folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if STATE not in files:
            return f"its manifest has no {STATE}"
        for name, expected in files.items():
            if not _lies_in(folder, name):
                return f"{name} leads out of the folder"
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has the wrong size"
        with ThreadPoolExecutor() as pool:  # weights and optimizer at the same time
            found = pool.map(sha256, [folder / name for name in files] if contents else ())
            for (name, expected), checksum in zip(files.items(), found, strict=False):
                if checksum != expected["sha256"]:
                    return f"{name} fails its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest or a file cannot be read ({error})"
    return None


def _steps(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, whole or not."""
    found = [(int(m[1]), p) for p in (run_dir / "checkpoints").glob("step-*") if (m := _NAME.fullmatch(p.name))]
    yield from sorted(found, reverse=True)


def newest_checkpoint(
    run_dir: Path, *, at_most: int | None = None, with_optimizer: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a run, and a line for each newer one that is damaged and left for inspection.

    With `at_most`, checkpoints of later steps are not looked at; `with_optimizer`, nor are those without.
    """
    damaged: list[str] = []
    for step, folder in _steps(run_dir):
        if at_most is not None and step > at_most:
            continue
        problem = problem_with(folder)
        if problem is None and with_optimizer and not has_optimizer(folder):
            continue
        if problem is None:
            return Checkpoint(folder), damaged
        damaged.append(f"{folder}: not used, {problem}")
    return None, damaged


def put_damaged_aside(folder: Path) -> Path:
    """Give way to a new checkpoint of the same step: what is damaged is kept for inspection, as `damaged-NAME`.

    Returns where.
    """
    aside, number = folder.with_name(f"damaged-{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    os.replace(folder, aside)
    return aside


def set_best(run_dir: Path, folder: Path) -> None:
    """Point `checkpoints/best` at `folder`. Raises OSError."""
    link = run_dir / "checkpoints" / "best"
    aside = link.with_name(f".best-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name, target_is_directory=True)
    if link.is_dir() and not link.is_symlink():  # the run was copied by something that follows links
        remove_checkpoint(link)
    if os.path.lexists(link) and not link.is_symlink():
        put_damaged_aside(link)
    os.replace(aside, link)


def prune(run_dir: Path, *, keep_last: int, newest: int) -> None:
    """Remove whole checkpoints but the `keep_last` up to step `newest` and the best one, and what killed saves left.

    `newest` is verified. Later ones were passed over when the run was resumed; they, and broken ones, are left alone
    and do not count, so that no whole checkpoint goes for the sake of a damaged one. Raises OSError.
    """
    checkpoints = run_dir / "checkpoints"
    best = checkpoints / "best"
    best_name = os.readlink(best) if best.is_symlink() else None
    whole = [folder for step, folder in _steps(run_dir) if step <= newest and not problem_with(folder, contents=False)]
    for folder in whole[keep_last:]:
        if folder.name != best_name:
            remove_checkpoint(folder)
    remove_unfinished(run_dir)


def remove_checkpoint(folder: Path) -> None:
    """Remove the files that the manifest lists, then the manifest, then the folder if it is empty. Raises OSError.

    Whatever else somebody has put there stays, as does all of a folder that is no checkpoint of ours. Until the
    manifest goes, the removal can be repeated. Of a link the link alone is removed.
    """
    if folder.is_symlink():
        return folder.unlink()
    names = _listed(folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if names:
        (folder / MANIFEST).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return None


def _listed(folder: Path) -> list[str]:
    """The files of a checkpoint by its manifest; none where there is no such manifest."""
    try:
        names = list(json.loads(plain_file(folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        if STATE not in names or not _lies_in(folder, MANIFEST):
            return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if (folder / name).name == name and not _is_folder(folder / name)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def remove_checkpoints(run_dir: Path) -> None:
    """Remove every checkpoint of a run by its manifest, the newest last, so that a crash leaves one to resume from.

    Links are removed, never followed. Raises OSError.
    """
    checkpoints = run_dir / "checkpoints"
    if checkpoints.is_symlink():
        return checkpoints.unlink()
    if not checkpoints.is_dir():
        return None
    remove_unfinished(run_dir)
    best = checkpoints / "best"
    links = [*checkpoints.glob(".best-*"), *([best] if best.is_symlink() else [])]
    for link in links:
        if link.is_symlink() and _NAME.fullmatch(os.readlink(link)):
            link.unlink()
    found = [*checkpoints.glob("damaged-*"), best, *(folder for _, folder in reversed([*_steps(run_dir)]))]
    for folder in found:
        if _is_folder(folder) or (folder.is_symlink() and folder != best):
            remove_checkpoint(folder)
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    return None


def remove_unfinished(run_dir: Path) -> None:
    """What killed saves left. Raises OSError."""
    for left in (run_dir / "checkpoints").glob(f"{WRITING}*"):
        shutil.rmtree(left) if _is_folder(left) else left.unlink()


def resolve_model_folder(path: str | Path) -> Path:
    """The folder, `.pth` or GGUF file that MODEL means: for a run, its newest valid checkpoint; what the hub has by
    that name is downloaded, without a word. Raises ModelError."""
    path = user_path(on_disk(str(path), "model", label="model"), "model")
    if (path.suffix == ".pth" or is_gguf(path)) and path.is_file():
        return path
    if (path / "config.json").is_file() or is_adapter(path):
        return path
    if (path / "checkpoints").is_dir():
        checkpoint, damaged = newest_checkpoint(path)
        if checkpoint is None:
            raise ModelError("\n".join([f"{path}: a run without a valid checkpoint; train it first", *damaged]))
        return checkpoint.folder
    raise ModelError(f"{path}: not a run, not a model folder (no config.json) and not a .gguf or MiniMind .pth file")


def base_of(folder: Path) -> Path:
    """Where the weights of a model folder are: those of an adapter's base. Raises ModelError."""
    return base_folder(folder, read_adapter(folder).base) if is_adapter(folder) else folder


def has_tokenizer(model: Path) -> bool:
    """Whether what `resolve_model_folder` finds may bring its tokenizer: all but a `.pth` file."""
    return model.is_dir() or is_gguf(model)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model folder is: peft saves none with an adapter, so its base's. Raises ModelError."""
    has_one = any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    return folder if has_one else base_of(folder)


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe that a checkpoint was trained by, as a nested dict; None for any other model folder."""
    if not (folder / MANIFEST).is_file():  # transformers writes a trainer_state.json too
        return None
    return Checkpoint(folder).state.recipe


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    blocks_dtype: torch.dtype | None = None,
    for_adapter: bool = False,
) -> LanguageModel:
    """A model from a run, a checkpoint, a Hugging Face folder, peft's folder of an adapter, a GGUF file or a MiniMind
    `.pth`, with parameters in `dtype`; `blocks_dtype` and `for_adapter` as of `load_folder`.

    Raises ModelError where the path is none of these, or neither pertoken nor transformers has the architecture.
    """
    folder = resolve_model_folder(path)
    if folder.suffix == ".pth":
        return load_minimind(folder, dtype=dtype)
    if is_gguf(folder):
        return load_gguf(folder, dtype=dtype)
    return load_folder(folder, dtype=dtype, blocks_dtype=blocks_dtype, for_adapter=for_adapter)
