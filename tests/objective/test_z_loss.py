"""The z-loss, and terms of the head in general: against plain PyTorch in float64, in every implementation."""

from __future__ import annotations

import pytest
import torch
from loss_cases import problem
from tiny import rows_of

import pertoken.objective.cross_entropy
from pertoken import linear_cross_entropy, train
from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import share_of_all
from pertoken.errors import RecipeError
from pertoken.model.decoder import CausalLM
from pertoken.objective.choose import ROW_TERMS, objective_of
from pertoken.objective.row_terms import RowTerm
from pertoken.objective.terms import CROSS_ENTROPY, Objective
from pertoken.objective.z_loss import z_loss
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

SIZES = [(1, 1, 2), (7, 16, 5), (128, 32, 257), (129, 3, 1000)]  # N, D, V
COEFFICIENT = 0.03
Z_LOSS = RowTerm("z_loss", z_loss, COEFFICIENT)


def plain(hidden, weight, labels, mask):
    """The cross entropy and the z-loss by their definition: (nll sum, sum of log(Z)^2)."""
    logits = hidden @ weight.T
    log_z = torch.logsumexp(logits, 1)
    nll = log_z - logits[torch.arange(len(labels)), labels]
    return (nll * mask).sum(), (log_z**2 * mask).sum()


def exact(hidden, weight, labels, mask, count):
    """(objective, gradients) of the same numbers in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll_sum, z_sum = plain(*leaves, labels, mask)
    objective = (nll_sum + COEFFICIENT * z_sum) / count
    return objective.detach(), torch.autograd.grad(objective, leaves)


@pytest.mark.parametrize("weights", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_sums_and_gradients_equal_plain_pytorch_in_float64(impl, n, d, v, weights, monkeypatch):
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_MIN_CHUNK_ROWS", 3)  # several chunks, the last one short
    monkeypatch.setattr(pertoken.objective.cross_entropy, "_CHUNK_BYTES", 1)
    hidden, weight, labels, mask = problem(n, d, v, 0.7, torch.float64, weights=weights)
    mask[0] = True
    out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=[Z_LOSS])
    nll_sum, z_sum = plain(hidden, weight, labels, mask)
    torch.testing.assert_close(out.loss_sum, nll_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.terms["z_loss"].sum, z_sum, rtol=1e-12, atol=1e-12)
    assert out.metrics["z_loss"] == (out.terms["z_loss"].sum.detach(), out.num_tokens)
    objective, gradients = exact(hidden, weight, labels, mask, 11.0)
    found = out.objective({"supervised": 11.0})
    torch.testing.assert_close(found.detach(), objective, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


def errors(impl: str, dtype: torch.dtype, *, weights: bool) -> list[float]:
    """Relative, of the objective and both gradients, against float64."""
    hidden, weight, labels, mask = problem(513, 64, 777, 0.4, torch.float32, weights=weights)
    with torch.no_grad():
        weight.mul_(0.1)
    count = float(mask.sum())
    objective, gradients = exact(hidden, weight, labels, mask, count)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=[Z_LOSS])
    found = out.objective({"supervised": count})
    ours = torch.autograd.grad(found * 0.37, (hidden, weight))
    relative = [float((found.detach() - objective).abs() / objective)]
    return relative + [float((g - 0.37 * e).norm() / (0.37 * e).norm()) for g, e in zip(ours, gradients, strict=True)]


@pytest.mark.parametrize("weights", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("auto", torch.float32),
        ("chunked", torch.float32),
        ("auto", torch.bfloat16),
        ("chunked", torch.bfloat16),
        ("chunked", torch.float16),
    ],
)
def test_it_errs_no_more_than_the_reference_does_at_the_same_precision(impl, dtype, weights):
    reference = errors("reference", dtype, weights=weights)
    for ours, theirs in zip(errors(impl, dtype, weights=weights), reference, strict=True):
        assert ours <= 1.5 * theirs + 1e-6


def test_float16_gradient_of_a_head_over_many_rows_stays_finite():
    """log Z is 1,205 in each, so that softmax has 73 times its weight in the gradient."""
    hidden, weight = torch.full((900, 8), 3.0), torch.full((5, 8), 50.0)
    labels, mask = torch.zeros(900, dtype=torch.int64), torch.ones(900, dtype=torch.bool)
    _, gradients = exact(hidden, weight, labels, mask, 900.0)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl="chunked", row_terms=[Z_LOSS])
    for low, right in zip(
        torch.autograd.grad(out.objective({"supervised": 900.0}), (hidden, weight)), gradients, strict=True
    ):
        torch.testing.assert_close(low.double(), right, rtol=2e-3, atol=1e-6)


def test_any_function_of_nll_and_log_z_is_a_term():
    hidden, weight, labels, mask = problem(128, 32, 257, 0.7, torch.float64, weights=True)
    terms = [Z_LOSS, RowTerm("mixed", lambda nll, log_z: nll.square() * log_z + nll.tanh(), -0.2)]
    found = {}
    for impl in ("chunked", "reference"):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=terms)
        assert list(out.terms) == ["loss", "z_loss", "mixed"]
        found[impl] = torch.autograd.grad(out.objective({"supervised": 7.0}), (hidden, weight))
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


def test_a_function_that_gives_no_value_a_row_is_an_error():
    hidden, weight, labels, mask = problem(7, 16, 5, 1.0, torch.float32)
    for impl in ("auto", "chunked", "reference"):
        with pytest.raises(ValueError, match=r"mean: gave \[\] for 7 rows: must be \[7\]"):
            linear_cross_entropy(
                *(hidden, weight, labels, mask), impl=impl, row_terms=[RowTerm("mean", lambda nll, _: nll.mean(), 1.0)]
            )


def test_one_gradient_of_all_terms_is_given_to_no_other_combination():
    hidden, weight, labels, mask = problem(7, 16, 5, 1.0, torch.float32)
    for impl in ("auto", "chunked"):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=[Z_LOSS])
        for other in (out.loss_sum, out.terms["z_loss"].sum, out.loss_sum + 0.06 * out.terms["z_loss"].sum):
            with pytest.raises(RuntimeError, match=r"go backward through LossOutput\.objective"):
                other.backward(retain_graph=True)


@pytest.mark.parametrize("impl", ["liger", "cce"])
def test_kernels_of_others_refuse_it_by_name(impl, world, tmp_path, monkeypatch):
    hidden, weight, labels, mask = problem(7, 16, 5, 1.0, torch.float32)
    message = f'train.z_loss_coef=0.03: train.loss_impl="{impl}" computes the cross entropy alone'
    with pytest.raises(RecipeError, match=message):
        linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=[Z_LOSS])
    monkeypatch.setattr("pertoken.runs.model.require_head", lambda *args: None)  # as where it is installed
    with pytest.raises(RecipeError, match=message):
        train(world.recipe(tmp_path / "run", train__loss_impl=impl, train__z_loss_coef=0.03))


def test_every_row_term_has_its_recipe_key_and_is_off_by_default():
    assert {f"{name}_coef" for name in ROW_TERMS} <= set(TrainConfig.model_fields)
    assert objective_of(TrainConfig()) == CROSS_ENTROPY
    assert objective_of(TrainConfig(z_loss_coef=1e-4)) == Objective((RowTerm("z_loss", z_loss, 1e-4),))


MODELS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "experts": {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def step_of(model: CausalLM, cuts: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean of log(Z)^2, and the gradients, of a step in float64 that is cut like this."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (5, 30, 11, 2, 23, 17):
        tokens = torch.randint(61, (length + 1,), generator=generator).numpy()
        samples.append(Sample(tokens, (torch.rand(length, generator=generator) < 0.5).numpy()))
    precision = Precision("float64", torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = TrainState(model, optimizer, precision.new_scaler(), precision, objective=Objective((Z_LOSS,)))
    kept: dict[str, torch.Tensor] = {}
    metrics = train_step(
        state,
        share_of_all([collate([samples[i] for i in cut]) for cut in cuts]),
        lr=0.0,
        max_norm=0.0,
        on_gradients=lambda: kept.update({n: p.grad.clone() for n, p in model.named_parameters()}),
    )
    total, count = metrics.sums["z_loss"]
    return float(total) / count, kept


@pytest.mark.parametrize("kind", MODELS)
def test_how_a_step_is_split_changes_neither_the_figure_nor_a_gradient(kind):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = CausalLM(ModelConfig(**shape, **MODELS[kind]).resolve(61), dtype=torch.float64)
    whole = step_of(model, [[0, 1, 2, 3, 4, 5]])
    for cuts in ([[0], [1], [2], [3], [4], [5]], [[4, 0], [], [3, 1, 2, 5]]):
        figure, gradients = step_of(model, cuts)
        assert figure == pytest.approx(whole[0], rel=1e-12)
        for name, gradient in whole[1].items():
            assert (gradients[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def test_rows_report_it_and_it_is_neither_in_the_loss_nor_in_the_evaluation(world, tmp_path):
    runs = {}
    for coefficient in (0.0, 0.5):
        runs[coefficient] = world.recipe(
            tmp_path / str(coefficient), train__z_loss_coef=coefficient, train__max_steps=2, train__eval_interval=1
        )
        train(runs[coefficient])
    without, with_it = (rows_of(tmp_path / str(coefficient)) for coefficient in runs)
    assert "z_loss" not in without[0]
    assert with_it[0]["loss"] == without[0]["loss"]
    assert with_it[0]["grad_norm"] != without[0]["grad_norm"]
    assert with_it[1]["z_loss"] < with_it[0]["z_loss"]
    # An evaluation with the z-loss in it would be higher by half of log(Z)^2.
    assert abs(with_it[0]["eval_loss"] - without[0]["eval_loss"]) < 0.05 * with_it[0]["z_loss"]


def test_a_resume_under_another_coefficient_is_refused(world, tmp_path):
    train(world.recipe(tmp_path / "run", train__max_steps=1))
    with pytest.raises(RecipeError, match=r"train\.z_loss_coef=0\.1: was 0\.0"):
        train(world.recipe(tmp_path / "run", train__max_steps=2, train__z_loss_coef=0.1), resume=True)
