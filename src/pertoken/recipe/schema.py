"""The recipe: one TOML file plus `key=value` overrides, frozen and validated.

Every message is one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from pertoken.data.formats import FORMATS
from pertoken.errors import RecipeError
from pertoken.files import check_path, plain_file, user_path
from pertoken.hub.names import check_hub_name
from pertoken.recipe.adapter import AdapterConfig
from pertoken.recipe.data import DataConfig
from pertoken.recipe.explain import explain
from pertoken.recipe.homes import TRACKERS, known_name
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.old_keys import without_old_keys
from pertoken.recipe.section import Section, one_or_many
from pertoken.recipe.train import TrainConfig
from pertoken.text import reason, shown

__all__ = [
    "CheckpointConfig",
    "LogConfig",
    "Recipe",
    "apply_override",
]


class CheckpointConfig(Section):
    """What is kept of a run, and how often."""

    save_interval: int | None = Field(default=None, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = True
    async_save: bool = True
    save_optimizer: bool = True  # false: smaller checkpoints, which are models that no run can be resumed from


class LogConfig(Section):
    """What is shown and tracked."""

    log_interval: int = Field(default=10, ge=1)
    trackers: tuple[Annotated[str, AfterValidator(lambda name: known_name(name, TRACKERS))], ...] = ()
    project: str = Field(default="pertoken", min_length=1)
    grad_stats: bool = False

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)


class Recipe(Section):
    """What is learned (data, model, objective, schedule) and how it is computed. See README.md for every key."""

    stage: Literal["pretrain", "sft"]
    out_dir: str = Field(min_length=1)
    init_from: str | None = None
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    _remarks: tuple[str, ...] = PrivateAttr(default=())

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of keys that have changed their names, a line each."""
        return self._remarks

    @field_validator("out_dir", "init_from")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else check_path(check_hub_name(value))

    @model_validator(mode="before")
    @classmethod
    def _stage_defaults(cls, values: Any) -> Any:
        """A learning rate left out becomes the stage's usual one (for an adapter ten times as much in "sft"), and is
        recorded as such."""
        if isinstance(values, dict) and isinstance(values.get("train", {}), dict):
            train, adapter = dict(values.get("train", {})), values.get("adapter")
            if train.get("learning_rate") is None and "stage" in values:
                has_adapter = isinstance(adapter, dict) and adapter.get("kind", "none") != "none"
                usual = {"pretrain": 5e-4, "sft": 2e-4 if has_adapter else 2e-5}
                train["learning_rate"] = usual.get(str(values["stage"]), 1e-4)
                values = {**values, "train": train}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.data.tokenizer is None and (self.init_from is None or self.init_from.endswith(".pth")):
            raise ValueError(
                "data.tokenizer: missing; name a tokenizer folder (or set init_from to a model folder that has one)"
            )
        if self.data.max_seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"data.max_seq_len={self.data.max_seq_len}: longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; lower one or raise the other"
            )
        if self.init_from is None:
            self.model.check_without_a_model()
        self._check_adapter()
        for data in self.data.all_settings:
            self._check_reading(data)
        if self.train.early_stopping is not None and not self.data.holds_out:
            raise ValueError(
                f"train.early_stopping={self.train.early_stopping}: there is no evaluation data; set data.eval_path or "
                "data.eval_fraction, or leave the key out"
            )
        if self.data.eval_split == "tail" and self.stage != "pretrain":
            raise ValueError('data.eval_split="tail": only raw text has a tail; use "rows" for conversations')
        return self

    def _check_reading(self, data: DataConfig) -> None:
        """Raises ValueError where rows are to be read as this stage does not read them."""
        gives = None if data.format == "auto" else FORMATS[data.format].gives
        if self.stage == "pretrain" and gives == "conversation":
            raise ValueError(
                f'data.format="{data.format}": stage = "pretrain" reads raw text; use "text" or stage = "sft"'
            )
        if self.stage == "sft" and gives == "text":
            raise ValueError(
                f'data.format="{data.format}": stage = "sft" reads conversations; use stage = "pretrain" for text'
            )
        for key, default in (("document", "file"), ("newlines", "lf")):
            if self.stage == "sft" and (value := getattr(data, key)) != default:
                raise ValueError(
                    f'data.{key}={shown(value)}: only raw text is read so; remove it, or use stage = "pretrain"'
                )

    def _check_adapter(self) -> None:
        """Raises ValueError for what an adapter cannot be trained with."""
        if self.model.frozen_dtype == "bfloat16":
            what = 'model.frozen_dtype="bfloat16"'
            if self.adapter.kind == "none":
                raise ValueError(f'{what}: without an adapter nothing is frozen; set adapter.kind="lora"')
            if self.train.dtype != "bfloat16":
                raise ValueError(
                    f'{what}: with train.dtype="{self.train.dtype}" the frozen weights would be rounded to less than '
                    'what products are computed in; set train.dtype="bfloat16"'
                )
        if self.adapter.kind == "none":
            for key, field in AdapterConfig.model_fields.items():
                if (value := getattr(self.adapter, key)) != field.default:
                    raise ValueError(
                        f'adapter.{key}={shown(value)}: adapter.kind is "none"; set adapter.kind="lora", or leave the '
                        "key out"
                    )
            return
        if self.init_from is None:
            raise ValueError(
                f'adapter.kind="{self.adapter.kind}": the weights that it leaves frozen would be random ones; set '
                "init_from to the model to adapt"
            )
        if self.init_from.endswith((".pth", ".gguf")):
            raise ValueError(
                f"init_from={self.init_from}: an adapter's folder names a Hugging Face folder as its base; make one of "
                "it first (pertoken export)"
            )
        if self.train.optimizer == "muon":
            raise ValueError(
                'train.optimizer="muon": Muon is for whole matrices, not for the factors of an adapter; set "adamw"'
            )

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a TOML recipe and apply dotted `key=value` overrides. Raises RecipeError."""
        path = user_path(path, "recipe")
        try:
            values = tomllib.loads(plain_file(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); name a recipe, `pertoken new sft` prints one"
            raise RecipeError(f"{path}: {problem}") from None
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error.reason} at byte {error.start}); save the recipe as UTF-8"
            raise RecipeError(f"{path}: {problem}") from None
        except (ValueError, RecursionError) as error:  # TOML's own errors, and numbers of thousands of digits
            raise RecipeError(f"{path}: not valid TOML: {reason(error)}") from None
        for override in overrides:
            apply_override(values, override)
        return cls.parse(values)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Recipe:
        """Validate a nested dict, keys of earlier versions included. Raises RecipeError with one line per problem."""
        try:
            _check_numbers(values)
            values, remarks = without_old_keys(values)
            recipe = cls.model_validate(values)
            recipe._remarks = remarks
            return recipe
        except RecursionError:
            raise RecipeError("the recipe is nested too deeply; no key needs more than a few levels") from None
        except ValidationError as error:
            raise RecipeError("\n".join(explain(error, cls))) from None

    def to_toml(self) -> str:
        """The resolved recipe: every key that has a value. Where `init_from` is given, it says what the model is, so
        of the model's keys only those that were set."""
        values = self.model_dump(mode="json")
        if self.init_from is not None:
            values["model"] = self.model.model_dump(mode="json", exclude_unset=True)
        return tomli_w.dumps(_without_none(values))

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, for comparing two recipes."""
        return dict(_flatten(self.model_dump(mode="json")))


def _check_numbers(value: Any, key: str = "") -> None:
    """TOML's whole numbers have 64 bits; Python's and its parser's do not, and what computes with them has."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RecipeError(f"{key}={shown(value)}: must be a number of 64 bits")
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_numbers(item, f"{key}.{name}".removeprefix("."))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and prefix + key != "data.template_kwargs":
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in place. The value is TOML; what is not TOML, or meant for a text key, is text."""
    key, separator, text = override.partition("=")
    key = key.strip()
    try:
        override.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{override}: not UTF-8; write it as UTF-8") from None
    if not separator or not key:
        raise RecipeError(f"{override}: not an override; write key=value, for example train.learning_rate=3e-4")
    value: Any = text
    if not _takes_only_text(key):
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):  # not TOML, or TOML that Python cannot hold
            value = text
    *sections, leaf = key.split(".")
    for section in sections:
        if isinstance(values, list):  # of [[data.sources]], by its place
            if not section.isdecimal() or int(section) >= len(values):
                raise RecipeError(f"{override}: there are {len(values)} sections of that name; count them from 0")
            values = values[int(section)]
        else:
            values = values.setdefault(section, {})
        if not isinstance(values, dict | list):
            raise RecipeError(f"{override}: {section} is not a section of the recipe")
    if isinstance(values, list):
        raise RecipeError(f"{override}: name a section by its place from 0, and a key of it")
    values[leaf] = value


def _field_at(key: str) -> Any:
    """The annotation of a dotted key, or None."""
    annotation: Any = Recipe
    for part in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
    return annotation


def _takes_only_text(key: str) -> bool:
    annotation = _field_at(key)
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return all(o in (str, type(None)) or typing.get_origin(o) is Literal for o in options)
