"""LoRA: linear layers whose own matrix is frozen, beside two small ones that are trained.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Parameters are named as in peft, but for what it
puts before and behind the names: a layer's `weight`, `lora_A.weight` [r, in] and `lora_B.weight` [out, r].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.model.moe import MixtureOfExperts

__all__ = [
    "Adapter",
    "Base",
    "LoraLinear",
    "add_lora",
    "first_a",
    "is_of_adapter",
    "keep_frozen_in",
    "lora_layers",
    "matrices_of",
    "merge_lora",
]


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for, whose weights are not kept with it."""

    name: str  # as peft opens it: an absolute path, or a name of the hub
    revision: str | None = None  # on the hub: the commit
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256, where they are known


@dataclass(frozen=True)
class Adapter:
    """What an adapter is besides its weights."""

    r: int
    alpha: float
    rslora: bool
    base: Base
    dropout: float = 0.0  # with which others have trained it; nothing drops out here

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


class LoraLinear(nn.Linear):
    """y = W x + b + scale * B (A x), with W and b frozen. A product with the sum W + scale * B A is the same.

    `W` may be kept in bfloat16 where products are computed in it.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        """Takes over what `base` holds. A and B are on "meta", to be set."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        with torch.device("meta"):  # a layer's own initialization would draw from the global random state
            self.lora_A = nn.Linear(self.in_features, r, bias=False)
            self.lora_B = nn.Linear(r, self.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        added: Tensor = self.lora_B(self.lora_A(x))
        return F.linear(x, self.weight, self.bias) + self.scale * added

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale * B A [out, in], rounded once, to the dtype of A and B."""
        a, b = self.lora_A.weight, self.lora_B.weight
        with torch.autocast(a.device.type, enabled=False):
            return torch.addmm(self.weight.to(a.dtype), b, a, alpha=self.scale)


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name, ours or peft's, is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapted layer of our own by its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def first_a(r: int, in_features: int, *, generator: torch.Generator) -> Tensor:
    """A as peft begins: uniform within 1 / sqrt(in), He et al.'s initialization with a = sqrt(5). B begins as zero."""
    bound = in_features**-0.5
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)


def add_lora(
    model: nn.Module, names: Iterable[str], adapter: Adapter, seed: int, dtype: torch.dtype | None = None
) -> None:
    """Put a `LoraLinear` in place of each of the linear layers `names`, and freeze all else, in place.

    The first A depends on `seed` alone, B is zero, so that the model computes what it did before. `dtype` is that of A
    and B, by default the layer's.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent, base = model.get_submodule(parent_name), model.get_submodule(name)
        assert type(base) is nn.Linear, name
        layer = LoraLinear(base, adapter.r, adapter.scale)
        like = base.weight
        a = first_a(adapter.r, layer.in_features, generator=generator).to(like.device, dtype or like.dtype)
        layer.lora_A.weight = nn.Parameter(a)
        layer.lora_B.weight = nn.Parameter(torch.zeros(layer.out_features, adapter.r).to(a))
        setattr(parent, leaf, layer)


def merge_lora(model: nn.Module) -> None:
    """Put plain linear layers with the merged weights in place of adapted ones, all of it trainable, in place."""
    for name, layer in list(lora_layers(model)):
        parent_name, _, leaf = name.rpartition(".")
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight, plain.bias = nn.Parameter(layer.merged_weight()), layer.bias
        setattr(model.get_submodule(parent_name), leaf, plain)
    model.requires_grad_(True)


def matrices_of(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules of a model's blocks with a matrix that products in low precision are computed with: not a mixture's
    routers, which compute in float32."""
    for layer in layers:
        routers = {id(m) for module in layer.modules() if isinstance(module, MixtureOfExperts) for m in module.routers}
        for module in layer.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and id(module) not in routers:
                yield module


def keep_frozen_in(dtype: torch.dtype, layers: Iterable[nn.Module]) -> None:
    """Keep the frozen matrices of a model's blocks in `dtype`, in place, which must be what their products are computed
    in."""
    for module in matrices_of(layers):
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if not weight.requires_grad and weight.dtype != dtype:
            module.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
