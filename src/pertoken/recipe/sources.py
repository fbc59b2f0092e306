"""One of several sources of a recipe's samples: `[[data.sources]]`."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pertoken.files import check_path
from pertoken.hub.names import check_hub_name
from pertoken.recipe.section import Section, one_or_many
from pertoken.text import shown

__all__ = ["READING_KEYS", "SourceConfig"]

READING_KEYS = (  # of [data], that a source may have of its own
    *("format", "text_key", "prompt_key", "completion_key", "columns", "ignore", "supervise", "on_rewrite"),
    *("reasoning", "overlong", "on_bad_row", "special_in_text", "document", "newlines"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class SourceConfig(Section):
    """Files, how often and how much of them is trained, and what of [data] is otherwise for them."""

    path: tuple[str, ...] = Field(min_length=1)
    name: str = ""  # that of the file or folder, where it is left out
    repeat: int = Field(default=1, ge=1)
    max_rows: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, lt=1)
    eval_fraction: float | None = Field(default=None, ge=0, lt=1)
    # As in [data]; None: what [data] has.
    format: str | None = None
    text_key: str | None = None
    prompt_key: str | None = None
    completion_key: str | None = None
    columns: dict[str, str] | None = None
    ignore: tuple[str, ...] | None = None
    supervise: Literal["all", "last"] | None = None
    on_rewrite: Literal["split", "error"] | None = None
    reasoning: Literal["error", "inline", "drop"] | None = None
    overlong: Literal["drop", "truncate", "error"] | None = None
    on_bad_row: Literal["error", "skip"] | None = None
    special_in_text: Literal["text", "special", "error"] | None = None
    document: str | None = None
    newlines: Literal["lf", "keep"] | None = None

    @field_validator("path", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("path")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(check_hub_name(path)) for path in value)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """A source without a name has that of its first file or folder, as far as a name may have its characters."""
        if isinstance(values, dict) and not values.get("name") and (path := one_or_many(values.get("path"))):
            name = PurePath(str(path[0])).name.partition(".")[0]
            values = {**values, "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "source"}
        return values

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{shown(value)}: a name has letters, digits, _, - and ., at most 64")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.max_rows is not None and self.fraction is not None:
            raise ValueError(f"max_rows={self.max_rows}: fraction={self.fraction} is given too; keep one of the two")
        return self

    @property
    def reading(self) -> dict[str, Any]:
        """The keys of [data] that this source has of its own."""
        return {key: value for key in READING_KEYS if (value := getattr(self, key)) is not None}
