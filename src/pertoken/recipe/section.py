"""What the sections of a recipe have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "one_or_many"]


class Section(BaseModel):
    """A part of a recipe: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def one_or_many(value: Any) -> Any:
    """TOML's text or list as the tuple that a frozen section holds."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
