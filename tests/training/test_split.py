"""The promise: how a step is split into micro-batches changes neither loss nor gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import World, pertoken, rows_of

from pertoken import load_model
from pertoken.data.batch.order import step_at
from pertoken.data.batch.pack import collate, pack_micro_batches
from pertoken.data.batch.share import Share, denominators_of
from pertoken.runs.data import prepare
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

BUDGETS = {100_000: (1, 1), 1500: (3, 7), 600: (8, 16)}  # tokens per micro-batch -> fewest and most micro-batches


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One recipe, trained through the command line with each budget."""
    folder = tmp_path_factory.mktemp("split")
    recipe = world.write_recipe(folder / "recipe")
    found = {}
    for budget in BUDGETS:
        out = found[budget] = folder / str(budget)
        code, _, err = pertoken("train", recipe, f"out_dir={out}", f"train.micro_batch_tokens={budget}")
        assert code == 0, err
    return found


def test_the_budgets_really_split_the_step(runs):
    for budget, (fewest, most) in BUDGETS.items():
        counts = [row["micro_batches"] for row in rows_of(runs[budget])[:6]]  # the seventh ends the epoch
        assert min(counts) >= fewest, (budget, counts)
        assert max(counts) <= most, (budget, counts)


def test_the_supervised_share_is_skewed(world, tmp_path):
    store, _ = prepare(world.recipe(tmp_path))
    share = store.num_tokens / store.lengths
    assert share.min() < 0.015
    assert share.max() > 0.85


@pytest.mark.parametrize("budget", list(BUDGETS)[1:])
def test_loss_and_gradient_norm_agree_at_every_step(runs, budget):
    whole, split = rows_of(runs[100_000]), rows_of(runs[budget])
    assert len(whole) == len(split) == 20
    for a, b in zip(whole, split, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert (a["num_tokens"], a["positions"]) == (b["num_tokens"], b["positions"])


@pytest.mark.parametrize("budget", list(BUDGETS)[1:])
def test_final_weights_agree(runs, budget):
    whole, split = (
        load_file(runs[b] / "checkpoints" / "step-00000020" / "model.safetensors") for b in (100_000, budget)
    )
    for name, weight in whole.items():
        assert (split[name] - weight).norm() <= 3e-5 * weight.norm(), name


def gradients(world: World, run: Path, budget: int) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """In float64, of the trained model on the first step's samples in micro-batches of `budget` tokens; besides, the
    micro-batches' own mean losses and counts."""
    store, _ = prepare(world.recipe(run))
    model = load_model(run, dtype=torch.float64)
    precision = Precision("float64", torch.device("cpu"))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0), precision.new_scaler(), precision)
    ids = step_at(1, num_samples=len(store), batch_size=16, seed=42).sample_ids
    cut = pack_micro_batches(store.lengths[ids].tolist(), world_size=1, token_budget=budget)[0]
    micro_batches = [collate([store[int(i)] for i in ids[c]]) for c in cut]
    kept: dict[str, torch.Tensor] = {}

    def keep() -> None:
        kept.update({n: p.grad.clone() for n, p in model.named_parameters()})

    train_step(
        state,
        Share(tuple(micro_batches), (), denominators_of(store, ids)),
        lr=0.0,
        max_norm=0.0,
        on_gradients=keep,
    )
    with torch.no_grad():
        outs = [model(m) for m in micro_batches]
    return kept, [float(o.loss_sum / o.num_tokens) for o in outs], [float(o.num_tokens) for o in outs]


def test_gradients_agree_in_float64(world, runs):
    whole, _, _ = gradients(world, runs[600], 100_000)
    for budget in (1500, 600, 1):
        split, _, _ = gradients(world, runs[600], budget)
        for name, grad in whole.items():
            assert (split[name] - grad).abs().max() <= 1e-10 * grad.abs().max(), (budget, name)


def test_a_mean_of_micro_batch_means_would_be_another_loss(world, runs):
    _, means, counts = gradients(world, runs[600], 600)
    ours = np.average(means, weights=counts)
    assert abs(np.mean(means) - ours) > 1e-2


def test_every_sample_is_trained_on_once_an_epoch_and_the_last_step_is_smaller(runs):
    rows = rows_of(runs[600])
    first_epoch = [row for row in rows if row["epoch"] == 1]
    assert [row["samples"] for row in first_epoch] == [16] * 6 + [5]
    assert first_epoch[-1]["positions"][1] == 101
