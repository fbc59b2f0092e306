"""The learning rate of every step, and who decays."""

from __future__ import annotations

import math

import pytest
import torch

from pertoken.config import ModelConfig
from pertoken.model.transformer import CausalLM
from pertoken.training.optim import build_adamw, lr_at


def rates(total: int, **kwargs) -> list[float]:
    kwargs = {"peak": 2.0, "warmup_steps": 0, **kwargs}
    return [lr_at(step, total_steps=total, **kwargs) for step in range(1, total + 1)]


def test_cosine_without_warm_up_is_minimind_s_formula():
    expected = [2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 50))) for step in range(1, 51)]
    assert rates(50) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(schedule):
    assert rates(50, warmup_steps=10, schedule=schedule)[:10] == pytest.approx([0.2 * s for s in range(1, 11)])


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.2), ("linear", 0.2), ("constant", 2.0), ("wsd", 0.2)])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_where_each_schedule_ends(schedule, end, warmup_steps):
    assert rates(50, warmup_steps=warmup_steps, schedule=schedule)[-1] == pytest.approx(end)


def test_linear_and_wsd_by_hand():
    assert rates(4, schedule="linear", min_lr_ratio=0.0) == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert rates(10, schedule="wsd", min_lr_ratio=0.0, decay_ratio=0.4) == pytest.approx(
        [2.0] * 6 + [1.5, 1.0, 0.5, 0.0]
    )


def test_a_run_longer_than_planned_stays_at_the_end():
    assert lr_at(80, peak=2.0, warmup_steps=0, total_steps=50) == pytest.approx(0.2)


def test_matrices_decay_and_norms_do_not():
    config = ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).resolve(11)
    model = CausalLM(config)
    optimizer = build_adamw(model, weight_decay=0.5, betas=(0.9, 0.95))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.5 if parameter.ndim == 2 else 0.0), name
    assert isinstance(optimizer, torch.optim.AdamW)
