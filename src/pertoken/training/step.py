"""One optimiser step. Read this first.

    L = (1 / N) * sum over the step's tokens of loss_mask * nll

N, the step's supervised tokens, is known before any forward pass (the store keeps the counts), so every micro-batch
adds its share of one and the same mean, and how the step is split cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pertoken.data.batch import MicroBatch
from pertoken.training.precision import Precision

__all__ = ["NonFiniteStep", "StepMetrics", "TrainState", "train_step"]


class NonFiniteStep(Exception):
    """A loss or gradient norm of this step is NaN or infinite. Gradients are cleared, weights untouched."""

    def __init__(self, what: str, micro_batch: int | None) -> None:
        super().__init__(what)
        self.micro_batch = micro_batch  # index of the first one at fault, where that is known


@dataclass(frozen=True)
class StepMetrics:
    """Of one step, over all its micro-batches."""

    loss_sum: float  # nats
    num_tokens: float  # supervised
    grad_norm: float  # before clipping, in the loss's own scale; infinite where `skipped`
    skipped: bool  # float16 only: the scaled gradient overflowed, the weights stayed as they were
    loss_scale: float | None  # float16 only: the scale this step was computed with


@dataclass
class TrainState:
    """What an update changes."""

    model: nn.Module  # MicroBatch -> LossOutput
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision

    def backward(self, objective: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's share, times the loss scale, in float32 (float64) to `.grad`."""
        torch.autograd.backward(self.scaler.scale(objective))

    def clip_and_step(
        self, lr: float, max_norm: float, on_gradients: Callable[[], None] | None = None
    ) -> tuple[float, bool]:
        """Unscale, clip the true gradients to `max_norm` (0: do not), update, clear them: (norm before, skipped).

        A non-finite norm raises NonFiniteStep before anything changes, unless the loss scale caused it: then the update
        is skipped and the scale halves. `on_gradients` is called while the true gradients are in `.grad`.
        """
        self.scaler.unscale_(self.optimizer)
        if on_gradients is not None:
            on_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        grad_norm = float(norm)
        finite = math.isfinite(grad_norm)
        if not finite and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise NonFiniteStep(f"the gradient norm is {grad_norm}", None)
        if finite:
            if max_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, not finite


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    *,
    num_tokens: float,
    num_routed: float,
    lr: float,
    max_norm: float,
    on_gradients: Callable[[], None] | None = None,
) -> StepMetrics:
    """Update the weights once from `micro_batches`, which hold `num_tokens` supervised tokens (or weights) in all.

    `num_routed` counts their input tokens, which is what a mixture's balance loss is divided by.

    Raises NonFiniteStep, weights untouched; whatever else escapes (out of memory, say) leaves them untouched too, and
    gradients cleared.
    """
    assert num_tokens > 0, "a step without a supervised token has no mean"
    state.model.train()
    loss_scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    sums: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    try:
        for micro_batch in micro_batches:
            with state.precision.autocast():
                out = state.model(micro_batch.to(state.precision.device))
            state.backward(out.objective(num_tokens, num_routed))
            sums.append(out.loss_sum.detach())
            counts.append(out.num_tokens)
        loss_sums = torch.stack(sums).double().cpu()  # the step's one wait for the device before the norm
        seen = float(torch.stack(counts).double().sum())
        assert math.isclose(seen, num_tokens, rel_tol=1e-6), f"{seen} supervised tokens seen, {num_tokens} expected"
        bad = (~loss_sums.isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            raise NonFiniteStep(f"the loss is {float(loss_sums[first])}", first)
        grad_norm, skipped = state.clip_and_step(lr, max_norm, on_gradients)
    except BaseException:
        state.optimizer.zero_grad(set_to_none=True)
        raise
    return StepMetrics(float(loss_sums.sum()), seen, grad_norm, skipped, loss_scale)
