"""A GPU's forward and backward passes, recorded once for each shape and played again.

A small model's step is a thousand kernels of some microseconds each, and the host needs longer to launch one than the
GPU to run it. A CUDA graph launches all of them at once. It has fixed shapes and addresses: micro-batches are padded to
few shapes (`data/batch/pad.py`), and gradients have buffers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.data.batch.pad import Shape, pad, shape_of
from pertoken.engines.torch_compile import not_compiled
from pertoken.model.attention import flash_capability, which_attention
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution
from pertoken.model.operations import attention_operations, body_parameters, padding_metric
from pertoken.model.protocol import TorchModule
from pertoken.objective.terms import LossOutput, Objective

__all__ = ["Graphs", "Metrics", "graphs_for", "why_no_graphs"]

Metrics = dict[str, tuple[Tensor, Tensor]]  # a micro-batch's, as `LossOutput.metrics`
# (micro-batch, denominators as 0-d tensors) -> metrics, gradients added to `.grad`
Passes = Callable[[MicroBatch, Mapping[str, Tensor]], Metrics]

_MOST_GRAPHS = 64  # each takes the host a second or so to record, and a megabyte or so of memory


def why_no_graphs(
    model: object, dtype: str, device: torch.device, execution: Execution, *, ranks: int = 1
) -> str | None:
    """Why the passes of `model`, computed in `dtype` on `device`, cannot be recorded, in words; None if they can."""
    if device.type != "cuda":
        return "CUDA graphs are for CUDA"
    if ranks > 1:
        return "CUDA graphs are for one process"
    if not isinstance(model, CausalLM):
        return "CUDA graphs are for pertoken's own decoder"
    if model.config.use_moe:
        return "the host decides which expert computes what"
    if dtype != "bfloat16":
        return 'train.dtype="bfloat16" alone has attention of one shape for documents of any length'
    head_dim, softcap = model.config.head_dim, model.config.attn_logit_softcapping
    form = which_attention(device.type, torch.bfloat16, head_dim, flash_capability(device), softcap)
    if form != "varlen":
        return "this GPU or PyTorch has no attention of one shape for documents of any length"
    if execution.activation_checkpointing or execution.loss_impl not in ("auto", "chunked"):
        return "activation checkpointing and the losses of others ask the host"
    return not_compiled(model)  # hooks and layers of a user's own may do anything


def graphs_for(
    model: TorchModule,
    objective: Objective,
    device: torch.device,
    execution: Execution,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Graphs:
    """For a model of which `why_no_graphs` says None. `autocast` is entered for each forward pass."""

    def passes(micro_batch: MicroBatch, denominators: Mapping[str, Tensor]) -> Metrics:
        with autocast():
            out: LossOutput = model(micro_batch, execution, objective=objective)
        out.objective(denominators).backward()  # type: ignore[no-untyped-call]
        return out.metrics

    return Graphs(model, passes, device)


@dataclass
class _Recorded:
    replay: Callable[[], None]
    micro_batch: MicroBatch  # what it reads, with `numbers`
    numbers: Tensor
    metrics: Metrics  # what it writes


class Graphs:
    """The passes of one model. The first micro-batch of a shape is computed as it is, the second one is recorded."""

    def __init__(self, model: TorchModule, passes: Passes, device: torch.device) -> None:
        self._model, self._passes, self._device = model, passes, device
        self._recorded: dict[Shape, _Recorded | None] = {}  # None: seen once
        self._pool: Any = None
        self._parameters: tuple[tuple[int, bool], ...] = ()
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self) -> bool:
        """Before a step's first micro-batch: gradients are zero, in the buffers that graphs add to.

        False, with nothing done, where the user has changed the model so that the host must hear of each pass.
        """
        if not_compiled(self._model) is not None:
            self.clear()
            return False
        found = tuple((p.data_ptr(), p.requires_grad) for p in self._model.parameters())
        if found != self._parameters:
            self.clear()
            self._parameters = found
            self._gradients = [(p, torch.zeros_like(p)) for p in self._model.parameters() if p.requires_grad]
        else:
            torch._foreach_zero_([gradient for _, gradient in self._gradients])
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return True

    def clear(self) -> None:
        """Forget all graphs and the memory that they hold."""
        self._recorded.clear()
        self._gradients, self._parameters, self._pool = [], (), None

    def run(self, micro_batch: MicroBatch, denominators: Mapping[str, float]) -> Metrics:
        """Forward and backward pass of a micro-batch on the host, with its part of the objective."""
        shape = shape_of(micro_batch)
        on_host, numbers = pad(micro_batch, shape), self._numbers(micro_batch, shape, denominators)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            sources, targets = [*_tensors(on_host), numbers], [*_tensors(recorded.micro_batch), recorded.numbers]
            for mine, theirs in zip(sources, targets, strict=True):
                theirs.copy_(self._pinned(mine), non_blocking=True)
            recorded.replay()
            return {name: (total.clone(), count.clone()) for name, (total, count) in recorded.metrics.items()}
        there, numbers = on_host.to(self._device), self._pinned(numbers).to(self._device, non_blocking=True)
        compute = partial(self._compute, there, numbers, tuple(denominators))
        if shape not in self._recorded or sum(r is not None for r in self._recorded.values()) >= _MOST_GRAPHS:
            self._recorded.setdefault(shape, None)
            return compute()
        replay, metrics = self._record(compute)
        self._recorded[shape] = _Recorded(replay, there, numbers, metrics)
        replay()
        return {name: (total.clone(), count.clone()) for name, (total, count) in metrics.items()}

    def _record(self, compute: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
        """(what computes again, where its metrics are then). Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others, that save a checkpoint say, go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            metrics = compute()
        self._pool = graph.pool()
        return graph.replay, metrics

    def _compute(self, micro_batch: MicroBatch, numbers: Tensor, names: tuple[str, ...]) -> Metrics:
        padding, operations, *denominators = numbers.unbind()
        metrics = self._passes(micro_batch, dict(zip(names, denominators, strict=True)))
        return metrics | {"padding": (padding, operations)}

    def _numbers(self, micro_batch: MicroBatch, shape: Shape, denominators: Mapping[str, float]) -> Tensor:
        """Operations on padding, all operations, and the denominators: float64, on the host."""
        model = self._model
        assert isinstance(model, CausalLM), "why_no_graphs says so"
        config, tokens = model.config, sum(micro_batch.lengths)
        pad_tokens, head = shape.tokens - tokens, config.vocab_size * config.hidden_size
        body = 6.0 * body_parameters(config)
        padding = body * pad_tokens + attention_operations(config, pad_tokens**2)
        padding += 6.0 * head * (shape.rows - len(micro_batch.supervised_rows()))
        useful = body * tokens + attention_operations(config, sum(n * n for n in micro_batch.lengths))
        of_padding = padding_metric(useful=useful, padding=padding, head=head, loss_mask=micro_batch.loss_mask)
        return torch.tensor([*map(float, of_padding), *denominators.values()], dtype=torch.float64)

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self._device.type == "cuda" else x


def _tensors(micro_batch: MicroBatch) -> list[Tensor]:
    values = (getattr(micro_batch, f.name) for f in fields(micro_batch))
    return [value for value in values if isinstance(value, Tensor)]
