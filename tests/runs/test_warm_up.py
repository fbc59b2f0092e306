"""The passes before the first step leave nothing behind, and every start makes the same ones."""

from __future__ import annotations

import math

import pytest
import torch

from pertoken import train
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.model.decoder import CausalLM
from pertoken.runs import assemble, warm_up
from pertoken.runs.data import prepare
from pertoken.runs.warm_up import first_samples, seconds_per_token, warm_up_ddp
from pertoken.training.optimizers import build_optimizer
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState


@pytest.fixture
def state(world, tmp_path) -> TrainState:
    recipe, precision = world.recipe(tmp_path / "run"), Precision("float32", torch.device("cpu"))
    model = CausalLM(recipe.model.resolve(len(load_tokenizer(world.folder / "tokenizer"))), seed=1)
    return TrainState(model, build_optimizer(model, recipe.train), precision.new_scaler(), precision)


def test_weights_stay_and_no_gradient_is_left(world, tmp_path, state):
    store, _ = prepare(world.recipe(tmp_path / "run"))
    micro_batch = first_samples(state, store, torch.arange(len(store)).numpy())
    assert 0 < len(micro_batch.input_ids) <= 1024
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    assert warm_up_ddp(state, micro_batch)
    assert seconds_per_token(state, micro_batch) > 0
    for name, parameter in state.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_where_memory_ends_nobody_knows_how_long_and_no_gradient_is_left(world, tmp_path, state, monkeypatch):
    store, _ = prepare(world.recipe(tmp_path / "run"))
    micro_batch = first_samples(state, store, torch.arange(4).numpy())

    def ends(*args: object, **settings: object) -> None:
        parameter = next(state.model.parameters())
        parameter.grad = torch.zeros_like(parameter)
        raise MemoryError

    monkeypatch.setattr(state.model, "forward", ends)
    assert not warm_up_ddp(state, micro_batch)
    assert math.isnan(seconds_per_token(state, micro_batch))
    assert all(p.grad is None for p in state.model.parameters())


def test_a_start_and_a_resume_make_the_same_two_passes_before_their_first_step(world, tmp_path, monkeypatch):
    real, passes = warm_up._passed, []
    monkeypatch.setattr(
        warm_up, "_passed", lambda state, batch: passes.append(len(batch.input_ids)) or real(state, batch)
    )
    settings = {"train__batch_size": 4, "data__eval_path": []}
    train(world.recipe(tmp_path / "run", **settings, train__max_steps=2))
    assert len(passes) == 2
    train(world.recipe(tmp_path / "run", **settings, train__max_steps=3), resume=True)
    assert len(passes) == 4
    assert passes[0] == passes[1]
    assert passes[2] == passes[3]


def test_setup_calls_the_warm_up_by_its_name_before_it_measures(world, tmp_path, monkeypatch):
    order: list[str] = []
    for name in ("warm_up_ddp", "seconds_per_token", "summarize"):
        real = getattr(assemble, name)
        monkeypatch.setattr(assemble, name, lambda *a, _n=name, _r=real, **k: order.append(_n) or _r(*a, **k))
    train(world.recipe(tmp_path / "run", train__max_steps=1, data__eval_path=[]))
    assert order == ["warm_up_ddp", "seconds_per_token", "summarize"]
