"""The recipe's section [data]."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pertoken.data.files.text import TextReading
from pertoken.data.formats import FORMATS, KeyNames, standard_keys
from pertoken.files import check_path
from pertoken.hub.names import check_hub_name
from pertoken.recipe.homes import known_name
from pertoken.recipe.section import Section, one_or_many
from pertoken.text import shown

__all__ = ["DataConfig"]


class DataConfig(Section):
    """Where the samples come from and how they are made."""

    path: tuple[str, ...] = Field(min_length=1)
    eval_path: tuple[str, ...] = ()
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    eval_split: Literal["rows", "tail"] = "rows"
    format: str = "auto"
    text_key: str = Field(default="text", min_length=1)
    prompt_key: str = Field(default="prompt", min_length=1)
    completion_key: str = Field(default="completion", min_length=1)
    columns: dict[str, str] = Field(default={})
    ignore: tuple[str, ...] = ()
    supervise: Literal["all", "last"] = "all"
    tokenizer: str | None = None
    add_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = Field(default={})
    template_date: str | None = None
    end_of_turn: str | None = Field(default=None, min_length=1)
    on_rewrite: Literal["split", "error"] = "split"
    reasoning: Literal["error", "inline", "drop"] = "error"
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["drop", "truncate", "error"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"
    special_in_text: Literal["text", "special", "error"] = "text"
    document: str = Field(default="file", min_length=1)
    newlines: Literal["lf", "keep"] = "lf"
    store: str | None = None
    workers: int | None = Field(default=None, ge=1)

    @field_validator("path", "eval_path", "add_tokens", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return known_name(value, ["auto", *FORMATS])

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: dict[str, str]) -> dict[str, str]:
        for key, name in value.items():
            known_name(key, standard_keys())
            if not name or list(value.values()).count(name) > 1:
                said = f"{name!r} twice" if name else "no name"
                raise ValueError(f"{said}; give each of the keys the name of a column of its own")
        return value

    @field_validator("path", "eval_path")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(check_hub_name(path)) for path in value)

    @field_validator("tokenizer", "store")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else check_path(check_hub_name(value))

    @field_validator("template_date")
    @classmethod
    def _day(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 10 or not _is_day(value)):
            raise ValueError(f'{shown(value)} is no day; write it as "2026-01-31"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.eval_path and self.eval_fraction:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction}: data.eval_path is given too; keep one of the two"
            )
        for key, name, default in (
            ("text", self.text_key, "text"),
            ("prompt", self.prompt_key, "prompt"),
            ("completion", self.completion_key, "completion"),
        ):
            if key in self.columns and name not in (default, self.columns[key]):
                raise ValueError(f"data.columns: {key} is named by data.{key}_key={name!r} too; keep one of the two")
        return self

    @property
    def text_reading(self) -> TextReading:
        """How files of plain text are read."""
        return TextReading(self.document, self.newlines)

    @property
    def key_names(self) -> KeyNames:
        """What is said of the keys of rows."""
        keys = (self.text_key, self.prompt_key, self.completion_key)
        return KeyNames(*keys, columns=self.columns, ignore=self.ignore, supervise=self.supervise)


def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True
