"""Gradients compared, and what is said about them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Comparison", "Gradient", "Proof", "Result", "Verdict", "compare", "largest_error"]

Verdict = Literal["passed", "failed", "skipped", "differs"]


@dataclass(frozen=True)
class Gradient:
    """Of one step's objective."""

    loss: float  # nats per supervised token, without a balance loss
    gradients: dict[str, Tensor]  # by parameter

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))


@dataclass(frozen=True)
class Comparison:
    """Of a gradient with the reference."""

    gradient_error: float  # the largest over parameters of max |g - reference| / max |reference|
    worst: str  # the parameter it belongs to
    norm_ratio: float
    loss_difference: float


@dataclass(frozen=True)
class Result:
    """What became of one class of ways to compute the same thing."""

    name: str
    dtype: str
    verdict: Verdict
    tolerance: float = 0.0  # of the gradient error, relative
    gradient_error: float = math.nan
    worst: str = ""
    norm_ratio: float = math.nan
    loss_difference: float = math.nan
    note: str = ""

    @classmethod
    def judge(cls, name: str, dtype: str, tolerance: float, comparison: Comparison, note: str = "") -> Result:
        """The norm may be off, and the loss (relative to at least one nat), by as much as the gradient."""
        errors = (comparison.gradient_error, abs(comparison.norm_ratio - 1), abs(comparison.loss_difference))
        passed = all(error <= tolerance for error in errors)  # not so for NaN
        return cls(name, dtype, "passed" if passed else "failed", tolerance, **asdict(comparison), note=note)


@dataclass(frozen=True)
class Proof:
    """All results, and what they were computed on."""

    results: tuple[Result, ...]
    model: str
    samples: tuple[str, ...]  # file:line
    cut: int  # how many of them were used in part
    tokens: int
    supervised: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        return not any(result.verdict == "failed" for result in self.results)

    def to_json(self) -> str:
        """Numbers that JSON does not have become null."""

        def clean(value: object) -> object:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        values = asdict(self) | {"holds": self.holds}
        values["results"] = [{k: clean(v) for k, v in asdict(r).items()} for r in self.results]
        return json.dumps(values, indent=1, allow_nan=False)


def compare(got: Gradient, reference: Gradient) -> Comparison:
    """Parameter by parameter, each relative to the reference's own largest entry.

    One norm over all would hide a small parameter that is all wrong (a router, say). A parameter whose reference is
    zero everywhere is measured by the largest entry of all; one without a gradient has an infinite error.
    """
    largest = max(float(g.abs().max()) for g in reference.gradients.values())
    errors: dict[str, float] = {}
    for name, expected in reference.gradients.items():
        found = got.gradients.get(name)
        if found is None:
            errors[name] = math.inf
            continue
        scale = float(expected.abs().max()) or largest
        error = float((found.to(expected.dtype) - expected).abs().max()) / scale
        errors[name] = error if math.isfinite(error) else math.inf
    worst = max(errors, key=errors.__getitem__)
    return Comparison(
        gradient_error=errors[worst],
        worst=worst,
        norm_ratio=got.norm / reference.norm,
        loss_difference=(got.loss - reference.loss) / max(1.0, abs(reference.loss)),
    )


def largest_error(got: Gradient, reference: Gradient) -> float:
    """Over gradients, norm and loss, each relative: what bounds others in the same precision."""
    found = compare(got, reference)
    return max(
        found.gradient_error, abs(found.norm_ratio - 1), abs(found.loss_difference), torch.finfo(torch.float32).eps
    )
