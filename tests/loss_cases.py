"""Random hidden states, heads and masks, their loss by its definition, and errors under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pertoken import linear_cross_entropy


def problem(n: int, d: int, v: int, share: float, dtype: torch.dtype, *, weights: bool = False):
    generator = torch.Generator().manual_seed(n * 1000 + v)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    mask = torch.rand(n, generator=generator) < share
    if weights:
        return hidden, weight, labels, mask * torch.rand(n, generator=generator, dtype=torch.float64)
    return hidden, weight, labels, mask


def plain(hidden, weight, labels, mask):
    """The definition, with nothing of ours in it."""
    nll = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return (nll * mask).sum()


def autocast_errors(dtype: torch.dtype, impl: str, share: float = 0.4) -> list[float]:
    """Relative error of the sum and of both gradients under autocast, against float64."""
    hidden, weight, labels, mask = problem(513, 64, 777, share, torch.float32)
    with torch.no_grad():
        weight.mul_(0.1)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = plain(exact_hidden, exact_weight, labels, mask)
    exact_grads = torch.autograd.grad(exact, (exact_hidden, exact_weight))
    with torch.autocast("cpu", dtype):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    assert out.loss_sum.dtype == torch.float32
    grads = torch.autograd.grad(out.loss_sum, (hidden, weight))
    errors = [abs(float(out.loss_sum.detach()) - float(exact.detach())) / float(exact.detach())]
    return errors + [float((g - e).norm() / e.norm()) for g, e in zip(grads, exact_grads, strict=True)]
