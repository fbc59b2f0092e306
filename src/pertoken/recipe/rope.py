"""[model.rope_scaling] of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pertoken.recipe.section import Section

__all__ = ["ROPE_SCALINGS", "RopeScaling"]

# Of each kind of scaling the keys that it must have, and those that it may have.
ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


class RopeScaling(Section):
    """Rotary frequencies for longer texts than a model was first trained on (`model/rope.py` has the formulas)."""

    rope_type: Literal["llama3", "linear", "yarn"] = "llama3"
    factor: float = Field(ge=1)  # frequencies are divided by it, all of them or the low ones
    original_max_position_embeddings: int | None = Field(default=None, ge=1)  # tokens
    # Llama 3.1. Fewer turns than the first within the original length: a low frequency; more than the second: a high
    # one, which stays as it is.
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    # YaRN. More turns than the first: a high frequency; fewer than the second: a low one.
    beta_fast: float | None = Field(default=None, gt=0)  # None: 32
    beta_slow: float | None = Field(default=None, gt=0)  # None: 1
    attention_factor: float | None = Field(default=None, gt=0)  # of cosine and sine; None: from the keys below
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)
    truncate: bool | None = None  # the dimensions between which the ramp goes are whole numbers; None: true

    @model_validator(mode="after")
    def _consistent(self) -> RopeScaling:
        required, optional = ROPE_SCALINGS[self.rope_type]
        for key in type(self).model_fields.keys() - {"rope_type"}:
            given = getattr(self, key) is not None
            if given and key not in (*required, *optional):
                raise ValueError(f'{key}={getattr(self, key)}: rope_type="{self.rope_type}" has none; leave it out')
            if not given and key in required:
                raise ValueError(f'{key}: missing, and rope_type="{self.rope_type}" needs it; add it')
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor={high}: must be more than low_freq_factor={low}")
        return self
