"""Scaled and soft-capped logits: against plain PyTorch in float64, in every implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import problem

import pertoken.objective.cross_entropy
from pertoken import linear_cross_entropy
from pertoken.objective.logit_map import LogitMap
from pertoken.objective.row_terms import RowTerm
from pertoken.objective.z_loss import z_loss

pytestmark = pytest.mark.numeric

MAPS = [LogitMap(0.125), LogitMap(1 / 3, 2.0), LogitMap(cap=3.0)]  # the cap bends most logits of `problem`
Z_LOSS = RowTerm("z_loss", z_loss, 0.03)


def plain(hidden, weight, labels, mask, logit_map):
    """(the sum of nll, the sum of log(Z)^2), with nothing of ours in it but two numbers."""
    logits = hidden @ weight.T * logit_map.scale
    if logit_map.cap is not None:
        logits = torch.tanh(logits / logit_map.cap) * logit_map.cap
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * mask).sum(), (logits.logsumexp(1).square() * mask).sum()


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_MIN_CHUNK_ROWS", 3)  # the last one short
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_chunk_rows", lambda vocab_size, hidden_size, dtype: 5)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("weights", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("terms", [(), (Z_LOSS,)], ids=["nll", "z-loss"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_sums_and_gradients_equal_plain_pytorch_in_float64(impl, terms, weights, logit_map):
    hidden, weight, labels, mask = problem(128, 32, 257, 0.7, torch.float64, weights=weights)
    out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=terms, logit_map=logit_map)
    nll_sum, z_sum = plain(hidden, weight, labels, mask, logit_map)
    torch.testing.assert_close(out.loss_sum, nll_sum, rtol=1e-12, atol=1e-12)
    expected = (nll_sum + (0.03 * z_sum if terms else 0.0)) / 7
    ours = torch.autograd.grad(out.objective({"supervised": 7.0}), (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def errors(impl, dtype, logit_map, terms):
    """Of the sum and of both gradients, relative, against float64."""
    hidden, weight, labels, mask = problem(129, 32, 257, 0.7, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll_sum, z_sum = plain(*exact, labels, mask, logit_map)
    expected = torch.autograd.grad(nll_sum + (0.03 * z_sum if terms else 0.0), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=terms, logit_map=logit_map)
    found = torch.autograd.grad(out.objective({"supervised": 1.0}), (hidden, weight))
    of_sum = abs(float(out.loss_sum.detach()) / float(nll_sum.detach()) - 1)
    return [of_sum, *(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("terms", [(), (Z_LOSS,)], ids=["nll", "z-loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_low_precision_errs_hardly_more_than_the_reference_does(impl, dtype, terms, logit_map):
    """The kernels round a capped bfloat16 logit once more."""
    reference = errors("reference", dtype, logit_map, terms)
    for ours, theirs in zip(errors(impl, dtype, logit_map, terms), reference, strict=True):
        assert ours <= 1.5 * theirs + (2e-4 if dtype == torch.bfloat16 else 1e-6)
