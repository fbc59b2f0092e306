"""linear_cross_entropy against plain PyTorch in float64, at awkward sizes."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import autocast_errors, plain, problem

import pertoken.objective.cross_entropy
from pertoken import linear_cross_entropy

pytestmark = pytest.mark.numeric

SIZES = [(1, 1, 2), (1, 8, 129), (7, 16, 5), (128, 32, 257), (129, 3, 1000)]  # N, D, V
SHARES = [0.0, 0.4, 1.0]


@pytest.mark.parametrize("weights", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_sum_and_gradients_equal_the_definition_in_float64(impl, n, d, v, share, weights, monkeypatch):
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_MIN_CHUNK_ROWS", 3)  # several chunks, the last one short
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_CHUNK_BYTES", 1)
    hidden, weight, labels, mask = problem(n, d, v, share, torch.float64, weights=weights)
    out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    assert out.loss_sum.dtype == torch.float64
    expected = plain(hidden, weight, labels, mask)
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-12, atol=1e-12)
    assert float(out.num_tokens) == pytest.approx(float(mask.sum()), rel=1e-12)
    ours = torch.autograd.grad(out.loss_sum * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.37, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_supervised_gives_zero_sum_zero_count_zero_gradients(dtype):
    hidden, weight, labels, mask = problem(9, 4, 11, 0.0, dtype)
    out = linear_cross_entropy(hidden, weight, labels, mask)
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == 0.0
    assert int(out.num_tokens) == 0
    assert out.num_tokens.dtype == torch.int64
    for grad in (hidden.grad, weight.grad):
        assert torch.count_nonzero(grad) == 0
        assert grad.isfinite().all()


def test_no_rows_at_all_still_reach_both_inputs():
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(5, 4, requires_grad=True)
    out = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    out.loss_sum.backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(5, 4))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_label_under_a_false_mask_is_never_looked_at(impl):
    hidden, weight, labels, mask = problem(128, 8, 33, 0.4, torch.float64)
    expected = plain(hidden, weight, labels, mask)
    labels = torch.where(mask, labels, -100)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, mask, impl=impl).loss_sum, expected)


@pytest.mark.parametrize("label", [-1, -100, 33])
def test_a_supervised_label_outside_of_the_vocabulary_is_an_error(label):
    hidden, weight, labels, mask = problem(4, 8, 33, 1.0, torch.float32)
    labels[2] = label
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_low_precision_errs_no_more_than_the_reference_does(dtype, impl):
    for ours, theirs in zip(autocast_errors(dtype, impl), autocast_errors(dtype, "reference"), strict=True):
        assert ours <= 1.5 * theirs + 1e-6


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_bfloat16_accumulates_the_sum_and_the_weights_gradient_in_float32(monkeypatch, impl):
    """Many chunks whose shares would be lost if they were added up in bfloat16."""
    whole = autocast_errors(torch.bfloat16, impl, 1.0)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_MIN_CHUNK_ROWS", 2)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_chunk_rows", lambda vocab_size, hidden_size, dtype: 2)
    for chunked, at_once in zip(autocast_errors(torch.bfloat16, impl, 1.0), whole, strict=True):
        assert chunked <= 1.5 * at_once + 1e-6


def test_float16_keeps_the_gradient_of_improbable_tokens():
    """Probabilities near 1e-7 vanish in float16 unless the gradient is boosted before the cast."""
    v = 6000
    hidden = torch.full((1, 1), 1.0, requires_grad=True)
    weight = torch.full((v, 1), -8.0)
    weight[0] = 8.0
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out = linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([True]))
    (grad,) = torch.autograd.grad(out.loss_sum, (weight,))
    p = math.exp(-16) / (1 + (v - 1) * math.exp(-16))
    assert float(grad[1]) == pytest.approx(p, rel=0.05)


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_logits_never_exist_whole(monkeypatch, impl):
    """The largest product has a chunk of rows, not all of them."""
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_chunk_rows", lambda vocab_size, hidden_size, dtype: 16)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_CHUNK_BYTES", 1)
    sizes, real = [], torch.mm

    def mm(a, b, **kwargs):
        out = real(a, b, **kwargs)
        sizes.append(out.shape)
        return out

    monkeypatch.setattr(torch, "mm", mm)
    hidden, weight, labels, mask = problem(129, 8, 1000, 1.0, torch.float32)
    linear_cross_entropy(hidden, weight, labels, mask, impl=impl).loss_sum.backward()
    assert max(rows for rows, columns in sizes if columns == 1000) == 16


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_without_gradients_one_product_is_enough(monkeypatch, impl):
    calls, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    hidden, weight, labels, mask = problem(129, 8, 1000, 1.0, torch.float32)
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    assert len(calls) == 1
    torch.testing.assert_close(out.loss_sum, plain(hidden, weight, labels, mask).detach())


@pytest.mark.parametrize("weights", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
def test_cpu_equals_the_definition(n, d, v, share, weights, monkeypatch):
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_chunk_rows", lambda vocab_size, hidden_size, dtype: 3)
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_VOCAB_BLOCK", 48)
    hidden, weight, labels, mask = problem(n, d, v, share, torch.float32, weights=weights)
    out = linear_cross_entropy(hidden, weight, labels, mask, impl="cpu")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = plain(*exact, labels, mask)
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(out.loss_sum * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.37, exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_objective_divides_by_the_steps_count_not_its_own():
    hidden, weight, labels, mask = problem(7, 16, 5, 0.4, torch.float64)
    out = linear_cross_entropy(hidden, weight, labels, mask)
    torch.testing.assert_close(out.objective({"supervised": 1000, "inputs": 5000}), out.loss_sum / 1000)
    assert out.metrics["loss"][0].requires_grad is False


@pytest.mark.parametrize("weights", [None, 3.0])
def test_float16_gradient_of_a_head_over_many_rows_of_one_token_stays_finite(weights):
    """Each row's share is within float16, their sum, boosted, is not: it must not depend on how rows are grouped."""
    hidden, weight = torch.full((900, 8), 3.0), torch.zeros(5, 8)
    labels = torch.zeros(900, dtype=torch.int64)
    mask = torch.ones(900, dtype=torch.bool) if weights is None else torch.full((900,), weights)
    found = {}
    for dtype in (torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight_ = weight.detach().to(wide, copy=True).requires_grad_()
        hidden_ = hidden.detach().to(wide, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            out = linear_cross_entropy(hidden_, weight_, labels, mask, impl="chunked")
        out.loss_sum.backward()
        found[dtype] = (weight_.grad, hidden_.grad)
    for low, exact in zip(found[torch.float16], found[torch.float64], strict=True):
        torch.testing.assert_close(low.double(), exact.double(), rtol=2e-3, atol=1e-6)


IMPLS = ["auto", "cpu", "chunked", "reference"]
N, D, V = 6, 5, 7


def inputs() -> dict[str, torch.Tensor]:
    hidden, weight, labels, _ = problem(N, D, V, 1.0, torch.float32)
    return {"hidden": hidden, "weight": weight, "labels": labels, "loss_mask": torch.arange(N) % 3 > 0}


def weights_of(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[1.0] * (N - len(values))])


BAD: dict[str, tuple[dict[str, torch.Tensor], type[Exception], str]] = {
    "float labels": ({"labels": torch.ones(N)}, TypeError, "labels are float32: must be integers"),
    "bool labels": ({"labels": torch.ones(N, dtype=torch.bool)}, TypeError, "labels are bool: must be integers"),
    "complex mask": ({"loss_mask": torch.ones(N, dtype=torch.complex64)}, TypeError, "loss_mask is complex64"),
    "integer hidden": ({"hidden": torch.ones(N, D, dtype=torch.int64)}, TypeError, "hidden is int64"),
    "complex weight": ({"weight": torch.ones(V, D, dtype=torch.complex64)}, TypeError, "weight is complex64"),
    "another dtype": ({"weight": torch.ones(V, D).double()}, TypeError, "hidden is float32, weight float64"),
    "a narrower dtype": ({"hidden": torch.ones(N, D).bfloat16()}, TypeError, "hidden is bfloat16, weight float32"),
    "sparse weight": ({"weight": torch.ones(V, D).to_sparse()}, TypeError, "weight is sparse_coo: must be dense"),
    "sparse mask": ({"loss_mask": torch.ones(N).to_sparse()}, TypeError, "loss_mask is sparse_coo: must be dense"),
    "too few labels": ({"labels": torch.zeros(N - 1).long()}, ValueError, r"labels has shape \[5\]: must be \[6\]"),
    "too many labels": ({"labels": torch.zeros(N + 1).long()}, ValueError, r"labels has shape \[7\]: must be \[6\]"),
    "one label": ({"labels": torch.zeros(1).long()}, ValueError, r"labels has shape \[1\]"),
    "labels of rank 2": ({"labels": torch.zeros(N, 1).long()}, ValueError, r"labels has shape \[6, 1\]"),
    "labels of rank 0": ({"labels": torch.zeros(()).long()}, ValueError, r"labels has shape \[\]"),
    "too short a mask": ({"loss_mask": torch.ones(N - 1).bool()}, ValueError, r"loss_mask has shape \[5\]"),
    "too long a mask": ({"loss_mask": torch.ones(N + 1).bool()}, ValueError, r"loss_mask has shape \[7\]"),
    "a mask of rank 2": ({"loss_mask": torch.ones(N, 1).bool()}, ValueError, r"loss_mask has shape \[6, 1\]"),
    "hidden of rank 3": ({"hidden": torch.ones(1, N, D)}, ValueError, r"hidden has shape .*must be \[N, D\]"),
    "weight of rank 1": ({"weight": torch.ones(D)}, ValueError, r"weight has shape .*must be \[V, D\]"),
    "another D": ({"weight": torch.ones(V, D + 1)}, ValueError, "D differs"),
    "no vocabulary": ({"weight": torch.ones(0, D)}, ValueError, "the vocabulary is empty"),
    "hidden on meta": ({"hidden": torch.ones(N, D, device="meta")}, ValueError, 'hidden is on "meta"'),
    "weight on meta": ({"weight": torch.ones(V, D, device="meta")}, ValueError, 'weight is on "meta"'),
    "labels on meta": ({"labels": torch.ones(N, device="meta").long()}, ValueError, "labels is on meta, hidden on cpu"),
    "mask on meta": ({"loss_mask": torch.ones(N, device="meta")}, ValueError, "loss_mask is on meta, hidden on cpu"),
    "a mask to learn": ({"loss_mask": torch.ones(N, requires_grad=True)}, ValueError, "loss_mask requires a gradient"),
    "-100": ({"labels": torch.full((N,), -100)}, IndexError, "labels from -100 to -100 .* the vocabulary has 7"),
    "-1 in uint8": ({"labels": torch.full((N,), 255).byte()}, IndexError, "labels from 255 to 255"),
    "V": ({"labels": torch.full((N,), V)}, IndexError, "labels from 7 to 7"),
    "beyond int64": ({"labels": torch.full((N,), -1).view(torch.uint64)}, IndexError, "the vocabulary has 7"),
}


@pytest.mark.parametrize("impl", [*IMPLS, "liger", "cce"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_input_is_the_same_error_for_every_implementation(bad, impl):
    changes, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**inputs(), **changes}, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
)
def test_labels_of_any_integer_dtype_are_those_of_int64(dtype, impl):
    given = inputs()
    expected = linear_cross_entropy(**given, impl=impl)
    found = linear_cross_entropy(**{**given, "labels": given["labels"].to(dtype)}, impl=impl)
    assert torch.equal(found.loss_sum, expected.loss_sum)
    ours, theirs = (torch.autograd.grad(o.loss_sum, (given["hidden"], given["weight"])) for o in (found, expected))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_a_mask_of_zeros_and_ones_of_any_dtype_is_one_of_weights(dtype, impl):
    given = inputs()
    expected = linear_cross_entropy(**given, impl=impl)
    found = linear_cross_entropy(**{**given, "loss_mask": given["loss_mask"].to(dtype)}, impl=impl)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum)
    assert float(found.num_tokens) == float(expected.num_tokens) == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_negative_weights_are_weights_and_nan_and_infinity_come_through(impl):
    given = inputs()
    for weights in (weights_of(-2.0, 0.0, 0.5), weights_of(-1.0, -1.0, 0.0)):
        out = linear_cross_entropy(**{**given, "loss_mask": weights}, impl=impl)
        expected = plain(given["hidden"], given["weight"], given["labels"], weights)
        torch.testing.assert_close(out.loss_sum, expected)
        ours, theirs = (torch.autograd.grad(x, (given["hidden"], given["weight"])) for x in (out.loss_sum, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    for bad in (math.nan, math.inf):
        out = linear_cross_entropy(**{**given, "loss_mask": weights_of(bad)}, impl=impl)
        assert not out.loss_sum.isfinite()
        assert not out.num_tokens.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_that_are_not_contiguous_are_read_as_they_are(impl):
    given = inputs()
    apart = {name: torch.stack((x.detach(), x.detach()), -1)[..., 0] for name, x in given.items()}
    turned = {name: given[name].detach().t().contiguous().t() for name in ("hidden", "weight")}
    expected = linear_cross_entropy(**given, impl=impl)
    expected_grads = torch.autograd.grad(expected.loss_sum, (given["hidden"], given["weight"]))
    for other in (apart, {**given, **turned}, {**given, "hidden": given["hidden"].detach()[:1].expand(N, D)}):
        hidden, weight = (other[name].requires_grad_() for name in ("hidden", "weight"))
        out = linear_cross_entropy(**{**other, "hidden": hidden, "weight": weight}, impl=impl)
        grads = torch.autograd.grad(out.loss_sum, (hidden, weight))
        if hidden.stride(0) != 0:
            torch.testing.assert_close(out.loss_sum, expected.loss_sum)
            for a, b in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(a, b)
        else:
            whole = linear_cross_entropy(**{**given, "hidden": hidden.detach().clone()}, impl="reference")
            torch.testing.assert_close(out.loss_sum, whole.loss_sum)


def test_an_implementation_that_there_is_not_or_not_here_is_an_error():
    with pytest.raises(ValueError, match="impl='fast': must be one of auto, cpu"):
        linear_cross_entropy(**inputs(), impl="fast")
    given = inputs()
    for dtype in (torch.float64, torch.float16):
        changes = {name: given[name].detach().to(dtype) for name in ("hidden", "weight")}
        with pytest.raises(ValueError, match="kernels are for bfloat16 and float32"):
            linear_cross_entropy(**{**given, **changes}, impl="cpu")


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_autocast_leaves_float64_alone(impl):
    hidden, weight, labels, mask = problem(9, 4, 11, 1.0, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    torch.testing.assert_close(out.loss_sum, plain(hidden, weight, labels, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes_are_the_definition_or_an_error(seed):
    """Shapes that fit give each implementation the same sum; others give each the same error."""
    generator = torch.Generator().manual_seed(seed)

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(10):
        n, d, v = size(0, 4), size(1, 4), size(1, 4)
        lengths = [n + (size(0, 6) == 0) for _ in range(2)]
        given = {
            "hidden": torch.randn(n, d + (size(0, 6) == 0), generator=generator),
            "weight": torch.randn(v, d, generator=generator),
            "labels": torch.randint(-1 if size(0, 6) == 0 else 0, v, (lengths[0],), generator=generator),
            "loss_mask": torch.rand(lengths[1], generator=generator) < 0.5,
        }
        outcomes = []
        for impl in IMPLS:
            try:
                outcomes.append(f"{float(linear_cross_entropy(**given, impl=impl).loss_sum):.4f}")
            except (ValueError, IndexError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        assert len(set(outcomes)) == 1, (outcomes, {name: x.shape for name, x in given.items()})
