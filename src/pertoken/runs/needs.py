"""What a run needs of memory, told before anything of the model is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from pertoken.checkpoints.read import base_of, resolve_model_folder
from pertoken.errors import PertokenError
from pertoken.folders.config import config_from_hf
from pertoken.folders.files import read_json
from pertoken.folders.gguf import config_of_gguf
from pertoken.folders.refusals import NotCovered
from pertoken.gguf_file import is_gguf
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.training.memory import machine_bytes, needs_text, training_bytes

__all__ = ["architecture", "memory_needs"]


def architecture(recipe: Recipe, init_from: str | None, num_tokens: int) -> ResolvedModelConfig | None:
    """Of the model that the recipe trains; None where its decoder is transformers' own, or no config.json says it."""
    if init_from is None:
        return recipe.model.resolve(num_tokens)
    folder = Path(init_from)
    if folder.suffix == ".pth":
        return None
    folder = resolve_model_folder(folder)
    if is_gguf(folder):
        return config_of_gguf(folder)
    try:
        return config_from_hf(read_json(base_of(folder) / "config.json"))
    except NotCovered:
        return None


def memory_needs(recipe: Recipe, init_from: str | None, num_tokens: int, device: torch.device) -> str | None:
    """A line, by part, and what the device has; None where the architecture is not our decoder's, or cannot be read, of
    which loading says more.

    `init_from` is where the weights are: the recipe's, as a path, or a checkpoint of the run.
    """
    try:
        config = architecture(recipe, init_from, num_tokens)
    except PertokenError:
        return None
    if config is None:
        return None
    there, where = machine_bytes(), "this machine"
    if device.type == "cuda":
        there, where = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    return needs_text(training_bytes(recipe, config), there, where)
