"""What a format is: the keys that a row must have, and what is made of the row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.text import names

__all__ = ["Fields", "Format", "Gives", "KeyNames"]

Gives = Literal["conversation", "text"]


@dataclass(frozen=True)
class KeyNames:
    """What a recipe says of rows: data.text_key, prompt_key, completion_key, columns, ignore and supervise."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    columns: Mapping[str, str] = field(default_factory=dict)  # a format's key -> the file's
    ignore: tuple[str, ...] = ()
    supervise: Literal["all", "last"] = "all"

    @cached_property
    def in_file(self) -> dict[str, str]:
        """A format's key -> what the file calls it, where that is another name."""
        own = {"text": self.text, "prompt": self.prompt, "completion": self.completion}
        return {**{key: name for key, name in own.items() if key != name}, **self.columns}


class Fields:
    """The keys and values of one row. A format reads them here, so that the keys that it does not read are known.

    A format's keys are looked up by the names that the recipe gives them, and a column that was given another name has
    no longer its own.
    """

    __slots__ = ("_in_file", "_read", "_row")

    def __init__(self, row: dict[str, Any], in_file: Mapping[str, str] | None = None) -> None:
        self._row = row
        self._in_file = in_file or {}
        self._read: list[str] = []

    def name(self, key: str) -> str:
        """What the file calls it."""
        return self._in_file.get(key, key)

    def peek(self, key: str) -> Any:
        """The value, None where the row has no such key, without reading it."""
        if key not in self._in_file and key in self._in_file.values():
            return None
        return self._row.get(self.name(key))

    def get(self, key: str) -> Any:
        """The value, None where the row has no such key. Columnar files hold None for it, which means the same."""
        value = self.peek(key)
        if key in self._in_file or key not in self._in_file.values():
            self._read.append(self.name(key))
        return value

    def need(self, key: str) -> Any:
        """The value. Raises RowProblem where there is none."""
        value = self.get(key)
        if value is None:
            name = self.name(key)
            state = "null" if name in self._row else f"missing, keys found: {names(self._row)}"
            raise RowProblem(name, f"{state}; add it, or name the right key in the recipe's [data]")
        return value

    def text(self, key: str) -> str:
        """The text, empty where there is none. Raises RowProblem for anything else."""
        value = self.get(key)
        return "" if value is None else self._as_text(key, value)

    def need_text(self, key: str) -> str:
        """The text. Raises RowProblem where there is none, or something else."""
        return self._as_text(key, self.need(key))

    def _as_text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise RowProblem(self.name(key), f"{kind_of(value)} found; give text")
        return value

    def unread(self) -> tuple[str, ...]:
        """The keys that have a value and were not read."""
        return tuple([key for key, value in self._row.items() if key not in self._read and value is not None])


@dataclass(frozen=True)
class Format:
    """How the rows of one format are read. One of them is one file of this package and one line of `FORMATS`."""

    name: str  # in the recipe's data.format
    gives: Gives  # conversations are for stage = "sft", texts for stage = "pretrain"
    keys: tuple[str, ...]  # that a row must have; "auto" chooses by them
    read: Callable[[Fields], Conversation | str]  # raises RowProblem
    optional: tuple[str, ...] = ()  # keys that are read where a row has them
    looks: Callable[[Any], bool] | None = None  # at the value of the first key, where several formats have that key
