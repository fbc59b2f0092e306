"""A kernel is never called with what it would read or write beyond the end of: each wrong argument is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pertoken.kernels.ops import MAX_HEAD_DIM, Kernels, PaddedLayout

DTYPES = [torch.float32, torch.bfloat16]
Call = Callable[..., Any]


def seats() -> PaddedLayout:
    """Two documents of 3 and 1 rows, padded to widths 4 and 2, the first in two blocks."""
    table = [[0, 4, 2, 0, 0], [0, 4, 2, 1, 0], [0, 4, 2, 2, 1], [4, 2, 2, 0, 1]]
    return PaddedLayout(torch.tensor(table, dtype=torch.int32), torch.tensor([0, 1, 2, 0], dtype=torch.int32), 6)


def calls(dtype: torch.dtype) -> dict[str, tuple[Call, dict[str, Any]]]:
    """A right call of every kernel."""
    k = Kernels(dtype)

    def act(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    heads = {"seats": seats(), "heads": 2, "group": 1, "head_dim": 6}
    angles = torch.randn(3, 6)
    scores = {"log_z_BR": torch.zeros(4, 3), "limits_SR": torch.full((2, 3), 7, dtype=torch.int32), "scale": 0.5}
    return {
        "norm_forward": (k.norm_forward, {"h_ND": torch.randn(5, 7), "weight": torch.randn(7), "eps": 1e-6}),
        "norm_transposed": (
            k.norm_transposed,
            {"h_ND": torch.randn(5, 7), "weight": torch.randn(7), "rstd_N": torch.ones(5)},
        ),
        "norm_backward": (
            k.norm_backward,
            {
                "d_out_ND": act(5, 7),
                "h_ND": torch.randn(5, 7),
                "weight": torch.randn(7),
                "rstd_N": torch.ones(5),
                "d_residual_ND": torch.randn(5, 7),
            },
        ),
        "cast_and_transpose": (k.cast_and_transpose, {"x_ND": torch.randn(5, 7)}),
        "widen_transposed": (k.widen_transposed, {"x_RC": act(5, 7), "out_CR": torch.zeros(7, 5)}),
        "add_residual": (k.add_residual, {"h_ND": torch.randn(5, 7), "delta_ND": act(5, 7)}),
        "glu_forward": (k.glu_forward, {"gate_up_NF": act(5, 14)}),
        "glu_backward": (k.glu_backward, {"gate_up_NF": act(5, 14), "d_out_NF": act(5, 7)}),
        "soft_cap": (k.soft_cap, {"logits_NV": act(5, 9), "cap": 30.0}),
        "soft_cap_gradient": (
            k.soft_cap_gradient,
            {"gradient_NV": act(5, 9), "uncapped_NV": act(5, 9), "cap": 30.0},
        ),
        "pad_heads": (k.pad_heads, {"x": act(4, 12), **heads, "norm": torch.randn(6), "angles": angles}),
        "unpad_heads": (
            k.unpad_heads,
            {"d_out": act(12, 6), "to": act(4, 12), "x": act(4, 12), **heads, "norm": torch.randn(6), "angles": angles},
        ),
        "softmax_forward": (k.softmax_forward, {"scores_BRC": act(4, 3, 16), **scores}),
        "softmax_backward": (k.softmax_backward, {"scores_BRC": act(4, 3, 16), "d_p_BRC": act(4, 3, 16), **scores}),
        "cross_entropy": (
            k.cross_entropy,
            {
                "logits_NV": act(5, 9),
                "labels_N": torch.arange(5),
                "weights_N": torch.ones(5),
                "statistics_N2": torch.zeros(5, 2),
                "gradient": True,
            },
        ),
        "cross_entropy_gradient": (
            k.cross_entropy_gradient,
            {
                "logits_NV": act(5, 9),
                "labels_N": torch.arange(5),
                "statistics_N2": torch.zeros(5, 2),
                "on_softmax_N": torch.ones(5),
                "at_label_N": torch.ones(5),
            },
        ),
        "sum_of_squares": (k.sum_of_squares, {"x": torch.randn(9)}),
        "add_rows": (
            k.add_rows,
            {"x_ND": torch.randn(5, 7), "index_N": torch.tensor([0, 3, 3, 1, 0]), "out_VD": torch.zeros(4, 7)},
        ),
    }


NAMES = list(calls(torch.float32))
# Arguments of which any size of a dimension is right, as no other argument is measured by it.
FREE = {
    ("cast_and_transpose", "x_ND"): {0, 1},
    ("norm_forward", "h_ND"): {0},
    ("softmax_forward", "limits_SR"): {0},
    ("softmax_backward", "limits_SR"): {0},
    ("glu_forward", "gate_up_NF"): {0},
    ("soft_cap", "logits_NV"): {0, 1},
    ("sum_of_squares", "x"): {0},
    ("add_rows", "out_VD"): {0},
    ("cross_entropy", "logits_NV"): {1},
    ("cross_entropy_gradient", "logits_NV"): {1},
}
LARGER = {"x", "to", "angles"}  # may have more rows and columns than are read, of heads


class Mine(Tensor):
    pass


def wrong(name: str, argument: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`x` in each way in which it cannot be meant."""
    others = {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool}
    yield from ((str(dtype), x.to(dtype)) for dtype in others - {x.dtype})
    yield "meta", x.to("meta")
    yield "a subclass", x.as_subclass(Mine)
    yield "sparse", x.to_sparse()
    yield "a dimension more", x.unsqueeze(0)
    yield "a dimension less", x[0]
    yield "strided", torch.stack((x, x), -1)[..., 0]
    free = FREE.get((name, argument), set())
    for axis in set(range(x.ndim)) - free:
        yield f"shorter in {axis}", x.narrow(axis, 0, x.shape[axis] - 1).contiguous()
        if argument not in LARGER or (argument == "angles" and axis == 1):
            yield f"longer in {axis}", torch.cat((x, x.narrow(axis, 0, 1)), axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_argument_wrong_in_any_way_is_an_error(name, dtype):
    function, arguments = calls(dtype)[name]
    function(**arguments)  # the right call
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    assert tensors
    for key, value in tensors.items():
        for how, bad in wrong(name, key, value):
            try:
                function(**{**arguments, key: bad})
            except (TypeError, ValueError, IndexError):
                continue
            pytest.fail(f"{name}: {key} {how} was taken")


# The others are measured by their seats, or by their targets.
@pytest.mark.parametrize("name", [name for name in NAMES if "heads" not in name and name != "add_rows"])
def test_no_rows_at_all_are_no_error(name):
    """Where rows are the first dimension of everything."""
    function, arguments = calls(torch.float32)[name]
    per_column = {"weight", "out_CR"}
    empty = {k: v[:0] if isinstance(v, Tensor) and k not in per_column else v for k, v in arguments.items()}
    if name == "widen_transposed":
        empty["out_CR"] = torch.zeros(7, 0)
    function(**empty)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_gradient"])
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**40)])
def test_a_label_beyond_the_logits_is_an_error(bad, name):
    function, arguments = calls(torch.float32)[name]
    with pytest.raises(IndexError, match=r"must be within \[0, 9\)"):
        function(**{**arguments, "labels_N": torch.tensor([0, 1, bad, 3, 4])})


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_a_row_beyond_the_sum_is_an_error(bad):
    function, arguments = calls(torch.float32)["add_rows"]
    with pytest.raises(IndexError):
        function(**{**arguments, "index_N": torch.tensor([0, 1, bad, 3, 0])})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [-(2**31), -17, -1, 17, 2**31 - 1])
def test_a_limit_beyond_the_columns_stays_within_them(limit, dtype):
    """Nothing before or after the scores is written, which lie in the middle of what is known."""
    _, arguments = calls(dtype)["softmax_backward"]
    whole = torch.full((3, 4, 3, 16), 5.0, dtype=dtype)
    gradients = whole.clone()
    limits = torch.full((2, 3), limit, dtype=torch.int32)
    kernels = Kernels(dtype)
    kernels.softmax_forward(whole[1], arguments["log_z_BR"], limits, 1.0)
    assert torch.equal(whole[1], torch.full_like(whole[1], 0.0 if limit < 0 else 1 / 16))
    kernels.softmax_backward(whole[1], gradients[1], arguments["log_z_BR"], limits, 1.0)
    for outside in (whole[0], whole[2], gradients[0], gradients[2]):
        assert bool((outside == 5.0).all())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([-1, 4, 2, 0, 0], "first"),
        ([3, 4, 4, 0, 0], "width"),
        ([0, 4, 2, 4, 0], "row"),
        ([0, 4, 2, -1, 0], "row"),
        ([0, 4, 0, 0, 0], "block"),
        ([0, 4, 3, 0, 0], "blocks that do not fill the width"),
        ([2**31 - 1, 2**31 - 1, 1, 0, 0], "all"),
    ],
)
def test_a_seat_outside_of_the_layout_is_an_error(row, why):
    with pytest.raises(ValueError, match="outside of the layout's 6 rows"):
        PaddedLayout(torch.tensor([row], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 6)


def test_heads_that_do_not_fit_their_seats_are_errors():
    function, arguments = calls(torch.float32)["pad_heads"]
    for changes in ({"heads": 3}, {"group": 3}, {"group": 0}, {"head_dim": 5}, {"head_dim": 0}, {"heads": 0}):
        with pytest.raises(ValueError, match=r"must be|are seated"):
            function(**{**arguments, **changes})
    wide = MAX_HEAD_DIM + 2
    changes = {"x": torch.randn(4, 2 * wide), "head_dim": wide, "norm": None, "angles": torch.randn(3, wide)}
    with pytest.raises(ValueError, match=f"at most {MAX_HEAD_DIM}"):
        function(**{**arguments, **changes})
    with pytest.raises(IndexError, match="angles of 2 positions: the seats have 3"):
        function(**{**arguments, "angles": torch.randn(2, 6)})


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_are_computed_or_refused(seed):
    """Some arguments of a random kernel get another shape: nothing crashes, and only errors that are meant come."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        name = NAMES[int(rng.integers(len(NAMES)))]
        function, arguments = calls(torch.float32)[name]
        changed = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, Tensor) and rng.random() < 0.5:
                shape = [max(0, n + int(rng.integers(-2, 3))) for n in value.shape]
                changed[key] = torch.zeros(shape, dtype=value.dtype)
        with suppress(TypeError, ValueError, IndexError):
            function(**changed)
