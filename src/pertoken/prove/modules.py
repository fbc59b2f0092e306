"""What a user may put into a model: with kernels allowed, its gradient is still that of its modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.engine import CpuEngine
from pertoken.errors import CompilerError
from pertoken.model.execution import PLAIN, Execution
from pertoken.prove.case import Case, gradient_of_step
from pertoken.prove.report import Comparison, Gradient, Result, compare, largest_error
from pertoken.training.precision import Precision

__all__ = ["changed_modules"]

_FACTOR = 4.0  # times the error of the changed modules themselves, run plain in float32


class _Adapter(nn.Module):
    """Around a linear layer, whose weight it shows as its own, as adapters do; adds a product with another matrix."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.added = nn.Parameter(base.weight.detach().roll(1, 0))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + nn.functional.linear(x, self.added)
        return out


def _replace(attention: nn.Module) -> None:
    attention.q_proj = _Adapter(attention.q_proj)  # type: ignore[arg-type]


def _add_bias(attention: nn.Module) -> None:
    where = next(p for p in (attention.q_proj, attention.o_proj) if p.bias is None)  # type: ignore[union-attr]
    weight: Tensor = where.weight  # type: ignore[union-attr, assignment]
    where.bias = nn.Parameter(torch.linspace(-1, 1, len(weight), dtype=weight.dtype))  # type: ignore[union-attr]


def _hook(attention: nn.Module) -> None:
    attention.v_proj.register_forward_hook(lambda module, inputs, output: 2 * output)  # type: ignore[union-attr]


def _freeze(attention: nn.Module) -> None:
    attention.v_proj.requires_grad_(False)


_CHANGES: dict[str, Callable[[nn.Module], None]] = {  # of the first block's attention
    "a replaced projection": _replace,
    "a bias": _add_bias,
    "a hook": _hook,
    "a frozen matrix": _freeze,
}


def changed_modules(name: str, case: Case) -> Result:
    """The worst of `_CHANGES`. The reference of each is its own modules, run plain in float64."""
    try:
        engine = CpuEngine(torch.float32)
    except CompilerError as error:
        return Result(name, "float32", "skipped", note=str(error))
    why = engine.supports(copy.deepcopy(case.model).float())
    if why is not None:
        return Result(name, "float32", "skipped", note=why)
    results = [_changed(name, case, what, change, engine) for what, change in _CHANGES.items()]
    return max(results, key=lambda result: (result.verdict == "failed", result.gradient_error / result.tolerance))


def _changed(name: str, case: Case, what: str, change: Callable[[nn.Module], None], engine: CpuEngine) -> Result:
    def gradient(dtype: str, *, kernels: bool) -> Gradient:
        model = copy.deepcopy(case.model).to(getattr(torch, dtype))
        change(model.layers[0].self_attn)  # type: ignore[arg-type]
        two = case.share(token_budget=1, ids=case.all_ids[:2])  # a micro-batch each; more would only cost more
        execution, precision = Execution(engine) if kernels else PLAIN, Precision(dtype, torch.device("cpu"))
        return gradient_of_step(model, two, precision=precision, objective=case.objective, execution=execution)

    exact = gradient("float64", kernels=False)
    tolerance = _FACTOR * largest_error(gradient("float32", kernels=False), exact)
    got = gradient("float32", kernels=True)
    found = compare(got, exact)
    for extra in got.gradients.keys() - exact.gradients.keys():  # of what is frozen
        found = Comparison(math.inf, extra, found.norm_ratio, found.loss_difference)
    return Result.judge(name, "float32", tolerance, found, f"{', '.join(_CHANGES)}; the worst: {what}")
