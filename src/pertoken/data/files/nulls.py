"""Nulls that a columnar file adds: it holds one for every key that the object of another row has."""

from __future__ import annotations

from typing import Any

__all__ = ["without_nulls"]


def without_nulls(value: Any) -> Any:
    """The value of a column without the keys of its objects, at any depth, that hold null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
