"""Adafactor: torch's to the bit, by its formulas, and the same however a step is split."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import pertoken, rows_of
from torch import Tensor

from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers import Optimizer, build_optimizer
from pertoken.training.schedule import set_lr

pytestmark = pytest.mark.numeric

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24).resolve(11)
RATES = (0.02, 0.9, 0.01, 0.03)  # the second above 1 / sqrt(2)
DECAY = 0.3


def small(dtype: torch.dtype) -> tuple[CausalLM, Optimizer]:
    model = CausalLM(CONFIG, seed=1, dtype=dtype)
    train = TrainConfig(optimizer="adafactor", learning_rate=1.0, weight_decay=DECAY)
    return model, build_optimizer(model, train)


def gradients_of(model: CausalLM, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


def take_steps(model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    for seed, lr in enumerate(RATES):
        for name, gradient in gradients_of(model, seed).items():
            model.get_parameter(name).grad = gradient
        set_lr(optimizer, lr)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_to_the_bit_and_only_matrices_decay(dtype: torch.dtype) -> None:
    model, optimizer = small(dtype)
    take_steps(model, optimizer)
    theirs, _ = small(dtype)
    parts = ([p for p in theirs.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (DECAY, 0.0), strict=True)]
    take_steps(theirs, torch.optim.Adafactor(groups, lr=0.0))
    for (name, a), b in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_its_updates_are_the_formulas_of_its_docstring() -> None:
    model, optimizer = small(torch.float64)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for t, lr in enumerate(RATES, start=1):
        beta = t**-0.8
        for name, g in gradients_of(model, t - 1).items():
            w, squares = weights[name], g**2
            if g.ndim == 2:
                rows[name] = (1 - beta) * rows.get(name, 0.0) + beta * squares.mean(1, keepdim=True)
                columns[name] = (1 - beta) * columns.get(name, 0.0) + beta * squares.mean(0, keepdim=True)
                size = (rows[name] * columns[name] / rows[name].mean()).sqrt()
            else:
                rows[name] = (1 - beta) * rows.get(name, 0.0) + beta * squares
                size = rows[name].sqrt()
            u = g / size
            rate = min(lr, t**-0.5) * max(1e-3, rms(w)) / max(1.0, rms(u))
            weights[name] = w * (1 - lr * (DECAY if g.ndim == 2 else 0.0)) - rate * u
    take_steps(model, optimizer)
    for name, parameter in model.named_parameters():
        assert (parameter - weights[name]).norm() < 1e-10 * weights[name].norm(), name


def test_a_split_of_the_step_changes_nothing(world, tmp_path) -> None:
    ends = []
    for budget in (1, 8192):
        run = tmp_path / f"run{budget}"
        recipe = world.write_recipe(
            run,
            train__optimizer="adafactor",
            train__learning_rate=0.01,
            train__dtype="float64",
            train__engine="plain",
            train__max_steps=4,
            train__micro_batch_tokens=budget,
            train__grad_clip=0.5,
        )
        code, _, err = pertoken("train", recipe)
        assert code == 0, err
        ends.append((rows_of(run), load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")))
    (rows, weights), (other_rows, other_weights) = ends
    for row, other in zip(rows, other_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-7)
    for name, weight in weights.items():
        assert (weight - other_weights[name]).norm() < 1e-7 * weight.norm(), name
