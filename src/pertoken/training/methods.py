"""Ways to train that differ in memory, as the recipe's keys that each one means."""

from __future__ import annotations

from typing import Any

from pertoken.recipe.schema import Recipe

__all__ = ["METHODS", "cheaper_methods", "keys_of", "with_method"]

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "bfloat16 optimizer": {"train": {"optimizer_dtype": "bfloat16"}},
    "adamw8bit": {"train": {"optimizer": "adamw8bit"}},
    "LoRA": {"adapter": {"kind": "lora"}},
    "LoRA, frozen in bfloat16": {"adapter": {"kind": "lora"}, "model": {"frozen_dtype": "bfloat16"}},
}
"""Each takes less than the one before."""


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the method's keys; not checked."""
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in METHODS[method].items()}
    return recipe.model_copy(update=sections)


def keys_of(method: str) -> str:
    """As one writes them: 'adapter.kind="lora" and model.frozen_dtype="bfloat16"'."""
    keys = [f'{section}.{key}="{value}"' for section, of in METHODS[method].items() for key, value in of.items()]
    return " and ".join(keys)


def cheaper_methods(recipe: Recipe) -> list[str]:
    """Methods that the recipe may turn to. LoRA needs weights to start from, and eight bits whole parameters."""
    train = recipe.train
    found = []
    if recipe.adapter.kind == "none" and train.optimizer == "adamw" and train.dtype != "float64":
        found += ["bfloat16 optimizer"] if train.optimizer_dtype == "float32" else []
        found += ["adamw8bit"] if train.parallel == "ddp" else []
    if recipe.init_from is not None and recipe.stage == "sft":
        found += ["LoRA"] if recipe.adapter.kind == "none" else []
        found += ["LoRA, frozen in bfloat16"] if train.dtype == "bfloat16" else []
    return found
