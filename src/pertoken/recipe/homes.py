"""Optimizers, trackers and engines by the names that a recipe gives them, and where each one is defined.

A home is text, "module:attribute". The recipe stands below training, tracking and engines, and is read without torch,
so it knows their names and imports nothing of them. Whoever runs one asks `at_home` for it.

To add an optimizer, a tracker or an engine: write its file, its test, and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["ENGINES", "OPTIMIZERS", "OPTIMIZER_KEYS", "TRACKERS", "OptimizerHome", "at_home", "known_name"]

OPTIMIZER_KEYS = (
    "betas",
    "muon_learning_rate",
    "optimizer_dtype",
)  # of [train], which some optimizers read and others do not


@dataclass(frozen=True)
class OptimizerHome:
    """An optimizer, and what the recipe must know of it."""

    home: str  # of an `OptimizerKind`
    reads: tuple[str, ...] = ()  # of OPTIMIZER_KEYS
    can_shard: bool = True  # whether its update is right where parameters are sharded (train.parallel = "fsdp")
    can_float64: bool = True  # whether it updates float64 weights


OPTIMIZERS: dict[str, OptimizerHome] = {
    "adamw": OptimizerHome("pertoken.training.optimizers.adamw:ADAMW", reads=("betas", "optimizer_dtype")),
    "muon": OptimizerHome(
        "pertoken.training.optimizers.muon:MUON", reads=("betas", "muon_learning_rate", "optimizer_dtype")
    ),
    "adafactor": OptimizerHome("pertoken.training.optimizers.adafactor:ADAFACTOR", can_shard=False),
    "adamw8bit": OptimizerHome(
        "pertoken.training.optimizers.adamw8bit:ADAMW8BIT", reads=("betas",), can_shard=False, can_float64=False
    ),
}

# Homes of a `TrackerKind`.
TRACKERS: dict[str, str] = {
    "csv": "pertoken.tracking.trackers.csv:CSV",
    "tensorboard": "pertoken.tracking.trackers.tensorboard:TENSORBOARD",
    "wandb": "pertoken.tracking.trackers.wandb:WANDB",
}

# Homes of a `ChooseEngine`: what runs a model by this engine, or a RecipeError that says why it cannot.
ENGINES: dict[str, str] = {
    "cpu": "pertoken.engines.cpu.choose:choose",
    "compile": "pertoken.engines.torch_compile:choose",
    "plain": "pertoken.engines.plain:choose",
}


def at_home(home: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = home.partition(":")
    return getattr(importlib.import_module(module), attribute)


def known_name(value: str, known: Collection[str]) -> str:
    """`value` itself. Raises ValueError where it is none of `known`, with all of them and the nearest one."""
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"must be one of {', '.join(map(repr, known))}{meant}")
