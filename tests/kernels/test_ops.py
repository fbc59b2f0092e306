"""Every kernel against its plain definition in float64, at awkward sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.kernels.ops import Kernels, PaddedLayout

pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (3, 5), (16, 16), (32, 48), (33, 17), (70, 129)]  # N, D: below, at and above a tile
EPS = 1e-6


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(ours: Tensor, exact: Tensor) -> None:
    """To a rounding or two of the dtype, relative to the largest entry."""
    bound = (4 if ours.dtype == torch.bfloat16 else 40) * torch.finfo(ours.dtype).eps
    assert (ours.double() - exact).abs().max() <= bound * exact.abs().max().clamp(min=1e-30)


def rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(h.double(), (h.shape[1],), weight.double(), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_norm_and_its_gradient(dtype, n, d):
    kernels, h, weight = Kernels(dtype), values(n, d), values(d, seed=1)
    out, rstd = kernels.norm_forward(h, weight, EPS)
    assert out.dtype == dtype
    close(out, rms_norm(h, weight))
    assert torch.equal(kernels.norm_transposed(h, weight, rstd), out.t())
    d_out, d_residual = values(n, d, seed=2, dtype=dtype), values(n, d, seed=3)
    exact_h, exact_weight = h.double().requires_grad_(), weight.double().requires_grad_()
    F.rms_norm(exact_h, (d,), exact_weight, EPS).backward(d_out.double())
    for along in (d_residual, None):
        d_h, d_weight = kernels.norm_backward(d_out, h, weight, rstd, along)
        expected = exact_h.grad if along is None else exact_h.grad + along.double()
        # With one column the gradient cancels to about eps: what remains is the rounding of its terms.
        assert (d_h.double() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        close(d_weight, exact_weight.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_casts_and_transposes_are_exact(dtype, n, d):
    kernels, x = Kernels(dtype), values(n, d)
    straight, turned = kernels.cast_and_transpose(x)
    assert torch.equal(straight, x.to(dtype))
    assert torch.equal(turned, x.to(dtype).t())
    out = values(d, n, seed=5)
    before = out.clone()
    assert torch.equal(kernels.widen_transposed(straight, out, add=True), before + straight.float().t())
    wide = torch.zeros(d, n + 3)
    part = values(n, d + 2, seed=6, dtype=dtype)[:, :d]  # rows of both lie apart
    kernels.widen_transposed(part, wide[:, :n])
    assert torch.equal(wide[:, :n], part.float().t())
    assert torch.count_nonzero(wide[:, n:]) == 0
    assert torch.equal(kernels.add_residual(x, straight), x + straight.float())


def test_bfloat16_is_rounded_as_torch_rounds_it():
    kernels = Kernels(torch.bfloat16)
    halfway = torch.tensor([1.00390625, 1.01171875, -1.00390625])  # between two: to the even one
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-40, 65504.0])
    x = torch.cat((halfway, special, values(500))).unsqueeze(1).contiguous()
    straight, _ = kernels.cast_and_transpose(x)
    torch.testing.assert_close(straight, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("n", "f"), [(1, 1), (5, 7), (33, 129)])
def test_a_gated_unit_and_its_gradient(dtype, n, f, gelu):
    kernels, gate_up = Kernels(dtype), values(n, 2 * f, dtype=dtype) * 4
    d_out = values(n, f, seed=1, dtype=dtype)
    exact = gate_up.double().requires_grad_()
    gate = F.gelu(exact[:, :f], approximate="tanh") if gelu else F.silu(exact[:, :f])
    expected = gate * exact[:, f:]
    expected.backward(d_out.double())
    out = kernels.glu_forward(gate_up, gelu=gelu)
    close(out, expected.detach())
    close(kernels.glu_backward(gate_up, d_out, gelu=gelu), expected.detach())
    close(gate_up, exact.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 3.0, 300.0])
def test_a_soft_cap_and_its_gradient(dtype, size):
    kernels, cap = Kernels(dtype), 30.0
    logits, d_out = values(5, 133, dtype=dtype) * size, values(5, 133, seed=1, dtype=dtype)
    exact = logits.double().requires_grad_()
    expected = cap * torch.tanh(exact / cap)
    expected.backward(d_out.double())
    capped = torch.cat((logits, logits), 1)[:, :133]  # rows lie apart
    kernels.soft_cap(capped, cap)
    close(capped, expected.detach())
    kernels.soft_cap_gradient(d_out, logits, cap)
    close(d_out, exact.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 64, 112, 5008])
def test_softmax_sees_so_many_columns_and_its_gradient_too(dtype, columns):
    kernels, scale = Kernels(dtype), 0.25
    documents, copies, rows = 2, 3, 4
    shape = (documents * copies, rows, columns)
    scores, d_p = values(*shape, dtype=dtype) * 8, values(*shape, seed=1, dtype=dtype)
    limits = torch.tensor([[0, 1, columns, columns // 2], [columns, 0, max(1, columns - 1), 1]], dtype=torch.int32)
    seen = torch.arange(columns) < limits.repeat_interleave(copies, 0).unsqueeze(-1)
    exact = scores.double().requires_grad_()
    masked = torch.where(seen, exact * scale, -math.inf)
    nothing = ~seen.any(-1, keepdim=True)
    expected = torch.where(nothing, 0.0, masked.masked_fill(nothing, 0.0).softmax(-1))
    expected.backward(d_p.double())
    p, log_z = scores.clone(), torch.empty(shape[:2])
    kernels.softmax_forward(p, log_z, limits, scale)
    close(p, expected.detach())
    assert torch.count_nonzero(p[~seen]) == 0
    kernels.softmax_backward(scores, d_p, log_z, limits, scale)
    close(scores, expected.detach())
    # p is rounded before it is multiplied, as it is in every product it goes into.
    assert (d_p.double() - exact.grad).abs().max() <= 4 * torch.finfo(dtype).eps * 4
    assert torch.count_nonzero(d_p[~seen]) == 0


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "v"), [(1, 2), (5, 129), (33, 1000)])
def test_cross_entropy_turns_logits_into_their_gradient(dtype, n, v, weights):
    kernels, logits = Kernels(dtype), values(n, v + 3, dtype=dtype)[:, :v] * 3
    logits = torch.cat((logits, logits[:, :3] * 0), 1)[:, :v]  # rows lie apart
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(0))
    weight = None if weights is None else values(n, seed=4).abs()
    exact = logits.double().requires_grad_()
    nll = F.cross_entropy(exact, labels, reduction="none")
    (nll * (1.0 if weight is None else weight.double())).sum().backward()
    untouched = logits.clone()
    without = kernels.cross_entropy(logits, labels, weight, gradient=False)
    assert torch.equal(logits, untouched)
    found = kernels.cross_entropy(logits, labels, weight, gradient=True)  # of the same memory: sums may depend on where
    assert torch.equal(found, without)
    assert (found.double() - nll.detach()).abs().max() <= 1e-6 * max(1.0, float(untouched.abs().max()))
    # Of probabilities: where all but 1 goes to one label, its gradient is what rounding leaves of 1 - p.
    assert (logits.double() - exact.grad).abs().max() <= 4 * torch.finfo(dtype).eps * max(
        1.0, float(exact.grad.abs().max())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "v"), [(1, 2), (5, 129), (33, 1000)])
def test_cross_entropy_gradient_has_a_factor_a_row_of_softmax_and_of_the_label(dtype, n, v):
    kernels, logits = Kernels(dtype), values(n, v, dtype=dtype) * 3
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(0))
    on_softmax, at_label, statistics = values(n, seed=4), values(n, seed=5), torch.empty(n, 2)
    exact = logits.double()
    expected = on_softmax.double()[:, None] * exact.softmax(1)
    expected[torch.arange(n), labels] -= at_label.double()
    kernels.cross_entropy(logits, labels, None, statistics, gradient=False)
    torch.testing.assert_close(statistics.double().sum(1), exact.logsumexp(1), rtol=1e-6, atol=1e-6)
    kernels.cross_entropy_gradient(logits, labels, statistics, on_softmax, at_label)
    factors = 1.0 + (on_softmax.abs() + at_label.abs()).double()
    assert ((logits.double() - expected).abs() / factors[:, None]).max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(dtype, what):
    kernels = Kernels(dtype)
    row = torch.zeros(1, 48)
    row[0, 17] = what
    low = row.to(dtype)
    labels = torch.zeros(1, dtype=torch.int64)
    assert not kernels.norm_forward(row, torch.ones(48), EPS)[0].isfinite().all()
    assert not kernels.cast_and_transpose(row)[1].isfinite().all()
    assert not kernels.glu_forward(torch.cat((low, low), 1)).isfinite().all()
    assert not kernels.cross_entropy(low.clone(), labels, None, gradient=True).isfinite().all()
    gradient, statistics, ones = low.clone(), torch.empty(1, 2), torch.ones(1)
    kernels.cross_entropy(gradient, labels, None, statistics, gradient=False)
    kernels.cross_entropy_gradient(gradient, labels, statistics, ones, ones)
    assert not gradient.isfinite().all()
    scores = low.clone().unsqueeze(0)
    kernels.softmax_forward(scores, torch.empty(1, 1), torch.tensor([[48]], dtype=torch.int32), 1.0)
    assert not scores.isfinite().all()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_come_back_from_their_seats(dtype, group):
    """Two documents of 3 and 1 rows, padded to widths 4 and 2, the first one in two blocks."""
    kernels, heads, dim = Kernels(dtype), 2, 6
    table = [[0, 4, 2, 0, 0], [0, 4, 2, 1, 0], [0, 4, 2, 2, 1], [4, 2, 2, 0, 1]]
    seats = PaddedLayout(torch.tensor(table, dtype=torch.int32), torch.tensor([0, 1, 2, 0], dtype=torch.int32), 6)
    x, norm = values(4, heads * dim + 2, dtype=dtype)[:, : heads * dim], values(dim, seed=1)
    plain = kernels.pad_heads(x, seats, heads, group, dim)
    # [document, group of heads, block, head of the group, row]
    first = x[:3].reshape(3, heads // group, group, dim)
    first = torch.cat((first, torch.zeros_like(first[:1]))).view(2, 2, heads // group, group, dim)
    second = torch.cat((x[3:], torch.zeros_like(x[3:]))).view(1, 2, heads // group, group, dim)
    expected = [part.permute(2, 0, 3, 1, 4).reshape(-1, dim) for part in (first, second)]
    assert torch.equal(plain, torch.cat(expected))
    back = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.unpad_heads(plain, back, seats, heads, group, dim)
    assert torch.equal(back, x)

    angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    table_of_angles = torch.cat((angles.cos(), angles.sin()), 1)
    exact, exact_norm = x.double().requires_grad_(), norm.double().requires_grad_()
    normed = F.rms_norm(exact.view(4, heads, dim), (dim,), exact_norm, EPS)
    a, b = normed.chunk(2, -1)
    cosine, sine = (t.double()[seats.positions.long()][:, None] for t in table_of_angles.chunk(2, 1))
    turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
    seated = kernels.pad_heads(x, seats, heads, group, dim, norm=norm, angles=table_of_angles, eps=EPS)
    unseated = torch.empty(4, heads * dim, dtype=dtype)
    kernels.unpad_heads(seated, unseated, seats, heads, group, dim)
    close(unseated, turned.detach().flatten(1))
    d_out = values(4, heads * dim, seed=7, dtype=dtype)
    turned.backward(d_out.double().view_as(turned))
    d_seated = kernels.pad_heads(d_out, seats, heads, group, dim)
    d_x = torch.empty(4, heads * dim, dtype=dtype)
    settings = {"x": x, "norm": norm, "angles": table_of_angles, "eps": EPS}
    d_norm = kernels.unpad_heads(d_seated, d_x, seats, heads, group, dim, **settings)
    close(d_x, exact.grad)
    close(d_norm, exact_norm.grad)
