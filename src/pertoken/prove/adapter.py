"""What the proof does with a recipe's adapter."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from pertoken.folders.adapters import merge
from pertoken.model.lora import is_of_adapter, lora_layers
from pertoken.model.protocol import LanguageModel
from pertoken.prove.case import EXACT, Case
from pertoken.prove.report import Gradient, Result, compare

__all__ = ["by_the_textbook", "fill_b"]

_STD = 0.02


@torch.no_grad()
def fill_b(model: LanguageModel, seed: int) -> str | None:
    """Give each B that is zero, as a new adapter's are, random numbers, or no A would have a gradient to compare. What
    the user should know of that; None where nothing was done."""
    generator, filled = torch.Generator().manual_seed(seed), False
    for name, parameter in model.named_parameters():
        if is_of_adapter(name) and ".lora_B." in name and not parameter.any():
            parameter.copy_(_STD * torch.randn(parameter.shape, generator=generator))
            filled = True
    return "a new adapter's B are zero, and A has no gradient then; here they are random." if filled else None


def by_the_textbook(name: str, case: Case) -> Result:
    """The plain gradient of A and B, against that of the whole matrices W + s B A of a model without an adapter: by the
    chain rule s B^T dW and s dW A^T (Hu et al., 2021, section 4.1)."""
    assert isinstance(case.model, nn.Module)
    adapter, layers = case.model.adapter, dict(lora_layers(case.model))
    if adapter is None or not layers:
        return Result(name, "float64", "skipped", note="transformers' own model: peft computes its adapter")
    scale = adapter.alpha / (math.sqrt(adapter.r) if adapter.rslora else adapter.r)
    whole = copy.deepcopy(case.model)
    merge(whole)
    with torch.no_grad():
        for of_layer, layer in layers.items():
            matrix = whole.get_submodule(of_layer).get_parameter("weight")
            matrix.copy_(layer.weight + scale * (layer.lora_B.weight @ layer.lora_A.weight))
    samples = [case.chosen.samples[i] for i in range(len(case.chosen.samples))]
    of_whole = case.plain_gradient(samples, model=whole)
    gradients = {}
    for of_layer, layer in layers.items():
        d_w = of_whole.gradients[f"{of_layer}.weight"]
        gradients[f"{of_layer}.lora_A.weight"] = scale * (layer.lora_B.weight.detach().T @ d_w)
        gradients[f"{of_layer}.lora_B.weight"] = scale * (d_w @ layer.lora_A.weight.detach().T)
    found = compare(case.reference, Gradient(of_whole.loss, gradients))
    return Result.judge(name, "float64", EXACT, found, f"{len(layers)} layers, s = {scale:g}")
