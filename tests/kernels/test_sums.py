"""Long sums: what the kernels add up over many rows or columns is as near to float64 as a single rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pertoken.kernels.ops import Kernels
from pertoken.objective.cross_entropy import linear_cross_entropy

ROUNDING = torch.finfo(torch.float32).eps  # of a result, and of the float32 terms that go into it


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) + mean


@pytest.mark.parametrize("rows", [1, 63, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norms_weight_gradient_is_summed_over_rows_without_loss(rows, dtype):
    """Terms of one sign, which is where a running sum in float32 loses most: 2e-6 over 8,192 rows."""
    h = normal(rows, 64)
    d_out = (h.sign() * normal(rows, 64, mean=1.0).abs()).to(dtype)
    kernels, weight = Kernels(dtype), torch.ones(64)
    _, rstd = kernels.norm_forward(h, weight, 1e-6)
    _, d_weight = kernels.norm_backward(d_out, h, weight, rstd, None)
    wide = torch.ones(64, dtype=torch.float64, requires_grad=True)
    F.rms_norm(h.double(), (64,), wide, 1e-6).backward(d_out.double())
    assert error(d_weight, wide.grad) < 2 * ROUNDING


@pytest.mark.parametrize("width", [3, 64, 512, 1000])
@pytest.mark.parametrize("tokens", [1, 20, 6400])
def test_an_embeddings_gradient_is_summed_over_rows_without_loss(width, tokens):
    """One token in every row: `index_add_` is off by 3e-6."""
    index = torch.randint(tokens, (8192,), generator=torch.Generator().manual_seed(0))
    x, start = normal(8192, width, mean=1.0), normal(6400, width)
    exact = start.double().index_add_(0, index, x.double())
    assert error(Kernels(torch.float32).add_rows(x, index, start.clone()), exact) < 2 * ROUNDING


def test_rows_of_no_index_add_nothing():
    start = normal(7, 5)
    out = Kernels(torch.float32).add_rows(normal(0, 5), torch.zeros(0, dtype=torch.int64), start.clone())
    assert torch.equal(out, start)  # nothing was computed


@pytest.mark.parametrize("vocab_size", [6_400, 151_936, 1_000_003])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_small_probabilities_of_a_large_vocabulary_are_not_lost(vocab_size, spread):
    """A sum in float32 over a million exponentials is off by 2e-4 nats, always to one side."""
    logits = normal(16, vocab_size) * spread
    labels = torch.arange(16)
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    nll = Kernels(torch.float32).cross_entropy(logits.clone(), labels, None, gradient=False)
    # The logarithm and the logit subtracted from it are rounded to float32.
    assert float((nll.double() - exact).abs().max()) < 2 * ROUNDING * float(logits.abs().max() + exact.max())


@pytest.mark.parametrize("impl", ["chunked", "cpu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_over_many_tokens_is_summed_without_loss(impl, weighted):
    hidden, weight = normal(20_000, 8), normal(40, 8)
    labels = torch.arange(20_000) % 40
    mask = normal(20_000).abs() if weighted else torch.ones(20_000, dtype=torch.bool)
    out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    nll = F.cross_entropy((hidden.double() @ weight.double().t()), labels, reduction="none")
    assert float(out.loss_sum) == pytest.approx(float((nll * mask.double()).sum()), rel=2 * ROUNDING)
    assert float(out.num_tokens) == pytest.approx(float(mask.double().sum()), rel=1e-12)
