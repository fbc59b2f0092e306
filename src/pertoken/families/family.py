"""What a record of a family says. A record is plain data: reading one costs nothing and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Experts", "Family", "Gguf"]


@dataclass(frozen=True)
class Experts:
    """How a config.json describes a mixture of experts."""

    switch: str | None = None  # the key that says whether there are any; None: every model of the type has them
    num_key: str = "num_experts"  # as it is written; `num_local_experts` and `num_experts` are both read
    own_width: bool = True  # experts have `moe_intermediate_size`; False: `intermediate_size` is theirs
    shared: bool = False  # beside them one of `shared_expert_intermediate_size` that every token goes through
    may_not_normalize: bool = True  # `norm_topk_prob` may be false; False: the weights of a token's experts sum to 1


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp writes models of a type in its format, GGUF."""

    architecture: str  # `general.architecture`, which also begins the keys of its own
    # The two rows of a query or key projection that are turned together are neighbours, not half a head apart.
    neighbours_turn: bool = False
    # Keys of its own beside those of every model: how each goes on after the architecture -> as config.json calls it.
    keys: Mapping[str, str] = field(default_factory=dict)
    # What config.json would say and llama.cpp has in its code instead, so that no file says it.
    constants: Mapping[str, Any] = field(default_factory=dict)
    # `query_pre_attn_scalar` of models of so many layers, where it is not `head_dim`; llama.cpp tells them so too.
    query_scalars: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One model type of Hugging Face: its names, its defaults, and what sets it apart in the decoder.

    Every family is a causal decoder with RMSNorm, a gated feed-forward part, and rotary embeddings; where
    layers differ, it is in the window of attention and in the angles. A configuration that asks for anything else
    is refused by name.
    """

    model_type: str  # config.json's
    architecture: str | None  # transformers' class, in which models are saved; None: the type is read, never written
    recipe_name: str  # `model.family` in a recipe; a type with experts shares the name of the dense one
    rope_theta: float = 1e4  # where a recipe gives none
    # What a key absent from config.json means: the class's own defaults. A `head_dim` absent here and there is
    # hidden_size / num_attention_heads, a `num_key_value_heads` num_attention_heads.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Written beside the architecture, always the same: a null `pad_token_id` where the class would else have one.
    constants: Mapping[str, Any] = field(default_factory=dict)
    weight_names: Mapping[str, str] = field(default_factory=dict)  # parts of a parameter's name: ours -> on disk
    # Matrices that are one on disk, and the decoder's parts of them in order, such as
    # {"gate_up_proj": ("gate_proj", "up_proj")}.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # The class that transformers' AutoTokenizer makes of any tokenizer beside such a config.json, whatever the folder
    # of the tokenizer says; None: it does as the folder says.
    forced_tokenizer: str | None = None
    # `sliding_window` counts only where this key is true; None: no key switches it off.
    window_switch: str | None = "use_sliding_window"
    # Which layers have the window: "all" of them, or those that `layer_types` names. Where that is absent: of a type
    # with a switch those from `max_window_layers` on, else all but `full_attention_every`. None: no layer may have one.
    windows: Literal["all", "layer_types"] | None = None
    full_attention_every: int | None = None  # with a window, each so manieth layer sees everything; None: no layer
    # `layer_types` alone says which layers have the window, and `rope_parameters` has those of each type of layer.
    by_layer_type: bool = False
    # With `by_layer_type`, the rotary base of the layers with a window, which are never scaled; None: `rope_theta`.
    rope_local_base_freq: float | None = None
    partial_rotary: bool = False  # `partial_rotary_factor` says what part of each head is turned, its first dimensions
    no_rope: bool = False  # `no_rope_layers` says in which layers queries and keys are not turned
    # Transformers' classes compute all of them by the same functions; a class of its own may have fewer.
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    qk_norm: bool = False  # queries and keys are normalized, head by head, before they are turned
    qk_norm_of_all_heads: bool = False  # by one norm over all of a token's queries, or keys, at once
    qkv_bias: bool = False  # the projections to queries, keys and values have a bias; the one out of attention has none
    # Where attention and feed-forward have their norms: "before" them, "after" (of what they add to the residual
    # stream), or on "both" sides.
    norms: Literal["before", "after", "both"] = "before"
    offset_norms: bool = False  # a norm multiplies by 1 + weight
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"  # of the gate
    activation_aliases: tuple[str, ...] = ()  # what its config.json may call it besides
    activation_key: str = "hidden_act"  # under which a config.json has its name
    scaled_embedding: bool = False  # times sqrt(hidden_size)
    # Which of `NUMBERS` (recipe/model.py) its config.json has; what one absent means is among the defaults.
    numbers: tuple[str, ...] = ()
    experts: Experts | None = None
    gguf: Gguf | None = None  # None: not read from GGUF
