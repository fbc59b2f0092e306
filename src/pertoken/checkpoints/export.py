"""A trained model in the forms that others open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from pertoken.checkpoints.read import has_tokenizer, load_model, resolve_model_folder, tokenizer_folder
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.errors import ModelError, RecipeError
from pertoken.files import user_path
from pertoken.folders.adapters import merge as merge_adapter
from pertoken.folders.minimind import save_minimind
from pertoken.folders.open import save_folder
from pertoken.text import reason

__all__ = ["export_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(path: str, out: Path, *, format_: str, dtype: str | None, merge: bool = False) -> list[Path]:
    """Write the model at `path` to `out` as "hf" or "minimind"; the files and folders written.

    Of a run that trains an adapter "hf" writes peft's folder of it, or with `merge` the model with the adapter in its
    weights.

    A Hugging Face folder keeps the precision it was trained in (float32) unless `dtype` says otherwise; MiniMind's
    `.pth` is float16, its own habit, unless it does. An `out` that exists already is refused, and nothing is left of
    one that cannot be written whole (RecipeError).
    """
    out = user_path(out, "out")
    if format_ not in ("hf", "minimind"):
        raise RecipeError(f"format={format_}: must be hf or minimind")
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(f"dtype={dtype}: must be one of {', '.join(_DTYPES)}")
    source = resolve_model_folder(path)
    model = load_model(source)
    if merge and model.adapter is None:
        raise RecipeError(f"merge=True: {path} has no adapter; leave it out")
    if merge:
        merge_adapter(model)
    if format_ == "minimind" and model.adapter is not None:
        raise RecipeError(f"format=minimind: a .pth has no place for the adapter of {path}; give merge=True")
    if format_ == "minimind":
        name = (
            f"pertoken_{model.facts.hidden_size}{'_moe' if model.facts.has_experts else ''}.pth"  # MiniMind's pattern
        )
        file = out if out.suffix == ".pth" else out / name
        _must_be_new(file)
        with _whole_or_absent(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_minimind(model, file, dtype=_DTYPES[dtype or "float16"])
        return [file]
    if not has_tokenizer(source):
        raise ModelError(
            f"{path}: a .pth has no tokenizer; fine-tune from it with data.tokenizer set, then export the run"
        )
    _must_be_new(out)
    tokenizer = open_tokenizer(tokenizer_folder(source))
    with _whole_or_absent(out):
        out.mkdir(parents=True)
        save_folder(
            model,
            out,
            tokenizer=tokenizer,
            eos_token_id=_eos_token_id(source, tokenizer.eos_token_id),
            dtype=_DTYPES[dtype] if dtype else None,
        )
    return [out]


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[None]:
    """Raises RecipeError, with nothing left at `path`, which was not there, where writing it fails."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch.save has its own file writer
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.parent.is_dir():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise RecipeError(f"out={path}: cannot be written ({reason(error)}); choose another, or free space") from None


def _must_be_new(path: Path) -> None:
    if os.path.lexists(path):
        raise RecipeError(f"out={path}: exists already; name a new one, nothing is overwritten")


def _eos_token_id(folder: Path, otherwise: int | None) -> int | None:
    """What generation stops at, as the folder itself has it; an adapter's has no config.json."""
    import json

    path = next((folder / n for n in ("config.json", "generation_config.json") if (folder / n).is_file()), None)
    found = otherwise if path is None else json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", otherwise)
    return found if isinstance(found, int) else otherwise
