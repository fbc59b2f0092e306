"""The objective is a sum of terms, and a step sees what its plan has counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from native_cases import BATCHES, batch_of, model_of

from pertoken.data.batch.share import share_of_all
from pertoken.objective.terms import LossOutput, Term
from pertoken.training.precision import Precision
from pertoken.training.step import NonFiniteStep, TrainState, train_step


def output_of(*sums: float) -> LossOutput:
    """The cross entropy and further terms, named a, b, ... and divided by "inputs"."""
    first, *others = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in sums)
    more = {name: Term(x, "inputs", 0.1) for name, x in zip("abc", others, strict=False)}
    return LossOutput(first, torch.tensor(2), {}, more)


def test_each_term_has_its_coefficient_and_its_denominator():
    out = output_of(6.0, 40.0, 80.0)
    objective = out.objective({"supervised": 3.0, "inputs": 8.0, "documents": 5.0})
    assert float(objective.detach()) == pytest.approx(6 / 3 + 0.1 * 40 / 8 + 0.1 * 80 / 8)
    gradients = torch.autograd.grad(objective, [term.sum for term in out.terms.values()])
    assert [float(g) for g in gradients] == pytest.approx([1 / 3, 0.1 / 8, 0.1 / 8])


def test_the_public_contract_is_a_sum_a_count_and_metrics():
    out = LossOutput(torch.tensor(6.0), torch.tensor(2), {})
    assert list(out.terms) == ["loss"]
    assert float(out.objective({"supervised": 3.0})) == 2.0


def test_a_denominator_that_the_plan_does_not_count_is_an_error():
    with pytest.raises(KeyError, match="inputs"):
        output_of(6.0, 40.0).objective({"supervised": 3.0})


def state_of(model: torch.nn.Module) -> TrainState:
    precision = Precision("float32", torch.device("cpu"))
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0), precision.new_scaler(), precision)


@pytest.mark.parametrize("name", ["supervised", "inputs"])
def test_a_step_that_sees_another_count_than_its_plan_is_a_bug_of_ours(name):
    model = model_of({}, torch.float32)
    share = share_of_all([batch_of(*BATCHES["short"])])
    wrong = replace(share, denominators=share.denominators | {name: share.denominators[name] + 1})
    with pytest.raises(AssertionError, match=f"{name}: .* seen, .* expected"):
        train_step(state_of(model), wrong, lr=0.0, max_norm=0.0)
    assert all(p.grad is None for p in model.parameters())


def test_a_term_that_is_not_finite_stops_the_step_by_its_name():
    class Infinite(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of({}, torch.float32)

        def forward(self, *args: object, **settings: object) -> LossOutput:
            out = self.inner(*args, **settings)
            total = out.loss_sum * float("inf")
            return replace(
                out,
                metrics=out.metrics | {"mine": (total.detach(), out.num_tokens)},
                more_terms={"mine": Term(total, "inputs")},
            )

    with pytest.raises(NonFiniteStep, match="the mine is inf") as caught:
        train_step(state_of(Infinite()), share_of_all([batch_of(*BATCHES["short"])]), lr=0.0, max_norm=0.0)
    assert caught.value.micro_batch == (0, 0)
