"""Terms of the head beside the cross entropy: functions of a row's nll and of log Z.

A row of logits x has Z = sum over the vocabulary of exp(x_v) and nll = log Z - x_label. A function f of the two has the
gradient

    df/dx = f_nll * (softmax - one hot) + f_logZ * softmax

with its partial derivatives f_nll, f_logZ. So it needs no logits of its own: the cross entropy's gradient becomes

    on_softmax * softmax - at_label * one hot
    at_label = 1 + sum of coefficient * f_nll        on_softmax = at_label + sum of coefficient * f_logZ

which the head forms in the pass that it makes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.errors import RecipeError

__all__ = [
    "RowFactors",
    "RowFunction",
    "RowTerm",
    "refuse_row_terms",
    "require_proportional",
    "row_factors",
    "row_values",
]

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


@dataclass(frozen=True)
class RowFactors:
    """What the gradient of a row's logits is made of: on_softmax * softmax - at_label * one hot."""

    on_softmax: Tensor  # [C]
    at_label: Tensor  # [C]

    @property
    def tame(self) -> Tensor:
        """Powers of two [C, 1], at most 1: times these, no entry of a row's gradient leaves [-1, 1]."""
        on, at = self.on_softmax, self.at_label
        largest_C = torch.stack((on, at, on - at)).abs().amax(0)
        return torch.exp2(-largest_C.clamp(min=1).log2().ceil())[:, None]


def row_factors(terms: Sequence[RowTerm], nll_C: Tensor, log_z_C: Tensor) -> tuple[list[Tensor], RowFactors | None]:
    """Each term's values [C], detached, and the factors of the cross entropy with all terms; None without a term."""
    if not terms:
        return [], None
    with torch.enable_grad():
        nll_C, log_z_C = nll_C.detach().requires_grad_(), log_z_C.detach().requires_grad_()
        values = [row_values(term, nll_C, log_z_C) for term in terms]
        total = nll_C.sum()  # the cross entropy itself
        for term, values_C in zip(terms, values, strict=True):
            total = total + term.coefficient * values_C.sum()
    by_nll_C, by_log_z_C = torch.autograd.grad(total, (nll_C, log_z_C), materialize_grads=True)
    return [values_C.detach() for values_C in values], RowFactors(by_nll_C + by_log_z_C, by_nll_C.contiguous())


def refuse_row_terms(impl: str, terms: Sequence[RowTerm]) -> None:
    """RecipeError if there are any: `impl`, a kernel of others, computes the cross entropy alone."""
    for term in terms:
        raise RecipeError(
            f'train.{term.name}_coef={term.coefficient:g}: train.loss_impl="{impl}" computes the cross entropy alone; '
            'set train.loss_impl="auto"'
        )


def require_proportional(grad: Tensor, expected: Tensor) -> None:
    """For heads that form one gradient of all terms: `grad` [], of a term's sum, must be `expected`, namely its
    coefficient times that of the cross entropy. Raises RuntimeError where it is not (on CUDA a device assert)."""
    same = torch.isclose(grad, expected, rtol=1e-5, atol=0.0, equal_nan=True)
    if same.is_cuda:
        torch._assert_async(same)
    elif not same:
        raise RuntimeError(
            f"a term of the head has the gradient {float(grad):g} where its coefficient makes it {float(expected):g}; "
            'go backward through LossOutput.objective, or set loss_impl="reference"'
        )
