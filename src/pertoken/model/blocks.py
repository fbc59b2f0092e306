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
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["Attend", "Attention", "Decoder", "Layer", "Rope", "RunBlock", "call", "compute_dtype", "rope_angles"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H, D]
Rope = tuple[Tensor, Tensor]  # cos and sin, [N, 1, D / 2] each
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
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Layer(nn.Module):
    """A block: attention and feed-forward, each with its norm and its residual sum."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.use_moe else MLP(config.hidden_size, config.intermediate_size)

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
        # Cast once here, not once in every linear layer that reads it.
        normed = self.input_layernorm(hidden).to(dtype)
        hidden = (hidden if output_rows is None else hidden[output_rows]) + self.self_attn(
            normed, rope, attend, output_rows
        )
        return self.feed_forward(hidden, documents, dtype, call_experts)

    def feed_forward(
        self,
        hidden: Tensor,
        documents: Documents | None,
        dtype: torch.dtype,
        call_experts: Callable[..., Any] = call,
    ) -> Tensor | tuple[Tensor, ExpertLoad]:
        """The second half of `plain`: MLP or experts with their norm and residual sum, products in `dtype`."""
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MixtureOfExperts):
            update, load = call_experts(self.mlp, normed, dtype, documents)
            hidden = hidden + update
            return hidden if load is None else (hidden, load)
        update = self.mlp(normed.to(dtype))
        out: Tensor = hidden + update
        return out


class Attention(nn.Module):
    """Causal self-attention with grouped queries, whose products `attend` computes."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        has_norm = config.family == "qwen3"
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if has_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if has_norm else None

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
            wide = norm(wide)
        if torch.compiler.is_compiling():  # the compiler fuses the plain code, and trips over writes into views
            (a, b), (cos, sin) = wide.chunk(2, -1), rope
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_NHD.dtype)
        turned: Tensor = _Rotate.apply(wide, *rope)  # type: ignore[no-untyped-call]
        return turned.to(x_NHD.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer turns `x` into: the autocast dtype where one is active."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return x.dtype


def rope_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Cosine and sine of the rotary angles (Su et al., "RoFormer", 3.2): [N, 1, head_dim / 2], at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=position_ids.device) / head_dim
    angles = (position_ids.to(dtype)[:, None] * (1.0 / theta**exponents))[:, None, :]
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Rotary embedding in Hugging Face's convention: dimension i turns with dimension i + D/2.

    Plain code would be `torch.cat((a * cos - b * sin, b * cos + a * sin), -1)` for halves a and b. Turning back by the
    same angle is its gradient, so both directions are four passes over half the data and keep nothing but the angles:
    about half the time of the plain code on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out
