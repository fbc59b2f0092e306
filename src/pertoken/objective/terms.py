"""The objective of a step is a sum of terms, each divided by a count of the whole step.

    L = sum over terms of coefficient * sum / denominators[term.denominator]

A micro-batch returns the sums. The plan knows every denominator, over all micro-batches and ranks, before the first
pass (`Share.denominators`). So each micro-batch adds its part of one and the same L, and how a step is split cannot
matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pertoken.objective.row_terms import RowTerm

__all__ = ["CROSS_ENTROPY", "LossOutput", "Objective", "Term"]


@dataclass(frozen=True)
class Objective:
    """What a run minimizes beside the cross entropy, as a model's forward is told. Evaluation is told nothing.

    The balance loss of a mixture of experts is not here: the model's configuration has it.
    """

    row_terms: tuple[RowTerm, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the terms of a model without experts."""
        return ["loss", *(term.name for term in self.row_terms)]


CROSS_ENTROPY = Objective()  # alone


@dataclass(frozen=True)
class Term:
    """One term of the objective, over the tokens of one micro-batch."""

    sum: Tensor  # 0-d, float32 or float64; carries the gradient
    denominator: str  # a key of `Share.denominators`
    coefficient: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """Sums over the tokens of one micro-batch. Nothing is divided before the step's own counts are known."""

    loss_sum: Tensor  # 0-d, the cross entropy in nats, float32 or float64; carries the gradient
    num_tokens: Tensor  # 0-d: int64 supervised tokens, or the float64 sum of float weights
    # Name -> (sum, count), detached. Each term has its own, before its coefficient.
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    more_terms: dict[str, Term] = field(default_factory=dict)  # beside the cross entropy

    @property
    def terms(self) -> dict[str, Term]:
        """All terms by name; "loss", the cross entropy, comes first."""
        return {"loss": Term(self.loss_sum, "supervised"), **self.more_terms}

    def objective(self, denominators: Mapping[str, float] | Mapping[str, Tensor]) -> Tensor:
        """This micro-batch's part of L, 0-d. `denominators` are the whole step's, over all micro-batches and ranks, as
        numbers or 0-d.

        Raises KeyError for a denominator that the plan does not count.
        """
        first, *others = self.terms.values()
        objective = first.coefficient * first.sum / denominators[first.denominator]
        for term in others:  # in this order: the sum of floats depends on it
            objective = objective + term.coefficient * term.sum / denominators[term.denominator]
        return objective
