"""Hidden states to sums: the cross entropy of a linear head, whose logits never exist whole.

Only supervised rows are computed, a chunk of them at a time, and each chunk's part of the gradient is formed while its
logits are at hand, so the forward pass does all the matrix work and the backward pass only scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.errors import CompilerError
from pertoken.kernels.memory import empty
from pertoken.kernels.ops import Kernels
from pertoken.objective.fused_heads import fused_loss_sum
from pertoken.objective.inputs import check_head, checked_labels
from pertoken.objective.logit_map import PLAIN_LOGITS, LogitMap
from pertoken.objective.row_terms import (
    RowTerm,
    refuse_row_terms,
    require_proportional,
    row_factors,
    row_values,
)
from pertoken.objective.terms import LossOutput, Term
from pertoken.objective.wide import device_of_sums, in_float64

__all__ = ["LossImpl", "TiedGradient", "cross_entropy", "first_order_only", "linear_cross_entropy"]

LossImpl = Literal["auto", "cpu", "chunked", "reference", "liger", "cce"]

_CHUNK_BYTES = 32 * 2**20  # of logits in float32; by the kernels, in the dtype of activations
_VOCAB_BLOCK = 8192  # of the weight's gradient at a time, by the kernels
_MIN_CHUNK_ROWS = 512  # fewer add up the weight's gradient, [V, D], too often
# float16 flushes probabilities below 6e-8; boosted by this the gradient keeps them, and stays far from 65,504.
_FP16_BOOST = 2.0**8


@dataclass
class TiedGradient:
    """Brings the head's gradient of a tied embedding to where the embedding's own is added, in the same buffer.

    Two gradients of [V, D] and the pass to add them are saved. The embedding's backward always comes after the head's.
    """

    of_head: Tensor | None = None  # [V, D]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    impl: LossImpl = "auto",
    tied: TiedGradient | None = None,
    row_terms: Sequence[RowTerm] = (),
    logit_map: LogitMap = PLAIN_LOGITS,
    all_supervised: bool = False,
) -> LossOutput:
    """Sum of negative log-likelihoods in nats over the supervised tokens, and their number.

    Equivalent to

        nll = F.cross_entropy(logit_map(F.linear(hidden, weight).float()), labels, reduction="none")
        LossOutput((nll * loss_mask).sum(), loss_mask.sum())

    with `hidden` [N, D], `weight` [V, D], `labels` [N] integers, real token ids (one under a false mask is never looked
    at), `loss_mask` [N] bool or weights. Weights may be negative; one that is NaN or infinite makes the sum so. The
    matrix products run in the autocast dtype where one is active, in `hidden`'s otherwise; soft-max, sums and the
    accumulation of the weight's gradient in at least float32 (float64 for float64). No supervised token: sum 0, count
    0, zero gradients.

    `impl="reference"` is the plain code above, logits and all; `"chunked"` holds at most one chunk of them; `"cpu"`
    too, through kernels compiled for this processor (bfloat16 and float32 on a CPU; raises CompilerError where they
    cannot be compiled); `"auto"` is that where it can be. `"liger"` and `"cce"` are kernels of others, optional
    extras: see `fused_loss_sum` for what they do not promise. With `tied`, of cpu and chunked, the weight's gradient
    goes there, not to autograd. With `all_supervised`, of a caller who knows that no weight is 0, rows are not looked
    for, which on a GPU the host would wait for.

    Each of `row_terms` is a further term of the result, its sum weighted by `loss_mask` as the cross entropy is. Native
    and chunked form one gradient for all of them, so a backward pass must come through `LossOutput.objective`: one in
    which a term's gradient is not its coefficient times the cross entropy's raises RuntimeError (on CUDA a device
    assert). `"liger"` and `"cce"` have no such terms, and raise RecipeError.

    Raises, for every `impl` alike, IndexError for a supervised label outside of [0, V) (on CUDA a device assert),
    TypeError for a dtype that cannot be meant, ValueError for shapes or devices that do not fit together, for weights
    that require a gradient and for an `impl` that cannot run there.
    """
    if impl not in get_args(LossImpl):
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(get_args(LossImpl))}")
    check_head(hidden, weight)
    labels, loss_mask = checked_labels(
        labels, loss_mask, rows=hidden.shape[0], vocab_size=weight.shape[0], device=hidden.device
    )
    if impl == "liger" or impl == "cce":
        refuse_row_terms(impl, row_terms)
    if impl == "reference":
        return _plain(F.linear(hidden, weight), labels, loss_mask, row_terms, logit_map)
    hidden = logit_map.scale_hidden(hidden)
    num_tokens = _count(loss_mask)
    if not all_supervised:
        rows = loss_mask.nonzero().squeeze(1)
        if rows.numel() < loss_mask.numel():
            hidden, labels, loss_mask = hidden[rows], labels[rows], loss_mask[rows]
    if not torch.is_grad_enabled():  # which the function's `needs_input_grad` would not know
        hidden, weight = hidden.detach(), weight.detach()
    weights = None if loss_mask.dtype == torch.bool else loss_mask
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    if (impl == "liger" or impl == "cce") and len(labels):  # without rows ours still gives zero gradients
        sums = [fused_loss_sum(impl, hidden, weight, labels, weights, dtype, cap=logit_map.cap)]
    else:
        kernels = None if impl == "chunked" else _kernels(device, dtype, required=impl == "cpu")
        settings = (dtype, kernels, tied, tuple(row_terms), logit_map)
        sums = _ChunkedCrossEntropy.apply(hidden, weight, labels, weights, *settings)  # type: ignore[no-untyped-call]
    return _output(sums, num_tokens, row_terms)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    row_terms: Sequence[RowTerm] = (),
    logit_map: LogitMap = PLAIN_LOGITS,
) -> LossOutput:
    """`linear_cross_entropy` by its definition, of the head's product `logits` [N, V], which exists whole. Raises what
    that does."""
    rows, vocab_size = logits.shape
    labels, loss_mask = checked_labels(labels, loss_mask, rows=rows, vocab_size=vocab_size, device=logits.device)
    return _plain(logits, labels, loss_mask, row_terms, logit_map)


def _plain(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, row_terms: Sequence[RowTerm], logit_map: LogitMap
) -> LossOutput:
    logits = logit_map(logits.to(_accumulator(logits.dtype)))
    labels = torch.where(loss_mask != 0, labels, 0)
    nll = F.cross_entropy(logits, labels, reduction="none")
    values = [nll]
    if row_terms:
        log_z = logits.logsumexp(1)
        values += [row_values(term, nll, log_z) for term in row_terms]
    sums = [torch.where(loss_mask != 0, x * loss_mask.to(x.dtype), 0).sum() for x in values]
    return _output(sums, _count(loss_mask), row_terms)


def _count(loss_mask: Tensor) -> Tensor:
    return loss_mask.sum(dtype=torch.int64) if loss_mask.dtype == torch.bool else in_float64(loss_mask).sum()


def _output(sums: Sequence[Tensor], num_tokens: Tensor, row_terms: Sequence[RowTerm]) -> LossOutput:
    """Of the cross entropy's sum, and then one for each of `row_terms`."""
    names = ["loss", *(term.name for term in row_terms)]
    metrics = {name: (total.detach(), num_tokens) for name, total in zip(names, sums, strict=True)}
    more = {t.name: Term(total, "supervised", t.coefficient) for t, total in zip(row_terms, sums[1:], strict=True)}
    return LossOutput(sums[0], num_tokens, metrics, more)


def _kernels(device: str, dtype: torch.dtype, *, required: bool) -> Kernels | None:
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        if required:
            raise ValueError(f'impl="cpu": the kernels are for bfloat16 and float32 on a CPU, not {dtype} on {device}')
        return None
    try:
        return Kernels(dtype)
    except CompilerError:
        if required:
            raise
        return None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def first_order_only() -> None:
    """For backward passes written by hand, which are constants to autograd: with `create_graph=True` their part of the
    second derivative would be left out without a word. Raises RuntimeError there."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels and the chunked loss have no gradient of their gradient; for create_graph=True set "
            'train.engine="plain" and loss_impl="reference"'
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sums of the cross entropy and of each of `terms`. All rows count.

    `forward` forms the gradient of the cross entropy plus coefficient * each term's sum; `backward` multiplies by what
    comes in for the cross entropy (1 / N and the loss scale).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
        kernels: Kernels | None,
        tied: TiedGradient | None,
        terms: tuple[RowTerm, ...],
        logit_map: LogitMap,
    ) -> tuple[Tensor, ...]:
        ctx.tied, ctx.terms, ctx.logit_map = tied, terms, logit_map
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            if kernels is not None:
                return _cpu_forward(ctx, hidden, weight, labels, weights, kernels)
            return _forward(ctx, hidden, weight, labels, weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only()
        for term, grad in zip(ctx.terms, grad_outputs[1:], strict=True):
            require_proportional(grad, term.coefficient * grad_outputs[0])
        grad = grad_outputs[0] / ctx.boost
        d_hidden, d_weight = ctx.saved_tensors
        # Scaled in the wide type first: a float16 gradient overflows only where its true, scaled value does.
        if d_hidden is not None:
            d_hidden = (d_hidden.to(grad.dtype) * grad).to(ctx.hidden_dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(grad).to(ctx.weight_dtype)  # in place: as large as the vocabulary
        if ctx.tied is not None:
            ctx.tied.of_head, d_weight = d_weight, None
        return d_hidden, d_weight, *[None] * 7


def _add(totals: list[Tensor], values: Sequence[Tensor], scale_C: Tensor | None) -> None:
    """The sums of `values` [C] each, times `scale_C` where given, to float64 `totals`."""
    for total, values_C in zip(totals, values, strict=True):
        scaled_C = values_C if scale_C is None else values_C * scale_C
        total += scaled_C.to(total.device).sum(dtype=torch.float64)


def _forward(
    ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    wide = _accumulator(dtype)
    x_ND, w_VD = hidden.to(dtype), weight.to(dtype)
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    tamed = dtype == torch.float16 and bool(ctx.terms)
    d_hidden = torch.empty_like(x_ND, dtype=wide if tamed else dtype) if needs_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    boost = _FP16_BOOST if dtype == torch.float16 else 1.0
    sums_on = device_of_sums(hidden.device)
    totals = [torch.zeros((), dtype=torch.float64, device=sums_on) for _ in range(1 + len(ctx.terms))]
    chunk = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, x_ND.shape[0], chunk):
        x_CD, label_C = x_ND[start : start + chunk], labels[start : start + chunk]
        scale_C = None if weights is None else weights[start : start + chunk].to(wide)
        logits_CV = torch.mm(x_CD, w_VD.t()).to(wide)
        slope_CV = ctx.logit_map.cap_(logits_CV)
        log_z_C = logits_CV.logsumexp(1)
        nll_C = log_z_C - logits_CV.gather(1, label_C[:, None]).squeeze(1)
        values, factors = row_factors(ctx.terms, nll_C, log_z_C)
        _add(totals, [nll_C, *values], scale_C)
        if not (needs_hidden or needs_weight):
            continue
        d_logits_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
        if factors is not None:
            d_logits_CV.mul_(factors.on_softmax[:, None])
        at_label_C = d_logits_CV.new_ones(len(label_C)) if factors is None else factors.at_label
        d_logits_CV.scatter_add_(1, label_C[:, None], -at_label_C[:, None])
        if slope_CV is not None:
            d_logits_CV.mul_(slope_CV)
        if scale_C is not None:
            d_logits_CV.mul_(scale_C[:, None])
        if boost != 1.0:
            d_logits_CV.mul_(boost)
        if tamed and factors is not None:  # or what the terms multiply by would leave float16
            d_logits_CV.mul_(factors.tame)
            x_CD = x_CD.to(wide) / factors.tame
        d_low_CV = d_logits_CV.to(dtype)
        if d_hidden is not None:
            rows = d_hidden[start : start + chunk]
            if tamed and factors is not None:
                rows.copy_(torch.mm(d_low_CV, w_VD)).div_(factors.tame)
            else:
                torch.mm(d_low_CV, w_VD, out=rows)
        if d_weight is not None:
            if dtype == torch.float16:
                shrink = _fp16_shrink(x_CD, scale_C)
                d_weight += torch.mm(d_low_CV.t(), (x_CD * shrink).to(dtype)).to(wide) / shrink
            else:
                d_weight += torch.mm(d_low_CV.t(), x_CD)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.boost, ctx.hidden_dtype, ctx.weight_dtype = boost, hidden.dtype, weight.dtype
    return tuple(total.to(wide).to(hidden.device) for total in totals)


def _fp16_shrink(x_CD: Tensor, scale_C: Tensor | None) -> Tensor:
    """A power of two, 0-d, for which no sum over the rows of boosted gradients times `x_CD` leaves float16."""
    largest = len(x_CD) * _FP16_BOOST * in_float64(x_CD.abs().amax())
    if scale_C is not None:
        largest = largest * in_float64(scale_C.abs().amax())
    return torch.exp2(-(largest / 2**15).log2().ceil().clamp(min=0)).to(x_CD.dtype).to(x_CD.device)


def _chunk_rows(vocab_size: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Every chunk but the first adds to the weight's gradient, so its logits may be half as large as that."""
    chunk_bytes = max(_CHUNK_BYTES, 2 * vocab_size * hidden_size)
    return max(1, chunk_bytes // (vocab_size * dtype.itemsize))


def _cpu_forward(
    ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, kernels: Kernels
) -> tuple[Tensor, ...]:
    """What `_forward` does, through the kernels: logits become their own gradient in place, in two passes over them."""
    dtype = kernels.dtype
    num_rows, vocab_size = len(labels), weight.shape[0]
    x_ND, w_VD = hidden.detach().to(dtype), weight.detach().to(dtype)
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    d_hidden = torch.empty_like(x_ND) if needs_hidden else None
    d_weight = empty(*weight.shape, dtype=torch.float32) if needs_weight else None
    if d_weight is not None and not num_rows:
        d_weight.zero_()
    weights = None if weights is None else weights.float().contiguous()
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(1 + len(ctx.terms))]
    chunk = _chunk_rows(vocab_size, weight.shape[1], dtype)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        x_CD, scale_C = x_ND[rows], None if weights is None else weights[rows]
        logits_CV = torch.mm(x_CD, w_VD.t(), out=empty(len(x_CD), vocab_size, dtype=dtype))
        label_C, gradient = labels[rows].contiguous(), needs_hidden or needs_weight
        cap, uncapped_CV = ctx.logit_map.cap, None
        if cap is not None:
            uncapped_CV = logits_CV.clone() if gradient else None
            kernels.soft_cap(logits_CV, cap)
        _add(totals, _native_rows(kernels, logits_CV, label_C, scale_C, ctx.terms, gradient=gradient), scale_C)
        if uncapped_CV is not None:
            kernels.soft_cap_gradient(logits_CV, uncapped_CV, cap)
        if d_hidden is not None:
            torch.mm(logits_CV, w_VD, out=d_hidden[rows])
        if d_weight is not None:
            x_DC = x_CD.t().contiguous()
            for at in range(0, vocab_size, _VOCAB_BLOCK):
                block = slice(at, at + _VOCAB_BLOCK)
                kernels.widen_transposed(torch.mm(x_DC, logits_CV[:, block]), d_weight[block], add=start > 0)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.boost, ctx.hidden_dtype, ctx.weight_dtype = 1.0, hidden.dtype, weight.dtype
    return tuple(total.float() for total in totals)


def _native_rows(
    kernels: Kernels,
    logits_CV: Tensor,
    label_C: Tensor,
    scale_C: Tensor | None,
    terms: tuple[RowTerm, ...],
    *,
    gradient: bool,
) -> list[Tensor]:
    """The nll [C] and each term's values [C]. With `gradient`, `logits_CV` become their gradient, `scale_C` in it."""
    if not terms:
        return [kernels.cross_entropy(logits_CV, label_C, scale_C, gradient=gradient)]
    statistics_C2 = torch.empty(len(label_C), 2)
    nll_C = kernels.cross_entropy(logits_CV, label_C, scale_C, statistics_C2, gradient=False)
    values, factors = row_factors(terms, nll_C, statistics_C2.sum(1))
    if gradient and factors is not None:
        on_softmax_C, at_label_C = factors.on_softmax, factors.at_label
        if scale_C is not None:
            on_softmax_C, at_label_C = on_softmax_C * scale_C, at_label_C * scale_C
        kernels.cross_entropy_gradient(logits_CV, label_C, statistics_C2, on_softmax_C, at_label_C)
    return [nll_C, *values]
