"""Hidden states to sums: the cross entropy of a linear head, whose logits never exist whole.

Only supervised rows are computed, a chunk of them at a time, and each chunk's share of the gradient is formed while its
logits are at hand, so the forward pass does all the matrix work and the backward pass only scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.fused_heads import fused_loss_sum

__all__ = ["LossImpl", "LossOutput", "linear_cross_entropy"]

LossImpl = Literal["auto", "chunked", "reference", "liger", "cce"]

_CHUNK_BYTES = 32 * 2**20  # of logits in float32
_MIN_CHUNK_ROWS = 512  # fewer add up the weight's gradient, [V, D], too often
# float16 flushes probabilities below 6e-8; boosted by this the gradient keeps them, and stays far from 65,504.
_FP16_BOOST = 2.0**8


@dataclass(frozen=True)
class LossOutput:
    """Sums over the tokens of one micro-batch. Nothing is divided before the step's own count is known."""

    loss_sum: Tensor  # 0-d, nats, float32 or float64; carries the gradient
    num_tokens: Tensor  # 0-d: int64 supervised tokens, or the sum of float weights
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum, count), detached
    # Mixture of experts: 0-d, `aux_loss_coef` times the balance loss summed over routed tokens; carries the gradient.
    aux_sum: Tensor | None = None

    def objective(self, num_tokens: float, num_routed: float) -> Tensor:
        """This micro-batch's share of the step's objective, loss_sum / num_tokens + aux_sum / num_routed.

        `num_tokens` supervised and `num_routed` input tokens are the whole step's, over all micro-batches and ranks.
        """
        objective = self.loss_sum / num_tokens
        return objective if self.aux_sum is None else objective + self.aux_sum / num_routed


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    impl: LossImpl = "auto",
) -> LossOutput:
    """Sum of negative log-likelihoods in nats over the supervised tokens, and their number.

    Equivalent to

        nll = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
        LossOutput((nll * loss_mask).sum(), loss_mask.sum())

    with `hidden` [N, D], `weight` [V, D], `labels` [N] int64 with real token ids everywhere (one under a false mask is
    never looked at), `loss_mask` [N] bool or float weights. The matrix products run in the autocast dtype where one is
    active, in `hidden`'s otherwise; soft-max, sums and the accumulation of the weight's gradient in at least float32
    (float64 for float64). No supervised token: sum 0, count 0, zero gradients.

    `impl="reference"` is the plain code above, logits and all; `"auto"` and `"chunked"` hold at most one chunk of them.
    `"liger"` and `"cce"` are kernels of others, optional extras: see `fused_loss_sum` for what they do not promise.
    A label outside [0, V) at a supervised position is an error (IndexError or RuntimeError; a device assert on CUDA).
    """
    if loss_mask.dtype == torch.bool:
        num_tokens = loss_mask.sum()
    else:
        num_tokens = loss_mask.sum(dtype=torch.promote_types(loss_mask.dtype, torch.float32))
    if impl == "reference":
        loss_sum = _reference(hidden, weight, labels, loss_mask)
    else:
        rows = loss_mask.nonzero().squeeze(1)
        if rows.numel() < loss_mask.numel():
            hidden, labels, loss_mask = hidden[rows], labels[rows], loss_mask[rows]
        weights = None if loss_mask.dtype == torch.bool else loss_mask
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if (impl == "liger" or impl == "cce") and len(labels):  # without rows ours still gives zero gradients
            loss_sum = fused_loss_sum(impl, hidden, weight, labels, weights, dtype)
        else:
            loss_sum = _ChunkedCrossEntropy.apply(hidden, weight, labels, weights, dtype)  # type: ignore[no-untyped-call]
    return LossOutput(loss_sum, num_tokens, {"loss": (loss_sum.detach(), num_tokens)})


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(_accumulator(logits.dtype))
    labels = torch.where(loss_mask != 0, labels, 0)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(loss_mask != 0, nll * loss_mask, 0).sum()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """All rows count. `forward` forms the gradients, `backward` multiplies by what comes in (the loss scale too)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            return _forward(ctx, hidden, weight, labels, weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad = grad_outputs[0] / ctx.boost
        d_hidden, d_weight = ctx.saved_tensors
        # Scaled in the wide type first: a float16 gradient overflows only where its true, scaled value does.
        return (
            None if d_hidden is None else (d_hidden.to(grad.dtype) * grad).to(ctx.hidden_dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _forward(
    ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    wide = _accumulator(dtype)
    x_ND, w_VD = hidden.to(dtype), weight.to(dtype)
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    d_hidden = torch.empty_like(x_ND) if needs_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    boost = _FP16_BOOST if dtype == torch.float16 else 1.0
    loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
    chunk = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, x_ND.shape[0], chunk):
        x_CD, label_C = x_ND[start : start + chunk], labels[start : start + chunk]
        scale_C = None if weights is None else weights[start : start + chunk].to(wide)
        logits_CV = torch.mm(x_CD, w_VD.t()).to(wide)
        log_z_C = logits_CV.logsumexp(1)
        nll_C = log_z_C - logits_CV.gather(1, label_C[:, None]).squeeze(1)
        loss_sum += nll_C.sum() if scale_C is None else (nll_C * scale_C).sum()
        if not (needs_hidden or needs_weight):
            continue
        d_logits_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
        d_logits_CV.scatter_add_(1, label_C[:, None], d_logits_CV.new_full((len(label_C), 1), -1.0))
        if scale_C is not None:
            d_logits_CV.mul_(scale_C[:, None])
        if boost != 1.0:
            d_logits_CV.mul_(boost)
        d_low_CV = d_logits_CV.to(dtype)
        if d_hidden is not None:
            torch.mm(d_low_CV, w_VD, out=d_hidden[start : start + chunk])
        if d_weight is not None:
            d_weight += torch.mm(d_low_CV.t(), x_CD)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.boost, ctx.hidden_dtype, ctx.weight_dtype = boost, hidden.dtype, weight.dtype
    return loss_sum
