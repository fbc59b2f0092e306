"""A forward pass through the decoder's plain modules, module by module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pertoken.data.batch.pack import MicroBatch
from pertoken.model.attention import (
    AttentionLayout,
    attention,
    flash_capability,
    varlen_attention,
    which_attention,
)
from pertoken.model.blocks import Attend, Layer, RunBlock, compute_dtype
from pertoken.model.moe import Documents, ExpertLoad
from pertoken.model.operations import padding_of
from pertoken.model.rope import rope_angles
from pertoken.objective.cross_entropy import LossImpl, TiedGradient
from pertoken.recipe.model import LayerKind

if TYPE_CHECKING:
    from pertoken.model.decoder import CausalLM

__all__ = ["PLAIN_ENGINE", "PlainPass", "attend_in", "run_blocks", "run_plain", "scaled"]


class _PlainEngine:
    """The modules as they are written: what every other engine is measured against."""

    name = "plain"

    def supports(self, model: object) -> None:
        return None

    def begin(self, model: CausalLM, micro_batch: MicroBatch, casts: object) -> PlainPass:
        return PlainPass(model, micro_batch)


PLAIN_ENGINE = _PlainEngine()


class PlainPass:
    """`ForwardPass` of plain modules. `block` computes a block as `Layer.plain` does, `attend` as `attention` does:
    torch.compile puts others in their place."""

    loss_impl: LossImpl = "chunked"
    tied: TiedGradient | None = None

    def __init__(
        self,
        model: CausalLM,
        micro_batch: MicroBatch,
        *,
        block: Callable[..., Tensor | tuple[Tensor, ExpertLoad]] = Layer.plain,
        attend: Callable[..., Tensor] | None = None,
    ) -> None:
        self._model, self._micro_batch, self._block = model, micro_batch, block
        self._layout = _layout(model, micro_batch)
        self._attend = (attend or attention) if self._layout.cu_seqlens is None else varlen_attention

    def padding(self) -> tuple[Tensor, Tensor]:
        layout = self._layout
        return padding_of(
            self._model.config, self._micro_batch, rows=0, pairs=layout.pairs, padding_pairs=layout.padding_pairs
        )

    def run(
        self, documents: Documents | None, output_rows: Tensor | None, *, recompute: bool
    ) -> tuple[Tensor, list[ExpertLoad]]:
        attend = partial(self._attend, layout=self._layout, **self._model.config.attention_settings)
        attends = [attend_in(attend, kind) for kind in self._model.config.layer_kinds]
        return run_plain(
            self._model,
            self._micro_batch.input_ids,
            self._micro_batch.position_ids,
            attends,
            documents=documents,
            output_rows=output_rows,
            recompute=recompute,
            block=self._block,
        )


def _layout(model: CausalLM, micro_batch: MicroBatch) -> AttentionLayout:
    device, dtype = micro_batch.input_ids.device, compute_dtype(model.model.embed_tokens.weight)
    softcap = model.config.attn_logit_softcapping
    form = which_attention(device.type, dtype, model.config.head_dim, flash_capability(device), softcap)
    cu_seqlens = micro_batch.cu_seqlens if form == "varlen" else None
    return AttentionLayout.of(micro_batch.lengths, device, cu_seqlens=cu_seqlens, longest=micro_batch.longest)


def run_plain(
    model: CausalLM,
    input_ids: Tensor,
    position_ids: Tensor,
    attends: Sequence[Attend],
    *,
    documents: Documents | None = None,
    output_rows: Tensor | None = None,
    recompute: bool = False,
    block: Callable[..., Tensor | tuple[Tensor, ExpertLoad]] = Layer.plain,
) -> tuple[Tensor, list[ExpertLoad]]:
    """`ForwardPass.run`, for attention of any kind: `attends` has one for every layer."""
    decoder = model.model
    hidden: Tensor = scaled(decoder.embed_tokens(input_ids), model.config.embedding_scale)
    kinds = model.config.layer_kinds
    ropes = {name: rope_angles(position_ids, model.config, hidden.dtype, name) for name in {k.rope for k in kinds}}
    rows = [None] * (len(attends) - 1) + [output_rows]
    blocks = [
        partial(block, rope=ropes[kind.rope], attend=attend, documents=documents, output_rows=of_layer)
        for kind, attend, of_layer in zip(kinds, attends, rows, strict=True)
    ]
    hidden, loads = run_blocks(decoder.layers, hidden, blocks, recompute=recompute)
    return decoder.norm(hidden), loads


def attend_in(attend: Callable[..., Tensor], kind: LayerKind) -> Callable[..., Tensor]:
    """`attend` as the layer's kind wants it."""
    return attend if kind.window is None else partial(attend, window=kind.window)


def scaled(embedded: Tensor, scale: float) -> Tensor:
    """`embedded` times `scale`, which is rounded to its dtype first."""
    return embedded if scale == 1.0 else embedded * float(torch.tensor(scale, dtype=embedded.dtype))


def run_blocks(
    layers: Sequence[torch.nn.Module] | torch.nn.ModuleList,
    hidden: Tensor,
    blocks: Sequence[RunBlock],
    *,
    recompute: bool,
) -> tuple[Tensor, list[ExpertLoad]]:
    """Call every layer with what computes it, one after another."""
    recompute = recompute and torch.is_grad_enabled()
    loads: list[ExpertLoad] = []
    for layer, block in zip(layers, blocks, strict=True):
        out = checkpoint(layer, hidden, block, use_reentrant=False) if recompute else layer(hidden, block)
        if isinstance(out, Tensor):
            hidden = out
        else:
            hidden, load = out
            loads.append(load)
    return hidden, loads
