"""What a format is: the keys that a row must have, and what is made of the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.problem import RowProblem
from pertoken.text import names

__all__ = ["Fields", "Format", "Gives", "KeyNames"]

Gives = Literal["conversation", "text"]


@dataclass(frozen=True)
class KeyNames:
    """How a recipe names the keys that it may name: data.text_key, data.prompt_key, data.completion_key."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"


class Fields:
    """The keys and values of one row. A format reads them here, so that the keys that it does not read are known."""

    __slots__ = ("_read", "_row")

    def __init__(self, row: dict[str, Any]) -> None:
        self._row = row
        self._read: list[str] = []

    def get(self, key: str) -> Any:
        """The value, None where the row has no such key. Columnar files hold None for it, which means the same."""
        self._read.append(key)
        return self._row.get(key)

    def need(self, key: str) -> Any:
        """The value. Raises RowProblem where there is none."""
        value = self.get(key)
        if value is None:
            state = "null" if key in self._row else f"missing, keys found: {names(self._row)}"
            raise RowProblem(key, f"{state}; add it, or name the right key in the recipe's [data]")
        return value

    def unread(self) -> tuple[str, ...]:
        """The keys that have a value and were not read."""
        return tuple([key for key, value in self._row.items() if key not in self._read and value is not None])


@dataclass(frozen=True)
class Format:
    """How the rows of one format are read. One of them is one file of this package and one line of `FORMATS`."""

    name: str  # in the recipe's data.format
    gives: Gives  # conversations are for stage = "sft", texts for stage = "pretrain"
    keys: Callable[[KeyNames], tuple[str, ...]]  # that a row must have; "auto" chooses by them
    read: Callable[[Fields, KeyNames], Conversation | str]  # raises RowProblem
