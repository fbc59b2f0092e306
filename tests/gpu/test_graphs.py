"""Passes that are recorded as CUDA graphs: the same steps, fewer launches, one wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_runs import SIZES, assert_close, rows
from gpu_steps import share, state_of, waits_of

from pertoken.engines.cuda_graphs import graphs_for
from pertoken.engines.torch_compile import CompileEngine
from pertoken.model.execution import PLAIN, Execution
from pertoken.objective.choose import objective_of
from pertoken.recipe.train import TrainConfig
from pertoken.training.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = {
    "dense": {},
    "windows": {"family": "mistral", "sliding_window": 16},
    "capped logits": {"family": "gemma3", "sliding_window": 16, "final_logit_softcapping": 7.0},
    "untied": {"tie_word_embeddings": False},
    "LoRA": {"lora": True},
}


def with_graphs(state):
    state.graphs = graphs_for(
        state.model, state.objective, state.precision.device, state.execution, state.precision.autocast
    )
    return state


@pytest.mark.parametrize("engine", ["plain", "compile"])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_steps_that_are_launched(kind, engine):
    execution = Execution(CompileEngine()) if engine == "compile" else PLAIN
    plain, graphs = (state_of(execution=execution, **KINDS[kind]) for _ in range(2))
    with_graphs(graphs)
    for seed in (0, 1, 0, 1, 0, 1):
        a, b = (train_step(s, share(micro_batches=2, seed=seed), lr=1e-3, max_norm=1.0) for s in (plain, graphs))
        assert b.num_tokens == a.num_tokens
        assert b.loss_sum == pytest.approx(a.loss_sum, rel=3e-3)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=3e-2)
    assert sum(r is not None for r in graphs.graphs._recorded.values()) >= 1


def test_z_loss_is_replayed_too():
    objective = objective_of(TrainConfig(z_loss_coef=1e-2))
    plain, graphs = (replace(state_of(), objective=objective) for _ in range(2))
    with_graphs(graphs)
    for _ in range(4):
        a, b = (train_step(s, share(weights=True), lr=1e-3, max_norm=1.0) for s in (plain, graphs))
        assert float(b.sums["z_loss"][0]) == pytest.approx(float(a.sums["z_loss"][0]), rel=3e-3)


def test_the_host_waits_once_a_replayed_step():
    state = with_graphs(state_of())
    assert waits_of(state, [share(micro_batches=2) for _ in range(5)])[3:] == [1, 1]


def test_a_run_with_graphs_is_a_run_without(world, tmp_path):
    keys = {"train__device": "cuda", "train__dtype": "bfloat16", "train__max_steps": 16}
    without = rows(world, tmp_path, "without", train__cuda_graphs=False, **keys)
    graphs = rows(world, tmp_path, "graphs", train__cuda_graphs=True, **keys)
    assert_close(graphs, without, 1e-2, figures=("loss",))
    assert SIZES["model__head_dim"] == 64
