"""What is wrong with a row, and how its values are called."""

from __future__ import annotations

from typing import Any

__all__ = ["RowProblem", "kind_of"]


class RowProblem(Exception):
    """Becomes a `BadRow`: the key at fault, and what is wrong with what to do about it."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem


def kind_of(value: Any) -> str:
    """What JSON calls a value, in words."""
    if isinstance(value, list):
        odd = next((item for item in value if not isinstance(item, dict)), None)
        inner = "a list" if isinstance(odd, list) else kind_of(odd)  # one level: lists may be nested a thousandfold
        return "a list" if odd is None else f"a list with {inner}"
    kinds = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)
