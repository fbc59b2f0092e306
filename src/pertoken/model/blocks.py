"""The decoder's blocks as plain modules: what every way to run them is measured against.

Shape suffixes: N flat tokens, D hidden size or head dimension, H query heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.model.mlp import MLP
from pertoken.model.moe import Documents, ExpertLoad, MixtureOfExperts
from pertoken.model.norms import norm_of
from pertoken.model.rope import Rope, rotate
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["Attend", "Attention", "Decoder", "Layer", "RunBlock", "call", "compute_dtype"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H, D]
# (a block, its hidden states) -> the block's hidden states, and the load of its experts if that is wanted
RunBlock = Callable[["Layer", Tensor], "Tensor | tuple[Tensor, ExpertLoad]"]


def call(module: nn.Module, *arguments: Any) -> Any:
    """`module(*arguments)`, as a function that an engine can put another in place of."""
    return module(*arguments)


class Decoder(nn.Module):
    """Only holds what Hugging Face's names begin with `model.` for; a `ForwardPass` runs it."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        # Not `nn.Embedding(...)`, whose initialization imports torch's compiler where the device is "meta".
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = norm_of(config, config.hidden_size)


class Layer(nn.Module):
    """A block: attention and feed-forward, each with its norms and its residual sum."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.norms, self.residual_multiplier = config.norms, config.residual_multiplier
        size = config.hidden_size
        if self.norms != "after":
            self.input_layernorm = norm_of(config, size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm_of(config, size)
        if self.norms == "both":
            self.pre_feedforward_layernorm = norm_of(config, size)
        self.mlp: MixtureOfExperts | MLP = (
            MixtureOfExperts(config) if config.use_moe else MLP(size, config.intermediate_size, config.activation)
        )
        if self.norms != "before":
            self.post_feedforward_layernorm = norm_of(config, size)

    @property
    def attention_norms(self) -> tuple[nn.RMSNorm | None, nn.RMSNorm | None]:
        """Of what attention reads, and of what it adds to the residual stream; None for none."""
        before = None if self.norms == "after" else self.input_layernorm
        return before, None if self.norms == "before" else self.post_attention_layernorm

    @property
    def feed_forward_norms(self) -> tuple[nn.RMSNorm | None, nn.RMSNorm | None]:
        """As `attention_norms`, of the feed-forward part."""
        match self.norms:
            case "before":
                return self.post_attention_layernorm, None
            case "after":
                return None, self.post_feedforward_layernorm
            case _:
                return self.pre_feedforward_layernorm, self.post_feedforward_layernorm

    def forward(self, hidden: Tensor, run: RunBlock) -> Tensor | tuple[Tensor, ExpertLoad]:
        """`run(self, hidden)`: the pass brings what computes a block, `plain` or an engine's own code.

        It is called all the same, since hooks on a block (FSDP2 gathers its weights by one) belong around either.
        """
        return run(self, hidden)

    def plain(
        self,
        hidden: Tensor,
        rope: Rope,
        attend: Attend,
        documents: Documents | None,
        output_rows: Tensor | None,
        call_experts: Callable[..., Any] = call,
    ) -> Tensor | tuple[Tensor, ExpertLoad]:
        """The hidden states, of the rows `output_rows` if given; with `documents` the load of the experts, if any."""
        dtype = compute_dtype(hidden)
        before, after = self.attention_norms
        # Cast once here, not once in every linear layer that reads it.
        normed = (hidden if before is None else before(hidden)).to(dtype)
        residual = hidden if output_rows is None else hidden[output_rows]
        hidden = self._sum(residual, self.self_attn(normed, rope, attend, output_rows), after)
        return self.feed_forward(hidden, documents, dtype, call_experts)

    def feed_forward(
        self,
        hidden: Tensor,
        documents: Documents | None,
        dtype: torch.dtype,
        call_experts: Callable[..., Any] = call,
    ) -> Tensor | tuple[Tensor, ExpertLoad]:
        """The second half of `plain`: MLP or experts with their norms and residual sum, products in `dtype`."""
        before, after = self.feed_forward_norms
        normed = hidden if before is None else before(hidden)
        if isinstance(self.mlp, MixtureOfExperts):
            update, load = call_experts(self.mlp, normed, dtype, documents)
            hidden = self._sum(hidden, update, after)
            return hidden if load is None else (hidden, load)
        return self._sum(hidden, self.mlp(normed.to(dtype)), after)

    def _sum(self, residual: Tensor, update: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """residual + residual_multiplier * norm(update), as wide as the residual stream."""
        if norm is not None:
            update = norm(update.to(residual.dtype))
        if self.residual_multiplier != 1.0:
            # Not `torch.add(..., alpha=...)`, whose alpha the compiler loses where it is a module's number.
            update = update.to(residual.dtype) * self.residual_multiplier
        return residual + update


class Attention(nn.Module):
    """Causal self-attention with grouped queries, whose products `attend` computes."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.norms_all_heads = config.qk_norm_of_all_heads
        query_norm, key_norm = config.qk_norm_sizes
        self.q_norm = norm_of(config, query_norm) if config.qk_norm else None
        self.k_norm = norm_of(config, key_norm) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rope, attend: Attend, output_rows: Tensor | None) -> Tensor:
        """Of `output_rows`, if given; the others have keys and values, and queries of zeros that nobody reads."""
        k_NKD, v_NKD = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.k_proj, self.v_proj))
        k_NKD = self._turn(k_NKD, self.k_norm, rope)
        if output_rows is not None:
            x, rope = x[output_rows], (rope[0][output_rows], rope[1][output_rows])
        q_NHD = self._turn(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), self.q_norm, rope)
        if output_rows is not None:
            q_NHD = q_NHD.new_zeros(len(k_NKD), *q_NHD.shape[1:]).index_copy(0, output_rows, q_NHD)
        out_NHD = attend(q_NHD, k_NKD, v_NKD)
        if output_rows is not None:
            out_NHD = out_NHD[output_rows]
        out: Tensor = self.o_proj(out_NHD.flatten(1))
        return out

    def _turn(self, x_NHD: Tensor, norm: nn.RMSNorm | None, rope: Rope) -> Tensor:
        """Normalized and rotated in the width of `rope`, returned in the dtype it came in."""
        wide = x_NHD.to(rope[0].dtype)
        if norm is not None:
            wide = norm(wide.flatten(1)).view_as(wide) if self.norms_all_heads else norm(wide)
        return rotate(wide, rope).to(x_NHD.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer turns `x` into: the autocast dtype where one is active."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return x.dtype
