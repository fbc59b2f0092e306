"""The gradient norm against float64, at sizes and spreads where float32 sums lose what is small."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import rows_of

from pertoken import train
from pertoken.kernels.ops import Kernels
from pertoken.training.norms import clip, matrix_norms, sum_of_squares, total_norm
from pertoken.training.parallel import World

SIZES = [0, 1, 7, 16, 65_535, 65_536, 65_537, 300_001]


@pytest.fixture(scope="module", params=["blocks", "kernel"])
def kernels(request: pytest.FixtureRequest) -> Kernels | None:
    return Kernels(torch.float32) if request.param == "kernel" else None


def exact(x: torch.Tensor) -> float:
    """By Python's own exact sum."""
    return math.fsum(v * v for v in x.double().flatten().tolist())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares_is_the_exact_one(kernels, n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    assert float(sum_of_squares(x, kernels)) == pytest.approx(exact(x), rel=1e-13, abs=0)


def test_a_few_large_numbers_do_not_swallow_the_small_ones(kernels):
    x = torch.full((3_000_000,), 1e-3)
    x[:4] = 1e3
    assert float(torch.nn.utils.get_total_norm([x])) / math.sqrt(exact(x)) - 1 < -1e-8  # what float32 loses
    assert float(sum_of_squares(x, kernels)) == pytest.approx(exact(x), rel=1e-12)


def test_norm_of_28_million_numbers_is_within_1e_12_of_float64(kernels):
    x = torch.randn(28_000_000, generator=torch.Generator().manual_seed(0))
    wide = math.sqrt(sum(float(block.double().square().sum()) for block in x.split(1_000_000)))
    assert total_norm([x[:5], x[5:]], World(), kernels) == pytest.approx(wide, rel=1e-12)
    assert abs(float(torch.nn.utils.get_total_norm([x])) / wide - 1) > 1e-4


@pytest.mark.parametrize("how", ["transposed", "every other row", "a view"])
def test_numbers_that_lie_apart_count_once_each(kernels, how):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    x = {"transposed": x.t(), "every other row": x[::2], "a view": x[3:7, 5:9]}[how]
    assert float(sum_of_squares(x, kernels)) == pytest.approx(exact(x), rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 70_000])
def test_what_is_not_finite_comes_through(kernels, value, place):
    x = torch.ones(70_001)
    x[place] = value
    assert not math.isfinite(total_norm([torch.ones(3), x], World(), kernels))


def test_a_large_finite_gradient_has_a_finite_norm(kernels):
    """Its square is beyond float32."""
    assert total_norm([torch.full((4,), 1e30)], World(), kernels) == pytest.approx(2e30, rel=1e-6)


def test_no_gradients_have_norm_zero(kernels):
    assert total_norm([], World(), kernels) == 0.0


def test_the_kernel_gives_the_same_bits_on_one_thread_and_on_two():
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    before, kernels, sums = torch.get_num_threads(), Kernels(torch.float32), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sums.append(float(kernels.sum_of_squares(x)))
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1]


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e9])
def test_clipping_scales_to_the_largest_norm_and_leaves_what_is_below_it(max_norm):
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0]])]
    before = [g.clone() for g in gradients]
    clip(gradients, max_norm, total_norm(gradients, World()))
    if max_norm > 5:
        assert all(map(torch.equal, gradients, before))
    else:
        assert total_norm(gradients, World()) == pytest.approx(max_norm, rel=1e-6)
        assert float(gradients[0][0]) == pytest.approx(3 * max_norm / 5, rel=1e-6)


def test_matrix_norms_are_frobenius_norms():
    x = torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(0))
    assert matrix_norms(x).shape == (3, 1, 1)
    for matrix, norm in zip(x, matrix_norms(x).flatten().tolist(), strict=True):
        assert norm == pytest.approx(math.sqrt(exact(matrix)), rel=1e-13)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_reported_norm_of_a_run_is_that_of_float64(world, tmp_path, engine):
    """At a real vocabulary, where few rows of the embedding have most of the gradient."""
    norms = {}
    for dtype in ("float32", "float64"):
        recipe = world.recipe(
            tmp_path / dtype, train__dtype=dtype, train__max_steps=1, train__engine=engine, model__vocab_size=120_000
        )
        train(recipe)
        norms[dtype] = rows_of(tmp_path / dtype)[0]["grad_norm"]
    assert norms["float32"] == pytest.approx(norms["float64"], rel=1e-6)
