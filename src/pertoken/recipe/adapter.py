"""The section [adapter] of a recipe: low-rank matrices that are trained in place of the model's own."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pertoken.recipe.section import Section, one_or_many

__all__ = ["ALL_LINEAR", "AdapterConfig"]

ALL_LINEAR = "all-linear"  # every linear layer of the blocks, as peft says it
_MODULE = re.compile(r"\w+(\.\w+)*")
_NOT_ADAPTED = ("lm_head", "embed_tokens")


class AdapterConfig(Section):
    """LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021): y = W x + scale * B (A x), where
    A [r, in] and B [out, r] are trained, W is frozen, and scale is alpha / r, or alpha / sqrt(r) with `rslora`
    (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023)."""

    kind: Literal["none", "lora"] = "none"
    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    # Names of modules, or how those end: "q_proj", "self_attn.q_proj".
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(ALL_LINEAR,), min_length=1)
    dropout: float = 0.0
    rslora: bool = False

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("targets")
    @classmethod
    def _names_of_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f'"{ALL_LINEAR}" are all there are; leave the others out')
        for name in value:
            if name.rpartition(".")[2] in _NOT_ADAPTED:
                raise ValueError(f"{name} cannot be adapted, only linear layers of the blocks; leave it out")
            if name != ALL_LINEAR and not _MODULE.fullmatch(name):
                raise ValueError(f'{name!r} is no name of a module; write "{ALL_LINEAR}", or names like "q_proj"')
        return value

    @field_validator("dropout")
    @classmethod
    def _nothing_drops_out(cls, value: float) -> float:
        if value != 0:
            raise ValueError("must be 0; with dropout a step's gradient would depend on how the step is split")
        return value
