"""The recipe's section [data]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pertoken.data.formats import FORMATS, KeyNames
from pertoken.files import check_path
from pertoken.hub.names import check_hub_name
from pertoken.recipe.homes import known_name
from pertoken.recipe.section import Section, one_or_many

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
    tokenizer: str | None = None
    add_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = Field(default={})
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["drop", "truncate", "error"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"
    store: str | None = None
    workers: int | None = Field(default=None, ge=1)

    @field_validator("path", "eval_path", "add_tokens", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return known_name(value, ["auto", *FORMATS])

    @field_validator("path", "eval_path")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(check_hub_name(path)) for path in value)

    @field_validator("tokenizer", "store")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else check_path(check_hub_name(value))

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.eval_path and self.eval_fraction:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction}: data.eval_path is given too; keep one of the two"
            )
        return self

    @property
    def key_names(self) -> KeyNames:
        """What the formats that have no keys of their own read."""
        return KeyNames(self.text_key, self.prompt_key, self.completion_key)
