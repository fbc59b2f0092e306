"""Statistics of every parameter's gradient, for whoever looks for the one that is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.model.protocol import TorchModule
from pertoken.objective.wide import in_float64
from pertoken.training.norms import sum_of_squares
from pertoken.training.parallel import whole

__all__ = ["GradStats", "gradient_stats"]


@dataclass(frozen=True)
class GradStats:
    """Of one parameter's gradient; all None where the backward pass did not reach it."""

    name: str
    mean: float | None
    std: float | None
    norm: float | None


def gradient_stats(model: TorchModule) -> list[GradStats]:
    """Mean, standard deviation and L2 norm of every trainable parameter's gradient, as it stands now."""
    stats = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            stats.append(GradStats(name, None, None, None))
        else:
            grad = in_float64(whole(parameter.grad))
            stats.append(
                GradStats(name, float(grad.mean()), float(grad.std(correction=0)), float(sum_of_squares(grad).sqrt()))
            )
    return stats
