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

from pertoken.data.batch.pack import MicroBatch
from pertoken.engines.cpu.runner import Casts, NativeBatch, embed, final_norm
from pertoken.engines.cpu.supported import is_plain_linear, unsupported
from pertoken.kernels.ops import Kernels
from pertoken.model.attention import (
    AttentionLayout,
    KVCache,
    attention,
    cached_attention,
    flash_capability,
    varlen_attention,
    which_attention,
)
from pertoken.model.blocks import Attend, Decoder, Rope, call, compute_dtype, rope_angles
from pertoken.model.moe import Documents, ExpertLoad, MixtureOfExperts
from pertoken.model.operations import attention_operations, body_parameters, padding_metric
from pertoken.objective.balance import balanced_lengths, with_balance_loss
from pertoken.objective.cross_entropy import LossImpl, TiedGradient, cross_entropy, linear_cross_entropy
from pertoken.objective.terms import CROSS_ENTROPY, LossOutput, Objective
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["CausalLM"]


class CausalLM(nn.Module):
    """The language model, loss included, so that what wraps it (DDP, FSDP) sees the head's use as well.

    Parameters are float32 (or float64, for checks) and initialized from `seed` alone: neither the global random state
    nor the device matters. Under `torch.autocast` the linear layers and attention run in the low precision, while the
    residual stream and the statistics of the norms stay as wide as the parameters. On the meta device nothing is
    initialized.
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
        self._attention: Callable[..., Tensor] = attention
        self._casts: Casts | None = None
        with torch.device("meta"):  # the layers' own initialization would draw from the global random state
            self.model = Decoder(config)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        self.to(dtype)
        if torch.device(device).type != "meta":
            # As `to_empty` does, which imports symbolic algebra to find out how a tensor on "meta" is laid out.
            empty = {n: torch.empty(p.shape, dtype=p.dtype, device=device) for n, p in self.named_parameters()}
            self.load_state_dict(empty, assign=True)
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
        `dtype`. Other dtypes than bfloat16 and float32, and other devices, run as before, and so does a forward pass
        that finds a module changed (`unsupported`).
        """
        Kernels(dtype)
        self.native = True

    @property
    def unsupported(self) -> str | None:
        """Why the modules run plain even where kernels may be used, in words: what a user has changed in them."""
        return unsupported(self, CausalLM)

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
        # Here and not as decorators, which would import the compiler, two seconds' work, with this module.
        disable: Callable[[Any], Any] = torch.compiler.disable
        self._attention = disable(attention)  # or every set of rectangles would be a graph of its own
        for layer in self.model.layers:
            layer.call_experts = disable(call)
            layer.compile(dynamic=True)

    def forward(
        self, micro_batch: MicroBatch, *, impl: LossImpl | None = None, objective: Objective = CROSS_ENTROPY
    ) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number.

        `objective` adds its terms, experts their balance loss. An empty micro-batch gives zeros, and every parameter a
        zero gradient. `impl` is `linear_cross_entropy`'s, the model's `loss_impl` if not given; a head that is more
        than its weight (an adapter, say) is called instead, and all its logits are computed.
        """
        documents, num_tokens = None, sum(micro_batch.lengths)
        if self.config.use_moe:
            lengths = balanced_lengths(self.config, micro_batch.lengths)
            documents = Documents.of(lengths, micro_batch.input_ids.device)
        # Nothing reads the other rows of a dense model's last block; the router of one with experts sees them all.
        output_rows = None if self.config.use_moe else (micro_batch.loss_mask != 0).nonzero().squeeze(1)
        if output_rows is not None and len(output_rows) == num_tokens:
            output_rows = None
        impl = impl or self.loss_impl
        tied = None
        if self._runs_natively(micro_batch):
            impl = "native" if impl == "auto" else impl
            tied = TiedGradient() if impl == "native" and self.lm_head is None else None
            batch = self._native_batch(micro_batch)
            padding = self._native_padding(micro_batch, batch)
            hidden, loads = self._run_natively(micro_batch.input_ids, batch, documents, output_rows, tied)
        else:
            impl = "chunked" if impl == "auto" else impl
            layout = self._layout(micro_batch)
            padding = self._padding(micro_batch, layout)
            hidden, loads = self._run_flat(micro_batch, layout, documents, output_rows)
        labels, loss_mask = micro_batch.labels, micro_batch.loss_mask
        if output_rows is not None:
            labels, loss_mask = labels[output_rows], loss_mask[output_rows]
        if self.lm_head is None or is_plain_linear(self.lm_head):
            out = linear_cross_entropy(
                *(hidden, self.head_weight, labels, loss_mask), impl=impl, tied=tied, row_terms=objective.row_terms
            )
        else:
            out = cross_entropy(self.lm_head(hidden), labels, loss_mask, row_terms=objective.row_terms)
        out = replace(out, metrics=out.metrics | {"padding": padding})
        return with_balance_loss(out, loads, self.config, num_tokens) if self.config.use_moe else out

    def _runs_natively(self, micro_batch: MicroBatch) -> bool:
        on_cpu = micro_batch.input_ids.device.type == "cpu"
        if not self.native or not on_cpu or not bool((micro_batch.loss_mask != 0).any()):
            return False
        if self.unsupported is not None:
            return False
        return compute_dtype(self.model.embed_tokens.weight) in (torch.float32, torch.bfloat16)

    def _native_batch(self, micro_batch: MicroBatch) -> NativeBatch:
        kernels = Kernels(compute_dtype(self.model.embed_tokens.weight))
        return NativeBatch.of(self.config, kernels, micro_batch.lengths, casts=self._casts)

    def _run_natively(
        self,
        input_ids: Tensor,
        batch: NativeBatch,
        documents: Documents | None,
        output_rows: Tensor | None,
        tied: TiedGradient | None,
    ) -> tuple[Tensor, list[ExpertLoad]]:
        """Hidden states of the rows asked for after the final norm, in the dtype of activations."""
        last = batch if output_rows is None else batch.with_output_rows(output_rows)
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
        logits: Tensor = F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)
        return logits

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for `decode`, for one sequence of at most `max_length` tokens."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            layers=self.config.num_hidden_layers,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            max_length=max_length,
            like=weight.new_empty((), dtype=compute_dtype(weight)),
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
        output_rows: Tensor | None,
    ) -> tuple[Tensor, list[ExpertLoad]]:
        attend = self._attention if layout.cu_seqlens is None else varlen_attention
        attends = [partial(attend, layout=layout)] * self.config.num_hidden_layers
        return self._run(micro_batch.input_ids, micro_batch.position_ids, attends, documents, output_rows)

    def _layout(self, micro_batch: MicroBatch) -> AttentionLayout:
        device, dtype = micro_batch.input_ids.device, compute_dtype(self.model.embed_tokens.weight)
        form = which_attention(device.type, dtype, self.config.head_dim, flash_capability(device))
        cu_seqlens = micro_batch.cu_seqlens if form == "varlen" else None
        return AttentionLayout.of(micro_batch.lengths, device, cu_seqlens=cu_seqlens)

    def _run(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attends: list[partial[Tensor]],
        documents: Documents | None,
        output_rows: Tensor | None,
    ) -> tuple[Tensor, list[ExpertLoad]]:
        """Hidden states [N, D] (of `output_rows`, if given) after the final norm, and with `documents` what every
        layer gave to its experts."""
        hidden: Tensor = self.model.embed_tokens(input_ids)
        rope = rope_angles(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        hidden, loads = self._run_layers(hidden, rope, attends, documents, output_rows)
        return self.model.norm(hidden), loads

    def _run_layers(
        self,
        hidden: Tensor,
        rope: Rope | None,
        attends: Sequence[Attend | NativeBatch],
        documents: Documents | None,
        output_rows: Tensor | None,
    ) -> tuple[Tensor, list[ExpertLoad]]:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        loads: list[ExpertLoad] = []
        for i, (layer, attend) in enumerate(zip(self.model.layers, attends, strict=True), start=1):
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            out = run(hidden, rope, attend, documents, output_rows if i == len(self.model.layers) else None)
            if isinstance(out, Tensor):
                hidden = out
            else:
                hidden, load = out
                loads.append(load)
        return hidden, loads
