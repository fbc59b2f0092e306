"""One optimizer step. Read this first.

    L = (1 / N) * sum over the step's tokens of loss_mask * nll  (+ further terms, each with a denominator of its own)

N, the step's supervised tokens over all ranks, is known before any forward pass (the store keeps the counts), and so is
every other denominator (`Share.denominators`). Every micro-batch on every rank therefore adds its part of one and the
same mean, and how the step is split cannot matter. `objective.terms` has the general formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pertoken.data.batch.share import Share, counts_of
from pertoken.engines.cuda_graphs import Graphs, Metrics
from pertoken.kernels.ops import Kernels
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import TorchModule
from pertoken.objective.terms import CROSS_ENTROPY, Objective
from pertoken.objective.wide import in_float64
from pertoken.training.faults import nearest_bad_gradient
from pertoken.training.norms import clip, total_norm
from pertoken.training.parallel import World, synchronized
from pertoken.training.precision import Precision
from pertoken.training.schedule import set_lr

__all__ = ["NonFiniteStep", "StepMetrics", "TrainState", "train_step"]


class NonFiniteStep(Exception):
    """A loss or gradient norm of this step is NaN or infinite. Gradients are cleared, weights untouched."""

    def __init__(self, what: str, *, micro_batch: tuple[int, int] | None = None, parameter: str | None = None) -> None:
        super().__init__(what)
        self.micro_batch = micro_batch  # (rank, index) of the first one at fault, where that is known
        self.parameter = parameter  # the one nearest to the loss whose gradient is non-finite, where the loss is finite


@dataclass(frozen=True)
class StepMetrics:
    """Of one step, over all its micro-batches and ranks."""

    loss_sum: float  # nats
    num_tokens: float  # supervised
    grad_norm: float  # before clipping, in the loss's own scale; non-finite where float16's scaled gradient overflowed
    skipped: bool  # the weights stayed as they were: for that overflow, or because `skips` said so
    loss_scale: float | None  # float16 only: the scale this step was computed with
    sums: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)  # the model's metrics: (sum, count)


@dataclass
class TrainState:
    """What an update changes."""

    # (MicroBatch, Execution, objective=) -> LossOutput; with several ranks what DDP or FSDP2 made of it
    model: TorchModule
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    world: World = field(default_factory=World)
    objective: Objective = CROSS_ENTROPY
    kernels: Kernels | None = None  # for the norm, where the run has them
    execution: Execution = PLAIN
    graphs: Graphs | None = None  # plays the passes of a GPU again, where they can be recorded
    changed: bool = False  # weights, optimizer or scaler, since the loop has last cleared it

    def backward(self, objective: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's share, times the loss scale, in float32 (float64) to `.grad`."""
        torch.autograd.backward(self.scaler.scale(objective))

    def clip_and_step(
        self,
        lr: float,
        max_norm: float,
        on_gradients: Callable[[], None] | None = None,
        skips: Callable[[float], bool] | None = None,
        check: Callable[[], None] | None = None,
    ) -> tuple[float, bool]:
        """Unscale, clip the true gradients to `max_norm` (0: do not), update, clear them: (norm before, skipped).

        `check` is called once the host has waited for the norm, a step's only wait for a GPU: what was on its way to
        the host before is there. `on_gradients` is called while the true gradients are in `.grad`. A non-finite norm
        raises NonFiniteStep, unless the loss scale caused it: then the update is skipped and the scale halves. A finite
        one is told to `skips`: where that is true the update is left out. What any of them raises comes before anything
        changes.
        """
        self.scaler.unscale_(self.optimizer)
        try:
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            grad_norm = total_norm(gradients, self.world, self.kernels)
            if check is not None:
                check()
            if on_gradients is not None:
                on_gradients()
            finite = math.isfinite(grad_norm)
            if not finite and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
                raise NonFiniteStep(f"the gradient norm is {grad_norm}", parameter=nearest_bad_gradient(self.model))
            updates = finite and not (skips is not None and skips(grad_norm))
        except BaseException:
            self.scaler.update(self.scaler.get_scale())  # the same scale; the step may be made again, and unscaled then
            raise
        self.changed = True
        if updates:
            if max_norm > 0:
                clip(gradients, max_norm, grad_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, not updates


def train_step(
    state: TrainState,
    share: Share,
    *,
    lr: float,
    max_norm: float,
    on_gradients: Callable[[], None] | None = None,
    skips: Callable[[float], bool] | None = None,
) -> StepMetrics:
    """Update the weights once from `share`, this rank's part of the step; every rank has equally many micro-batches.

    Gradients travel once, with the last micro-batch. `skips`, told a finite norm, may leave the update out; it must
    answer alike on all ranks.

    Raises NonFiniteStep, on all ranks and with weights untouched; whatever else escapes (out of memory, say) leaves
    them untouched too unless `state.changed`, and gradients cleared.
    """
    denominators = share.denominators
    assert denominators["supervised"] > 0, "a step without a supervised token has no mean"
    state.model.train()
    loss_scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    metrics: list[Metrics] = []
    terms: list[str] = []
    try:
        graphs = state.graphs if state.graphs is not None and state.graphs.begin() else None
        with state.execution.keeping_casts() as execution:
            for i, micro_batch in enumerate(share.micro_batches, start=1):
                if graphs is not None:
                    metrics.append(graphs.run(micro_batch, denominators))
                    terms = state.objective.names
                    continue
                with synchronized(state.model, now=i == len(share.micro_batches)):
                    with state.precision.autocast():
                        out = state.model(micro_batch.to(state.precision.device), execution, objective=state.objective)
                    # What wraps the model averages gradients over ranks; this makes it a sum.
                    state.backward(out.objective(denominators) * state.world.size)
                metrics.append(out.metrics)
                terms = list(out.terms)
        totals = _Totals(metrics, [counts_of(m) for m in share.micro_batches])
        grad_norm, skipped = state.clip_and_step(
            lr, max_norm, on_gradients, skips, lambda: totals.add_up(denominators, terms, state.world)
        )
    except BaseException:
        state.optimizer.zero_grad(set_to_none=True)
        raise
    sums = totals.sums
    return StepMetrics(float(sums["loss"][0]), sums["loss"][1], grad_norm, skipped, loss_scale, sums)


class _Totals:
    """Each metric's (sum, count) over micro-batches and ranks. They set out for the host at once, without a wait."""

    def __init__(self, metrics: Sequence[dict[str, tuple[Tensor, Tensor]]], counts: Sequence[dict[str, float]]) -> None:
        self.sums: dict[str, tuple[np.ndarray, float]] = {}  # once added up
        self._metrics, self._names = metrics, sorted(metrics[0])
        rows = torch.stack(
            [torch.cat([in_float64(x.detach().reshape(-1)) for n in self._names for x in m[n]]) for m in metrics]
        )
        self._counted = sorted(counts[0])
        self._counts = torch.tensor([[row[name] for name in self._counted] for row in counts], dtype=torch.float64)
        self._arrived: torch.cuda.Event | None = None
        if rows.device.type != "cuda":
            self._rows = rows.cpu()
            return
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def add_up(self, denominators: dict[str, float], terms: Iterable[str], world: World) -> None:
        """Fill `sums`, with one message between ranks. What was seen must be what `denominators` expect.

        Raises NonFiniteStep where one of `terms` is not finite.
        """
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]
            self._arrived.synchronize()
        total = world.sum(torch.cat((self._rows.sum(0), self._counts.sum(0)))).numpy()
        start = 0
        for name in self._names:
            shape = self._metrics[0][name][0].shape
            end = start + shape.numel()
            self.sums[name] = (total[start:end].reshape(shape), float(total[end]))
            start = end + 1
        seen = dict(zip(self._counted, total[start:].tolist(), strict=True)) | {"supervised": self.sums["loss"][1]}
        for name, expected in denominators.items():
            assert math.isclose(seen[name], expected, rel_tol=1e-6), f"{name}: {seen[name]} seen, {expected} expected"
        for name in terms:
            if not math.isfinite(value := float(self.sums[name][0])):
                where = _first_non_finite(name, self._metrics, world)
                raise NonFiniteStep(f"the {name} is {value}", micro_batch=where)


def _first_non_finite(
    name: str, metrics: Sequence[dict[str, tuple[Tensor, Tensor]]], world: World
) -> tuple[int, int] | None:
    mine = next((i for i, m in enumerate(metrics) if not m[name][0].isfinite()), None)
    return next(((rank, i) for rank, i in enumerate(world.gather(mine)) if i is not None), None)
