"""The step on the device that the recipe trains on, where that is not the CPU, on which all other classes compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from pertoken.engines.cuda_graphs import why_no_graphs
from pertoken.engines.torch_compile import CompileEngine, not_compiled
from pertoken.errors import RecipeError
from pertoken.model.execution import PLAIN, Execution
from pertoken.prove.case import EXACT, FLOAT32_FACTOR, Case, gradient_of_step
from pertoken.prove.reference import reference_gradient
from pertoken.prove.report import Gradient, Result, compare, largest_error
from pertoken.recipe.schema import Recipe
from pertoken.training.precision import Precision, resolve_device

__all__ = ["DEVICE_CLASSES", "device_of"]


def device_of(recipe: Recipe) -> torch.device | None:
    """What the recipe trains on here; None where that is the CPU, or is not there."""
    try:
        device = resolve_device(recipe.train.device)
    except RecipeError:
        return None
    return None if device.type == "cpu" else device


def _on(
    device: torch.device, name: str, case: Case, dtype: str, execution: Execution, note: str, *, graphs: bool = False
) -> Result:
    """In float64 as exactly as on a CPU; below, at most four times as far off as the plain code on the same device."""
    precision = Precision(dtype, device)
    model = copy.deepcopy(case.model).to(device, precision.parameter_dtype)
    tolerance = EXACT
    if dtype != "float64":
        samples = [case.chosen.samples[i] for i in range(len(case.chosen.samples))]
        coefficients = {"aux_loss_coef": case.aux_loss_coef, "z_loss_coef": case.train.z_loss_coef}
        with precision.autocast():
            plain = reference_gradient(model, samples, **coefficients)
        tolerance = FLOAT32_FACTOR * largest_error(_on_host(plain), case.reference)
    share = case.split()
    found = gradient_of_step(
        model, share, precision=precision, objective=case.objective, execution=execution, graphs=graphs
    )
    note = f"{note} on {device.type}, {len(share.micro_batches)} micro-batches"
    return Result.judge(name, dtype, tolerance, compare(_on_host(found), case.reference), note)


def _on_host(gradient: Gradient) -> Gradient:
    return Gradient(gradient.loss, {name: g.cpu() for name, g in gradient.gradients.items()})


def _float64(name: str, case: Case, device: torch.device) -> Result:
    if device.type == "mps":
        return Result(name, "float64", "skipped", note="mps has no float64")
    return _on(device, name, case, "float64", PLAIN, "plain modules")


def _float32(name: str, case: Case, device: torch.device) -> Result:
    return _on(device, name, case, "float32", PLAIN, "plain modules")


def _bfloat16(name: str, case: Case, device: torch.device) -> Result:
    return _on(device, name, case, "bfloat16", PLAIN, "plain modules")


def _compiled(name: str, case: Case, device: torch.device) -> Result:
    why = "torch.compile is for CUDA" if device.type != "cuda" else not_compiled(case.model)
    if why is not None:
        return Result(name, "bfloat16", "skipped", note=why)
    return _on(device, name, case, "bfloat16", Execution(CompileEngine()), "layers fused by torch.compile")


def _graphs(name: str, case: Case, device: torch.device) -> Result:
    why = why_no_graphs(case.model, "bfloat16", device, PLAIN)
    if why is not None:
        return Result(name, "bfloat16", "skipped", note=why)
    return _on(device, name, case, "bfloat16", PLAIN, "replayed as CUDA graphs", graphs=True)


DEVICE_CLASSES: dict[str, Callable[[str, Case, torch.device], Result]] = {
    "on the device, float64": _float64,
    "on the device, float32": _float32,
    "on the device, bfloat16": _bfloat16,
    "on the device, compiled": _compiled,
    "on the device, graphs": _graphs,
}
