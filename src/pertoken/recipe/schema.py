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

from pertoken.data.formats import FORMATS, KeyNames
from pertoken.errors import RecipeError
from pertoken.files import check_path, plain_file, user_path
from pertoken.recipe.explain import explain
from pertoken.recipe.homes import ENGINES, OPTIMIZER_KEYS, OPTIMIZERS, TRACKERS, known_name
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig, Section
from pertoken.recipe.old_keys import without_old_keys
from pertoken.text import reason, shown

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "Recipe",
    "ResolvedModelConfig",
    "TrainConfig",
    "apply_override",
]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


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
        return _as_tuple(value)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return known_name(value, ["auto", *FORMATS])

    @field_validator("path", "eval_path")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_path, value))

    @field_validator("tokenizer", "store")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        return None if value is None else check_path(value)

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


class TrainConfig(Section):
    """The objective's optimization, and the plan it is computed by."""

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    optimizer: Annotated[str, AfterValidator(lambda name: known_name(name, OPTIMIZERS))] = "adamw"
    muon_learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    grad_clip: float = Field(default=1.0, ge=0)
    # z_loss_coef * log(Z)^2 of every supervised token, as part of the objective (PaLM, section 5, has 1e-4); 0: none.
    z_loss_coef: float = Field(default=0.0, ge=0)
    # A finite gradient norm above `spike_factor` times the median of the last 100 steps' norms (of at least 20) is a
    # spike; 0 turns this off. "warn" says so and updates, "skip" leaves the update out, "stop" ends the run (exit 3).
    on_spike: Literal["stop", "skip", "warn"] = "warn"
    spike_factor: float = Field(default=10.0, ge=0)
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    device: str = "auto"
    seed: int = Field(default=42, ge=0)
    micro_batch_tokens: int = Field(default=8192, ge=1)
    engine: Annotated[str, AfterValidator(lambda name: known_name(name, ["auto", *ENGINES]))] = "auto"
    loss_impl: Literal["auto", "liger", "cce"] = "auto"
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    eval_interval: int | None = Field(default=None, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        home = OPTIMIZERS[self.optimizer]
        for key in OPTIMIZER_KEYS:
            value = getattr(self, key)
            if key not in home.reads and value != type(self).model_fields[key].default:
                readers = " or ".join(f'"{name}"' for name, other in OPTIMIZERS.items() if key in other.reads)
                raise ValueError(
                    f'train.{key}={shown(value)}: train.optimizer="{self.optimizer}" does not use it; '
                    f"set train.optimizer={readers}, or leave the key out"
                )
        if self.parallel == "fsdp" and not home.can_shard:
            raise ValueError(
                f'train.optimizer="{self.optimizer}": its update needs whole parameters, and train.parallel="fsdp" '
                'shards them; set train.parallel="ddp", or another optimizer'
            )
        return self

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each must be at least 0 and below 1")
        return value

    @field_validator("spike_factor")
    @classmethod
    def _spikes_are_above_the_median(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be above 1, or half of all steps would be spikes; 0 turns spikes off")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        kind, _, index = value.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError('must be "auto", "cpu", "cuda" or "cuda:N"')
        return value


class CheckpointConfig(Section):
    """What is kept of a run, and how often."""

    save_interval: int | None = Field(default=None, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = True
    async_save: bool = True


class LogConfig(Section):
    """What is shown and tracked."""

    log_interval: int = Field(default=10, ge=1)
    trackers: tuple[Annotated[str, AfterValidator(lambda name: known_name(name, TRACKERS))], ...] = ()
    project: str = Field(default="pertoken", min_length=1)
    grad_stats: bool = False

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return _as_tuple(value)


class Recipe(Section):
    """What is learned (data, model, objective, schedule) and how it is computed. See README.md for every key."""

    stage: Literal["pretrain", "sft"]
    out_dir: str = Field(min_length=1)
    init_from: str | None = None
    model: ModelConfig = ModelConfig()
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
        return None if value is None else check_path(value)

    @model_validator(mode="before")
    @classmethod
    def _stage_defaults(cls, values: Any) -> Any:
        """The learning rate left out becomes the stage's usual one, and is recorded as such."""
        if isinstance(values, dict) and isinstance(values.get("train", {}), dict):
            train = dict(values.get("train", {}))
            if train.get("learning_rate") is None and "stage" in values:
                train["learning_rate"] = {"pretrain": 5e-4, "sft": 2e-5}.get(str(values["stage"]), 1e-4)
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
        gives = None if self.data.format == "auto" else FORMATS[self.data.format].gives
        if self.stage == "pretrain" and gives == "conversation":
            raise ValueError(
                f'data.format="{self.data.format}": stage = "pretrain" reads raw text; use "text" or stage = "sft"'
            )
        if self.stage == "sft" and gives == "text":
            raise ValueError(
                f'data.format="{self.data.format}": stage = "sft" reads conversations; use stage = "pretrain" for text'
            )
        if self.data.eval_split == "tail" and self.stage != "pretrain":
            raise ValueError('data.eval_split="tail": only raw text has a tail; use "rows" for conversations')
        return self

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
    return value


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
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{override}: {section} is not a section of the recipe")
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
