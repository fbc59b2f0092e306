"""The [model] section of a recipe: an architecture, and the balance loss of its experts, in Hugging Face's names."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pertoken.families import FAMILIES, Family, recipe_names, saved_as
from pertoken.recipe.rope import RopeScaling
from pertoken.recipe.section import Section

__all__ = ["MOE_KEYS", "NUMBERS", "LayerKind", "ModelConfig", "ResolvedModelConfig"]


# MiniMind's
_NUM_EXPERTS, _AUX_LOSS_COEF = 4, 5e-4
MOE_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "aux_loss",
    "aux_loss_coef",
)
# What some families multiply by, each a key of theirs in config.json.
NUMBERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "logits_scaling",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)
_NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}  # as if there were none


@dataclass(frozen=True)
class LayerKind:
    """What attention is in a layer, where layers differ."""

    window: int | None = None  # tokens that a query sees, itself one of them; None: all before it
    rope: Literal["global", "local", "none"] = "global"  # by `rope_theta`, by `rope_local_base_freq`, or not turned


class ModelConfig(Section):
    """The architecture, in Hugging Face's names. Keys left out are derived by `resolve`."""

    family: str = "qwen3"
    hidden_size: int = Field(default=512, ge=1)
    num_hidden_layers: int = Field(default=8, ge=1)
    num_attention_heads: int = Field(default=8, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    intermediate_size: int | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=2)
    max_position_embeddings: int = Field(default=32768, ge=2)
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float | None = Field(default=None, gt=0, le=1)  # of each head, that is turned
    rope_local_base_freq: float | None = Field(default=None, gt=0)  # `rope_theta` of the layers with a window
    sliding_window: int | None = Field(default=None, ge=1)  # tokens that a query sees, itself one of them
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    no_rope_layers: tuple[int, ...] | None = None  # a number a layer: 1 where queries and keys are turned, else 0
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = True
    embedding_multiplier: float | None = Field(default=None, gt=0)
    residual_multiplier: float | None = Field(default=None, gt=0)  # of what attention and feed-forward add
    attention_multiplier: float | None = Field(default=None, gt=0)  # of the scores
    query_pre_attn_scalar: int | None = Field(default=None, ge=1)  # the scores are divided by its square root
    logits_scaling: float | None = Field(default=None, gt=0)  # the logits are divided by it
    final_logit_softcapping: float | None = Field(default=None, gt=0)  # c: a logit x becomes c * tanh(x / c)
    attn_logit_softcapping: float | None = Field(default=None, gt=0)  # the same for the scores of attention
    use_moe: bool = False
    num_experts: int | None = Field(default=None, ge=1)
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    norm_topk_prob: bool | None = None
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    aux_loss: Literal["sequence", "micro_batch", "none"] | None = None
    aux_loss_coef: float | None = Field(default=None, ge=0)
    # Not of the architecture: how the blocks' matrices are kept that an adapter leaves frozen.
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("layer_types", "no_rope_layers", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        known = recipe_names()
        if value in known:
            return value
        if value in FAMILIES:
            of_recipe = FAMILIES[value].recipe_name
            raise ValueError(f'write "{of_recipe}", with model.use_moe = true for experts')
        near = difflib.get_close_matches(value, known, 1)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f"no such family; {hint}There are {', '.join(known)}")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"model.num_attention_heads={heads}: does not divide model.hidden_size={self.hidden_size}; "
                "choose a divisor, or set model.head_dim"
            )
        if kv is not None and heads % kv:
            raise ValueError(
                f"model.num_key_value_heads={kv}: does not divide model.num_attention_heads={heads}; choose a divisor"
            )
        head_dim = self.head_dim or self.hidden_size // heads
        if head_dim % 2:
            raise ValueError(f"model.head_dim={head_dim}: must be even, rotary embeddings turn pairs")
        turned = int(head_dim * (self.partial_rotary_factor or 1.0))
        if turned % 2 or not turned:
            raise ValueError(
                f"model.partial_rotary_factor={self.partial_rotary_factor}: {turned} of {head_dim} dimensions would be "
                "turned; rotary embeddings turn pairs, choose an even number"
            )
        if self.num_experts is not None:
            self._choose_among(self.num_experts)
        self._fits(self._record())
        return self

    def _record(self) -> Family:
        record = saved_as(self.family, use_moe=self.use_moe)
        if record is None:
            with_it = " or ".join(f'"{name}"' for name in recipe_names(use_moe=self.use_moe))
            raise ValueError(
                f'model.use_moe={self.use_moe}: model.family="{self.family}" has no such models; change it, or set '
                f"model.family to {with_it}"
            )
        return record

    def _choose_among(self, experts: int) -> None:
        chosen = self.num_experts_per_tok or 1
        if chosen > experts:
            raise ValueError(
                f"model.num_experts_per_tok={chosen}: more than model.num_experts={experts}; "
                "lower one or raise the other"
            )

    def check_without_a_model(self) -> None:
        """Raises ValueError for what only a loaded model, which brings what is left out here, could make sense of."""
        if not self.use_moe:
            for key in MOE_KEYS:
                if (value := getattr(self, key)) is not None:
                    raise ValueError(f"model.{key}={value}: model.use_moe is false; set it to true, or leave {key} out")
        self._choose_among(self.num_experts or _NUM_EXPERTS)

    def _fits(self, record: Family) -> None:
        """Raises ValueError for what a model of this family cannot be saved with."""
        for key in NUMBERS:
            value = getattr(self, key)
            if key not in record.numbers and value is not None and value != _NEUTRAL.get(key):
                raise ValueError(
                    f"model.{key}={value}: {record.model_type} models have none; leave the key out, or choose another "
                    "model.family"
                )
        self._fits_layers(record)
        if record.experts is None:
            return
        if (shared := self.shared_expert_intermediate_size) is not None and not record.experts.shared:
            raise ValueError(
                f"model.shared_expert_intermediate_size={shared}: {record.model_type} models have no shared expert; "
                "leave the key out, or choose another model.family"
            )
        if self.norm_topk_prob is False and not record.experts.may_not_normalize:
            raise ValueError(
                f'model.norm_topk_prob=False: model.family="{self.family}" with experts is saved as '
                f"{record.model_type}, which always normalizes; leave the key out, or choose another model.family"
            )
        width, own = self.intermediate_size, self.moe_intermediate_size
        if width and own and width != own and not record.experts.own_width:
            raise ValueError(
                f"model.moe_intermediate_size={own}: {record.model_type}, as which this model is saved, has "
                f"model.intermediate_size={width} only; leave one of the two out"
            )

    def _fits_layers(self, record: Family) -> None:
        for key, has in (
            ("sliding_window", record.windows is not None),
            ("layer_types", record.windows is not None),
            ("rope_local_base_freq", record.by_layer_type),
            ("no_rope_layers", record.no_rope),
        ):
            value = getattr(self, key)
            if value is not None and not has:
                raise ValueError(
                    f"model.{key}={value}: {record.model_type} models have none; leave the key out, or choose another "
                    "model.family"
                )
            if isinstance(value, tuple) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"model.{key}: {len(value)} entries for model.num_hidden_layers={self.num_hidden_layers}; give one "
                    "for each layer"
                )
        if self.partial_rotary_factor not in (None, 1.0) and not record.partial_rotary:
            raise ValueError(
                f"model.partial_rotary_factor={self.partial_rotary_factor}: {record.model_type} models turn whole "
                "heads; leave the key out, or choose another model.family"
            )
        if self.rope_scaling is not None and self.rope_scaling.rope_type not in record.rope_types:
            raise ValueError(
                f'model.rope_scaling.rope_type="{self.rope_scaling.rope_type}": {record.model_type} models have none; '
                "leave model.rope_scaling out, or choose another model.family"
            )
        local, base = self.rope_local_base_freq, self.rope_theta or record.rope_theta
        if local is not None and record.rope_local_base_freq is None and local != base:
            raise ValueError(
                f"model.rope_local_base_freq={local}: {record.model_type} models have one base for all layers; leave "
                "the key out"
            )
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and base <= 1:
            raise ValueError(f"model.rope_theta={base}: YaRN needs more than 1; raise it")
        if self.layer_types is not None and "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("model.layer_types: sliding_attention needs model.sliding_window; give it")

    def _layer_types(self, record: Family) -> tuple[Literal["full_attention", "sliding_attention"], ...] | None:
        """Those of the recipe, or the family's usual ones where there is a window; None: no layer has one."""
        if self.sliding_window is None:
            return None
        every = record.full_attention_every
        return self.layer_types or tuple(
            "full_attention" if every and (i + 1) % every == 0 else "sliding_attention"
            for i in range(self.num_hidden_layers)
        )

    def resolve(self, vocab_size: int) -> ResolvedModelConfig:
        """All keys filled in. `vocab_size` counts where `model.vocab_size` is not given.

        The feed-forward width defaults to MiniMind's `ceil(hidden_size * pi / 64) * 64`, the rotary base to the
        family's own, an expert's width (a shared one's too) to the feed-forward width; experts, choices per token and
        the balance loss's coefficient to MiniMind's 4, 1 and 5e-4. The scores of attention are divided by the square
        root of head_dim, and nothing else is multiplied.
        """
        width = self.intermediate_size or math.ceil(self.hidden_size * math.pi / 64) * 64
        moe_width = self.moe_intermediate_size or width
        record = self._record()
        if record.experts is not None and not record.experts.own_width:
            width = moe_width
        shared_width = self.shared_expert_intermediate_size
        if record.experts is not None and record.experts.shared:
            shared_width = shared_width or width
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        rope_theta = self.rope_theta or record.rope_theta
        local_base = self.rope_local_base_freq or record.rope_local_base_freq
        if record.by_layer_type:
            local_base = local_base or rope_theta
        attention_multiplier, query_scalar = self.attention_multiplier, self.query_pre_attn_scalar
        if "attention_multiplier" in record.numbers:
            attention_multiplier = attention_multiplier or head_dim**-0.5
        if "query_pre_attn_scalar" in record.numbers:
            query_scalar = query_scalar or head_dim
        return ResolvedModelConfig(
            family=self.family,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=head_dim,
            intermediate_size=width,
            vocab_size=self.vocab_size or vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=rope_theta,
            rope_scaling=self.rope_scaling,
            rope_local_base_freq=local_base,
            partial_rotary_factor=self.partial_rotary_factor or 1.0,
            sliding_window=self.sliding_window,
            layer_types=self._layer_types(record),
            no_rope_layers=self.no_rope_layers or ((1,) * self.num_hidden_layers if record.no_rope else None),
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tie_word_embeddings,
            embedding_multiplier=self.embedding_multiplier or 1.0,
            residual_multiplier=self.residual_multiplier or 1.0,
            attention_multiplier=attention_multiplier,
            query_pre_attn_scalar=query_scalar,
            logits_scaling=self.logits_scaling or 1.0,
            final_logit_softcapping=self.final_logit_softcapping,
            attn_logit_softcapping=self.attn_logit_softcapping,
            use_moe=self.use_moe,
            num_experts=self.num_experts or _NUM_EXPERTS,
            num_experts_per_tok=self.num_experts_per_tok or 1,
            norm_topk_prob=self.norm_topk_prob is not False,
            moe_intermediate_size=moe_width,
            shared_expert_intermediate_size=shared_width,
            aux_loss=self.aux_loss or "sequence",
            aux_loss_coef=_AUX_LOSS_COEF if self.aux_loss_coef is None else self.aux_loss_coef,
            qk_norm=record.qk_norm,
            qk_norm_of_all_heads=record.qk_norm_of_all_heads,
            qkv_bias=record.qkv_bias,
            norms=record.norms,
            offset_norms=record.offset_norms,
            activation=record.activation,
            scaled_embedding=record.scaled_embedding,
        )


class ResolvedModelConfig(ModelConfig):
    """A `ModelConfig` with nothing left to derive: what a model is built from."""

    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    partial_rotary_factor: float
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    # Of a mixture of experts; without meaning unless `use_moe`.
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_intermediate_size: int
    aux_loss: Literal["sequence", "micro_batch", "none"]
    aux_loss_coef: float
    # The family's features, which are not for a recipe to choose (`pertoken.families.Family`).
    qk_norm: bool
    qk_norm_of_all_heads: bool
    qkv_bias: bool
    norms: Literal["before", "after", "both"]
    offset_norms: bool
    activation: Literal["silu", "gelu_pytorch_tanh"]
    scaled_embedding: bool

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What attention is in each layer."""
        count = self.num_hidden_layers
        local: Literal["global", "local"] = "global" if self.rope_local_base_freq is None else "local"
        types = self.layer_types or ("full_attention",) * count
        kinds = [LayerKind(self.sliding_window, local) if t == "sliding_attention" else LayerKind() for t in types]
        turned = self.no_rope_layers or (1,) * count
        return tuple(kind if turns else replace(kind, rope="none") for kind, turns in zip(kinds, turned, strict=True))

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def embedding_scale(self) -> float:
        """What the embedding of a token is multiplied by."""
        return self.hidden_size**0.5 if self.scaled_embedding else self.embedding_multiplier

    @property
    def attention_scale(self) -> float | None:
        """What the scores of attention are multiplied by; None: 1 / sqrt(head_dim)."""
        if self.query_pre_attn_scalar is not None:
            return float(self.query_pre_attn_scalar**-0.5)
        return self.attention_multiplier

    @property
    def attention_settings(self) -> dict[str, Any]:
        """What attention is in every layer: `scale` and, where there is one, `softcap`."""
        softcap = self.attn_logit_softcapping
        return {"scale": self.attention_scale} | ({} if softcap is None else {"softcap": softcap})

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """How many numbers the norm of queries, and that of keys, is over."""
        if not self.qk_norm_of_all_heads:
            return self.head_dim, self.head_dim
        return self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Of the decoder that this describes, by arithmetic."""
        hidden, queries, keys = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * hidden * self.head_dim * (queries + keys)
        attention += sum(self.qk_norm_sizes) if self.qk_norm else 0
        attention += self.head_dim * (queries + 2 * keys) if self.qkv_bias else 0
        if self.use_moe:
            mlp = self.num_experts * hidden * (3 * self.moe_intermediate_size + 1)
            if self.shared_expert_intermediate_size is not None:
                mlp += hidden * (3 * self.shared_expert_intermediate_size + 1)
        else:
            mlp = 3 * hidden * self.intermediate_size
        tables = 1 if self.tie_word_embeddings else 2
        norms = 4 if self.norms == "both" else 2
        layer = attention + mlp + norms * hidden
        return self.num_hidden_layers * layer + hidden + tables * self.vocab_size * hidden
