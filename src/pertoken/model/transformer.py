"""A decoder on flat tokens: Qwen3, Llama or MiniMind, dense or with experts (Qwen3-MoE, Mixtral), by configuration.

Parameters carry Hugging Face's names, so that state dicts map one to one. Shape suffixes: N flat tokens, D hidden
size or head dimension, H query heads, K key-value heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pertoken.data.batch import MicroBatch
from pertoken.kernels.ops import Kernels
from pertoken.loss import LossImpl, LossOutput, TiedGradient, linear_cross_entropy
from pertoken.model.attention import (
    AttentionLayout,
    KVCache,
    attention,
    cached_attention,
    flash_capability,
    varlen_attention,
    which_attention,
)
from pertoken.model.mlp import MLP
from pertoken.model.moe import Documents, Load, MixtureOfExperts, with_balance_loss
from pertoken.model.native import Casts, NativeBatch, attention_block, embed, final_norm, mlp_block
from pertoken.model.operations import attention_operations, body_parameters, padding_metric
from pertoken.model_config import ResolvedModelConfig

__all__ = ["CausalLM"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H, D]
Rope = tuple[Tensor, Tensor]  # cos and sin, [N, 1, D / 2] each


class CausalLM(nn.Module):
    """The language model, loss included, so that what wraps it (DDP, FSDP) sees the head's use as well.

    Parameters are float32 (or float64, for checks) and initialised from `seed` alone: neither the global random state
    nor the device matters. Under `torch.autocast` the linear layers and attention run in the low precision, while the
    residual stream and the statistics of the norms stay as wide as the parameters. On the meta device nothing is
    initialised.
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.loss_impl: LossImpl = "auto"
        self.native = False  # see `use_kernels`
        self._casts: Casts | None = None
        with torch.device("meta"):  # the layers' own initialisation would draw from the global random state
            self.model = _Decoder(config)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Norms 1; matrices normal with standard deviation 0.02, those that write to the residual stream divided by
        sqrt(2 * layers) (GPT-2, section 2.3). The same for every device and dtype, up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding where tied."""
        weight: Tensor = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Those that one token's way leads through: of a layer's experts, as many as it chooses."""
        idle = 0
        if self.config.use_moe:
            expert = 3 * self.config.hidden_size * self.config.moe_intermediate_size
            idle = (self.config.num_experts - self.config.num_experts_per_tok) * expert * self.config.num_hidden_layers
        return self.num_parameters - idle

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, for what treats them one by one."""
        return list(self.model.layers)

    def use_kernels(self, dtype: torch.dtype) -> None:
        """Run on a CPU through the kernels: the same sums and gradients, several times faster.

        They are compiled if they are not in the cache. Raises CompilerError where they cannot be for activations of
        `dtype`. Other dtypes than bfloat16 and float32, and other devices, run as before.
        """
        Kernels(dtype)
        self.native = NativeBatch.supports(self.config)

    @contextmanager
    def keeping_casts(self) -> Iterator[None]:
        """Inside, weights are cast to low precision once and not in every forward pass: they must not change."""
        self._casts = {}
        try:
            yield
        finally:
            self._casts = None

    @staticmethod
    def wide_modules(layer: nn.Module) -> list[nn.Module]:
        """What of a block autocast leaves as wide as its parameters: the norms and the router."""
        routers = [m.gate for m in layer.modules() if isinstance(m, MixtureOfExperts)]
        return [*(m for m in layer.modules() if isinstance(m, nn.RMSNorm)), *routers]

    def compile_layers(self) -> None:
        """Let `torch.compile` fuse the token-wise part of every layer, once for any number of tokens.

        Attention stays as it is, and so do experts: their shapes differ from one micro-batch to the next.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=True)

    def forward(self, micro_batch: MicroBatch, *, impl: LossImpl | None = None) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number.

        Experts add their balance loss. An empty micro-batch gives zeros, and every parameter a zero gradient. `impl` is
        `linear_cross_entropy`'s, the model's `loss_impl` if not given.
        """
        documents, num_tokens = None, sum(micro_batch.lengths)
        if self.config.use_moe:
            lengths = (num_tokens,) if self.config.aux_loss == "micro_batch" else micro_batch.lengths
            documents = Documents.of(lengths, micro_batch.input_ids.device)
        # Nothing reads the other rows of a dense model's last block; the router of one with experts sees them all.
        asked = None if self.config.use_moe else (micro_batch.loss_mask != 0).nonzero().squeeze(1)
        if asked is not None and len(asked) == num_tokens:
            asked = None
        impl = impl or self.loss_impl
        tied = None
        if self._runs_natively(micro_batch):
            impl = "native" if impl == "auto" else impl
            tied = TiedGradient() if impl == "native" and self.lm_head is None else None
            batch = self._native_batch(micro_batch)
            padding = self._native_padding(micro_batch, batch)
            hidden, loads = self._run_natively(micro_batch.input_ids, batch, documents, asked, tied)
        else:
            impl = "chunked" if impl == "auto" else impl
            layout = self._layout(micro_batch)
            padding = self._padding(micro_batch, layout)
            hidden, loads = self._run_flat(micro_batch, layout, documents, asked)
        labels, loss_mask = micro_batch.labels, micro_batch.loss_mask
        if asked is not None:
            labels, loss_mask = labels[asked], loss_mask[asked]
        out = linear_cross_entropy(hidden, self.head_weight, labels, loss_mask, impl=impl, tied=tied)
        out = replace(out, metrics=out.metrics | {"padding": padding})
        return with_balance_loss(out, loads, self.config, num_tokens) if self.config.use_moe else out

    def _runs_natively(self, micro_batch: MicroBatch) -> bool:
        on_cpu = micro_batch.input_ids.device.type == "cpu"
        if not self.native or not on_cpu or not bool((micro_batch.loss_mask != 0).any()):
            return False
        weight = self.model.embed_tokens.weight
        return weight.dtype == torch.float32 and _compute_dtype(weight) in (torch.float32, torch.bfloat16)

    def _native_batch(self, micro_batch: MicroBatch) -> NativeBatch:
        kernels = Kernels(_compute_dtype(self.model.embed_tokens.weight))
        return NativeBatch.of(self.config, kernels, micro_batch.lengths, casts=self._casts)

    def _run_natively(
        self,
        input_ids: Tensor,
        batch: NativeBatch,
        documents: Documents | None,
        asked: Tensor | None,
        tied: TiedGradient | None,
    ) -> tuple[Tensor, list[Load]]:
        """Hidden states of the rows asked for after the final norm, in the dtype of activations."""
        last = batch if asked is None else batch.asking(asked)
        hidden = embed(self.model.embed_tokens.weight, input_ids, batch, tied)
        batches = [batch] * (self.config.num_hidden_layers - 1) + [last]
        hidden, loads = self._run_layers(hidden, None, batches, documents, None)
        return final_norm(hidden, self.model.norm, last), loads

    def padding(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """`padding_metric`: what padding adds to a forward and backward pass, and all operations."""
        if self._runs_natively(micro_batch):
            return self._native_padding(micro_batch, self._native_batch(micro_batch))
        return self._padding(micro_batch, self._layout(micro_batch))

    def _native_padding(self, micro_batch: MicroBatch, batch: NativeBatch) -> tuple[Tensor, Tensor]:
        rows = batch.padded(batch.num_rows) - batch.num_rows
        pairs = sum(t * t for t in micro_batch.lengths)
        return self._padding_of(micro_batch, rows, pairs, max(0, batch.plan.pairs - pairs))

    def _padding(self, micro_batch: MicroBatch, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        return self._padding_of(micro_batch, 0, layout.pairs, layout.padding_pairs)

    def _padding_of(self, micro_batch: MicroBatch, rows: int, pairs: int, padding_pairs: int) -> tuple[Tensor, Tensor]:
        c = self.config
        body = 6.0 * body_parameters(c)
        return padding_metric(
            useful=body * sum(micro_batch.lengths) + attention_operations(c, pairs),
            padding=body * rows + attention_operations(c, padding_pairs),
            head=c.vocab_size * c.hidden_size,
            loss_mask=micro_batch.loss_mask,
        )

    def hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D], after the final norm. Each sample sees itself alone."""
        return self._run_flat(micro_batch, self._layout(micro_batch), None, None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return F.linear(hidden, self.head_weight)

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for `decode`, for one sequence of at most `max_length` tokens."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            layers=self.config.num_hidden_layers,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            max_length=max_length,
            like=weight.new_empty((), dtype=_compute_dtype(weight)),
        )

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [V] after the last of `input_ids` [T], which continue what the cache holds and are added to it."""
        start, end = cache.length, cache.length + input_ids.shape[0]
        position_ids = torch.arange(start, end, device=input_ids.device)
        attends = [partial(cached_attention, cache=cache, layer=i) for i in range(self.config.num_hidden_layers)]
        hidden, _ = self._run(input_ids, position_ids, attends, None, None)
        cache.length = end
        return self.logits(hidden[-1])

    def _run_flat(
        self,
        micro_batch: MicroBatch,
        layout: AttentionLayout,
        documents: Documents | None,
        asked: Tensor | None,
    ) -> tuple[Tensor, list[Load]]:
        attend = attention if layout.cu_seqlens is None else varlen_attention
        attends = [partial(attend, layout=layout)] * self.config.num_hidden_layers
        return self._run(micro_batch.input_ids, micro_batch.position_ids, attends, documents, asked)

    def _layout(self, micro_batch: MicroBatch) -> AttentionLayout:
        device, dtype = micro_batch.input_ids.device, _compute_dtype(self.model.embed_tokens.weight)
        form = which_attention(device.type, dtype, self.config.head_dim, flash_capability(device))
        cu_seqlens = micro_batch.cu_seqlens if form == "varlen" else None
        return AttentionLayout.of(micro_batch.lengths, device, cu_seqlens=cu_seqlens)

    def _run(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attends: list[partial[Tensor]],
        documents: Documents | None,
        asked: Tensor | None,
    ) -> tuple[Tensor, list[Load]]:
        """Hidden states [N, D] (of the rows `asked`, if given) after the final norm, and what each layer's experts were
        given, if `documents` are."""
        hidden: Tensor = self.model.embed_tokens(input_ids)
        rope = _rope(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        hidden, loads = self._run_layers(hidden, rope, attends, documents, asked)
        return self.model.norm(hidden), loads

    def _run_layers(
        self,
        hidden: Tensor,
        rope: Rope | None,
        attends: Sequence[Attend | NativeBatch],
        documents: Documents | None,
        asked: Tensor | None,
    ) -> tuple[Tensor, list[Load]]:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        loads: list[Load] = []
        for i, (layer, attend) in enumerate(zip(self.model.layers, attends, strict=True), start=1):
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            out = run(hidden, rope, attend, documents, asked if i == len(self.model.layers) else None)
            if isinstance(out, Tensor):
                hidden = out
            else:
                hidden, load = out
                loads.append(load)
        return hidden, loads


class _Decoder(nn.Module):
    """Only holds what Hugging Face's names begin with `model.` for; `CausalLM` runs it."""

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class _Layer(nn.Module):
    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.use_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rope: Rope | None,
        attend: Attend | NativeBatch,
        documents: Documents | None,
        asked: Tensor | None,
    ) -> Tensor | tuple[Tensor, Load]:
        """The hidden states, of the rows `asked` if given; with `documents` the load of the experts, if any."""
        dtype = _compute_dtype(hidden)
        if isinstance(attend, NativeBatch):
            hidden = self._native_attention(hidden, attend)
            if isinstance(self.mlp, MLP):
                matrices = (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
                return mlp_block(hidden, self.post_attention_layernorm, matrices, attend)
        else:
            # Cast once here, not once in every linear layer that reads it.
            normed = self.input_layernorm(hidden).to(dtype)
            hidden = (hidden if asked is None else hidden[asked]) + self.self_attn(normed, rope, attend, asked)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MixtureOfExperts):
            update, load = self.mlp(normed, dtype, documents)
            hidden = hidden + update
            return hidden if load is None else (hidden, load)
        update = self.mlp(normed.to(dtype))
        out: Tensor = hidden + update
        return out

    def _native_attention(self, hidden: Tensor, batch: NativeBatch) -> Tensor:
        attn = self.self_attn
        matrices = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
        return attention_block(hidden, self.input_layernorm, matrices, (attn.q_norm, attn.k_norm), batch)


class _Attention(nn.Module):
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

    def forward(self, x: Tensor, rope: Rope, attend: Attend, asked: Tensor | None) -> Tensor:
        """Of the rows `asked`, if given; the others have keys and values, and queries of zeros that nobody reads."""
        k_NKD, v_NKD = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.k_proj, self.v_proj))
        k_NKD = self._turn(k_NKD, self.k_norm, rope)
        if asked is not None:
            x, rope = x[asked], (rope[0][asked], rope[1][asked])
        q_NHD = self._turn(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), self.q_norm, rope)
        if asked is not None:
            q_NHD = q_NHD.new_zeros(len(k_NKD), *q_NHD.shape[1:]).index_copy(0, asked, q_NHD)
        out_NHD = attend(q_NHD, k_NKD, v_NKD)
        if asked is not None:
            out_NHD = out_NHD[asked]
        out: Tensor = self.o_proj(out_NHD.flatten(1))
        return out

    def _turn(self, x_NHD: Tensor, norm: nn.RMSNorm | None, rope: Rope) -> Tensor:
        """Normalised and rotated in the width of `rope`, returned in the dtype it came in."""
        wide = x_NHD.to(rope[0].dtype)
        if norm is not None:
            wide = norm(wide)
        if torch.compiler.is_compiling():  # the compiler fuses the plain code, and trips over writes into views
            (a, b), (cos, sin) = wide.chunk(2, -1), rope
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_NHD.dtype)
        turned: Tensor = _Rotate.apply(wide, *rope)  # type: ignore[no-untyped-call]
        return turned.to(x_NHD.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer turns `x` into: the autocast dtype where one is active."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return x.dtype


def _rope(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
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
