"""The recipe's section [data]."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pertoken.data.files.text import TextReading
from pertoken.data.formats import FORMATS, KeyNames, standard_keys
from pertoken.files import check_path
from pertoken.hub.names import check_hub_name
from pertoken.recipe.homes import known_name
from pertoken.recipe.section import Section, one_or_many
from pertoken.recipe.sources import SourceConfig
from pertoken.text import shown

__all__ = ["DataConfig"]


class DataConfig(Section):
    """Where the samples come from and how they are made."""

    path: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()  # instead of `path`
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

    @field_validator("sources", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("give each source a section of its own, [[data.sources]] in double brackets")
        return tuple(value) if isinstance(value, list) else value

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
        if not self.path and not self.sources:
            raise ValueError("data.path: missing; name the data, or add [[data.sources]]")
        if self.path and self.sources:
            raise ValueError(f"data.path={shown(list(self.path))}: [[data.sources]] are given too; keep one of the two")
        self._check_sources()
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

    def _check_sources(self) -> None:
        names = [source.name for source in self.sources]
        for i, source in enumerate(self.sources):
            if names.count(source.name) > 1:
                raise ValueError(f"data.sources.{i}.name={source.name!r}: another source has it; give each its own")
            if self.eval_path and source.eval_fraction:
                raise ValueError(
                    f"data.sources.{i}.eval_fraction={source.eval_fraction}: data.eval_path is given too; keep one"
                )
            try:
                self.of_source(source)
            except ValidationError as error:
                problem = error.errors()[0]
                key = ".".join(str(part) for part in problem["loc"])
                said = str(problem.get("ctx", {}).get("error", problem["msg"]))
                raise ValueError(f"data.sources.{i}{'.' if key else ': '}{key}{': ' if key else ''}{said}") from None

    def of_source(self, source: SourceConfig) -> DataConfig:
        """The settings by which the rows of a source are read."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key not in ("sources", "eval_path")}
        fraction = self.eval_fraction if source.eval_fraction is None else source.eval_fraction
        values |= {"path": source.path, "eval_fraction": 0.0 if self.eval_path else fraction, **source.reading}
        return DataConfig.model_validate(values)

    def settings_of(self, source: str) -> DataConfig:
        """The settings by which the rows of the source of this name are read; "" where there is only `path`."""
        if not source:
            return self
        return self.of_source(next(found for found in self.sources if found.name == source))

    @property
    def all_settings(self) -> tuple[DataConfig, ...]:
        """Those of every source, or of the one path."""
        return tuple(map(self.of_source, self.sources)) or (self,)

    @property
    def holds_out(self) -> bool:
        """Whether there are evaluation data."""
        return bool(self.eval_path) or any(settings.eval_fraction for settings in self.all_settings)

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
