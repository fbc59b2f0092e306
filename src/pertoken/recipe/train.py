"""The recipe's section [train]."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pertoken.recipe.homes import ENGINES, OPTIMIZER_KEYS, OPTIMIZERS, known_name
from pertoken.recipe.section import Section
from pertoken.text import shown

__all__ = ["TrainConfig"]


class TrainConfig(Section):
    """The objective's optimization, and the plan it is computed by."""

    epochs: int | float = 1  # a whole number is kept as one
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)  # of all steps, instead of a number of them
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    optimizer: Annotated[str, AfterValidator(lambda name: known_name(name, OPTIMIZERS))] = "adamw"
    # What AdamW's two moments are kept in: "float32" means that they are as the weights, "bfloat16" takes half of it.
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
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
    # Whether passes on a GPU are recorded and played again, which a small model gains from. None: where that can be.
    cuda_graphs: bool | None = None
    loss_impl: Literal["auto", "liger", "cce"] = "auto"
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    eval_interval: int | None = Field(default=None, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    # Evaluations in a row without a better loss, after which the run ends. The schedule stays that of the whole run.
    early_stopping: int | None = Field(default=None, ge=1)

    @field_validator("epochs", mode="plain")
    @classmethod
    def _some_epochs(cls, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("must be a finite number, written without quotes")
        if not 0 < value < 2**63:
            raise ValueError("must be more than 0" if value <= 0 else "must be a number of 64 bits")
        return int(value) if value == int(value) else value

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def _not_a_share(cls, value: Any) -> Any:
        if isinstance(value, float) and 0 < value < 1:
            raise ValueError("must be a whole number; a share of all steps is train.warmup_ratio")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(
                f"train.warmup_ratio={self.warmup_ratio}: train.warmup_steps={self.warmup_steps} is given too; "
                "keep one of the two"
            )
        home = OPTIMIZERS[self.optimizer]
        for key in OPTIMIZER_KEYS:
            value = getattr(self, key)
            if key not in home.reads and value != type(self).model_fields[key].default:
                readers = " or ".join(f'"{name}"' for name, other in OPTIMIZERS.items() if key in other.reads)
                raise ValueError(
                    f'train.{key}={shown(value)}: train.optimizer="{self.optimizer}" does not use it; '
                    f"set train.optimizer={readers}, or leave the key out"
                )
        if self.optimizer_dtype == "bfloat16" and self.dtype == "float64":
            raise ValueError(
                'train.optimizer_dtype="bfloat16": with train.dtype="float64" it would be all of the error; leave it '
                "out, or change train.dtype"
            )
        if self.dtype == "float64" and not home.can_float64:
            raise ValueError(
                f'train.optimizer="{self.optimizer}": has no float64, and train.dtype="float64"; change one of the two'
            )
        if self.device.startswith("mps") and self.dtype == "float64":
            raise ValueError(
                f'train.dtype="float64": train.device="{self.device}" has no float64; set train.dtype="float32", '
                'or train.device="cpu"'
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
        if kind not in ("auto", "cpu", "cuda", "mps") or (index and not index.isdigit()):
            raise ValueError('must be "auto", "cpu", "cuda", "cuda:N" or "mps"')
        return value
