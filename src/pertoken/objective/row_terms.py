"""Terms of the head beside the cross entropy: functions of a row's nll and of log Z.

A row of logits x has Z = sum over the vocabulary of exp(x_v) and nll = log Z - x_label. A function f of the two has the
gradient

    df/dx = f_nll * (softmax - one hot) + f_logZ * softmax

with its partial derivatives f_nll, f_logZ. So it needs no logits of its own: the cross entropy's gradient becomes

    a * softmax - b * one hot        a = 1 + sum of coefficient * (f_nll + f_logZ),  b = 1 + sum of coefficient * f_nll

which the head forms in the pass that it makes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowFunction", "RowTerm", "row_factors", "row_values"]

RowFunction = Callable[[Tensor, Tensor], Tensor]
"""(nll [C], log Z [C]) -> [C], differentiable, and each row's value a function of that row alone."""


@dataclass(frozen=True)
class RowTerm:
    """coefficient * (sum over supervised rows of weight * function) / supervised tokens, as part of the objective."""

    name: str  # of the term, and of its metric
    function: RowFunction
    coefficient: float


def row_values(term: RowTerm, nll_C: Tensor, log_z_C: Tensor) -> Tensor:
    """The function's values [C]. Raises ValueError where it does not give one a row."""
    values_C = term.function(nll_C, log_z_C)
    if values_C.shape != nll_C.shape:
        raise ValueError(f"{term.name}: gave {list(values_C.shape)} for {len(nll_C)} rows: must be {list(nll_C.shape)}")
    return values_C


def row_factors(terms: Sequence[RowTerm], nll_C: Tensor, log_z_C: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """(the detached values [C] of each term, a [C], b [C]), a and b the factors of the module's docstring."""
    with torch.enable_grad():
        nll_C, log_z_C = nll_C.detach().requires_grad_(), log_z_C.detach().requires_grad_()
        values = [row_values(term, nll_C, log_z_C) for term in terms]
        total = nll_C.sum()  # the cross entropy itself
        for term, values_C in zip(terms, values, strict=True):
            total = total + term.coefficient * values_C.sum()
    by_nll_C, by_log_z_C = torch.autograd.grad(total, (nll_C, log_z_C), materialize_grads=True)
    return [values_C.detach() for values_C in values], by_nll_C + by_log_z_C, by_nll_C
