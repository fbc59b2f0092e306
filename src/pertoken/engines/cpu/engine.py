"""The engine "cpu": the decoder's blocks through kernels that are compiled for this processor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch
from pertoken.engines.cpu.blocks import attention_block
from pertoken.engines.cpu.mlp import mlp_block
from pertoken.engines.cpu.runner import CpuBatch, embed, final_norm
from pertoken.engines.cpu.supported import unsupported
from pertoken.kernels.ops import Kernels
from pertoken.model.blocks import Layer, compute_dtype
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Casts, ForwardPass
from pertoken.model.mlp import MLP
from pertoken.model.moe import Documents, ExpertLoad
from pertoken.model.operations import padding_of
from pertoken.model.plain import PlainPass, run_blocks, scaled
from pertoken.objective.cross_entropy import LossImpl, TiedGradient

__all__ = ["CpuEngine"]

_DTYPES = (torch.float32, torch.bfloat16)


class CpuEngine:
    """The same sums and gradients as the plain modules', several times faster, in float32 and bfloat16 on a CPU.

    What it cannot run goes through the plain modules: other dtypes and devices, a micro-batch without supervised
    tokens, and a model in which a user has changed a module (`supports`).
    """

    name = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        """The kernels are compiled, if they are not in the cache. Raises CompilerError where they cannot be."""
        Kernels(dtype)

    def supports(self, model: object) -> str | None:
        return unsupported(model)

    def begin(self, model: CausalLM, micro_batch: MicroBatch, casts: Casts | None) -> ForwardPass:
        on_cpu = micro_batch.input_ids.device.type == "cpu"
        if not on_cpu or not bool((micro_batch.loss_mask != 0).any()) or self.supports(model) is not None:
            return PlainPass(model, micro_batch)
        dtype = compute_dtype(model.model.embed_tokens.weight)
        return _CpuPass(model, micro_batch, dtype, casts) if dtype in _DTYPES else PlainPass(model, micro_batch)


class _CpuPass:
    """`ForwardPass` through the kernels."""

    loss_impl: LossImpl = "cpu"

    def __init__(self, model: CausalLM, micro_batch: MicroBatch, dtype: torch.dtype, casts: Casts | None) -> None:
        self._model, self._micro_batch = model, micro_batch
        self._batch = CpuBatch.of(model.config, Kernels(dtype), micro_batch.lengths, casts=casts)
        self.tied: TiedGradient | None = TiedGradient()

    def padding(self) -> tuple[Tensor, Tensor]:
        batch = self._batch
        rows = batch.padded(batch.num_rows) - batch.num_rows
        pairs = sum(t * t for t in batch.lengths)
        more = max(0, batch.plan.pairs - pairs)
        return padding_of(self._model.config, self._micro_batch, rows=rows, pairs=pairs, padding_pairs=more)

    def run(
        self, documents: Documents | None, output_rows: Tensor | None, *, recompute: bool
    ) -> tuple[Tensor, list[ExpertLoad]]:
        decoder, batch = self._model.model, self._batch
        kinds = self._model.config.layer_kinds
        of_kind = {kind: batch.in_layers_of(kind, self._model.config) for kind in dict.fromkeys(kinds)}
        batches = [of_kind[kind] for kind in kinds]
        if output_rows is not None:
            batches[-1] = batches[-1].with_output_rows(output_rows)
        hidden = embed(decoder.embed_tokens.weight, self._micro_batch.input_ids, batch, self.tied)
        hidden = scaled(hidden, self._model.config.embedding_scale)
        blocks = [partial(_run_block, batch=of_layer, documents=documents) for of_layer in batches]
        hidden, loads = run_blocks(decoder.layers, hidden, blocks, recompute=recompute)
        return final_norm(hidden, decoder.norm, batches[-1]), loads


def _run_block(
    layer: Layer, hidden: Tensor, *, batch: CpuBatch, documents: Documents | None
) -> Tensor | tuple[Tensor, ExpertLoad]:
    """`Layer.plain`, from its weights; experts run plain."""
    dtype, attn = compute_dtype(hidden), layer.self_attn
    matrices = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    hidden = attention_block(hidden, layer.attention_norms, matrices, (attn.q_norm, attn.k_norm), batch)
    mlp = layer.mlp
    if not isinstance(mlp, MLP):
        return layer.feed_forward(hidden, documents, dtype)
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return mlp_block(hidden, layer.feed_forward_norms, projections, batch, gelu=mlp.activation == "gelu_pytorch_tanh")
