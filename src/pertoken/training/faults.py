"""What is said of a step that cannot be trained on: which samples are at fault, and where in the model it shows first.

All ranks call these functions alike and with the same samples: under FSDP2 each forward pass is a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.data.store.dataset import Dataset
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import TorchModule
from pertoken.objective.terms import CROSS_ENTROPY, Objective
from pertoken.training.norms import sum_of_squares
from pertoken.training.parallel import whole
from pertoken.training.precision import Precision

__all__ = ["first_non_finite", "is_finite", "nearest_bad_gradient", "plain_name", "shown_samples"]

_SHOWN = 20


def shown_samples(store: Dataset, sample_ids: Sequence[int], limit: int = _SHOWN) -> str:
    """`file:line` of the first `limit` samples, and how many more there are."""
    named = ", ".join(store.where(i) for i in sample_ids[:limit])
    return named + (f" and {len(sample_ids) - limit} more" if len(sample_ids) > limit else "")


def is_finite(
    model: TorchModule,
    micro_batch: MicroBatch,
    precision: Precision,
    execution: Execution = PLAIN,
    gradient_of: Callable[[Any], None] | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> bool:
    """Whether every term of the objective is finite over `micro_batch`; with `gradient_of`, which takes the model's
    output backward, whether they and every gradient are. Gradients are cleared after."""
    with nullcontext() if gradient_of else torch.no_grad():
        with precision.autocast():
            out = model(micro_batch.to(precision.device), execution, objective=objective)
        finite = all(bool(term.sum.isfinite()) for term in out.terms.values())
        if gradient_of is None:
            return finite
        try:
            gradient_of(out)  # even of a loss that is not finite: ranks go the same way
            return finite and nearest_bad_gradient(model) is None
        finally:
            model.zero_grad(set_to_none=True)


def nearest_bad_gradient(model: TorchModule) -> str | None:
    """The parameter whose gradient is not finite, the nearest to the loss of them; None if all are finite.

    Nearest in the order in which models declare their parameters; a tied head counts as the embedding that it is.
    """
    bad = None
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not sum_of_squares(whole(parameter.grad)).isfinite():
            bad = plain_name(name)
    return bad


@torch.no_grad()
def first_non_finite(model: TorchModule, micro_batch: MicroBatch, precision: Precision) -> str | None:
    """Where NaN or infinity shows first when `micro_batch` runs through the model, in words; None if it does not.

    The modules run one by one, without kernels and without compiled code, in the precision of training.
    """
    found: list[tuple[str, str]] = []  # what of which module; the first alone
    # The head is not called, unless somebody hooks it: the loss reads its weight, so that logits need not exist whole.
    head = getattr(model, "lm_head", None)
    names = {module: name for name, module in model.named_modules() if name and module is not head}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not found and not _all_finite(args):
            found.append(("input", names[module]))

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not found and not _all_finite(out):
            found.append(("output", names[module]))

    hooks = []
    for module in names:
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with _as_written(model), precision.autocast():
            loss_sum = model(micro_batch.to(precision.device), PLAIN).loss_sum
    finally:
        for hook in hooks:
            hook.remove()
    bad_parameters = _bad_parameters(model)
    if not found and bad_parameters:
        return f"the parameter {bad_parameters[0]}, which is not finite already"
    if not found:
        return None if loss_sum.isfinite() else "the loss itself; the output of every layer is finite"
    what, name = found[0]
    name = plain_name(name)
    parent = name.rpartition(".")[0] or "the model"
    own = [p for p in bad_parameters if p.rpartition(".")[0] in (name, parent)]
    why = f", whose parameter {own[0]} is not finite already" if own else ""
    if what == "output":
        return f"the output of {name}{why}"
    return f"what {parent} computes before {name}{why}"


def _bad_parameters(model: TorchModule) -> list[str]:
    return [plain_name(name) for name, p in model.named_parameters() if not whole(p.detach()).isfinite().all()]


def _all_finite(value: Any) -> bool:
    """Of the tensors in a module's arguments or output."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    return not isinstance(value, tuple | list) or all(map(_all_finite, value))


def _as_written(model: TorchModule) -> AbstractContextManager[object]:
    """Inside, modules that a user has compiled run as they are written, so that hooks see every one of them."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def plain_name(name: str) -> str:
    """As in a saved model: without what wraps it."""
    return name.removeprefix("module.").removeprefix("hf.")
