"""Every name that a recipe may give is at home where its line says, under this name."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch

from pertoken import Recipe
from pertoken.engines.choice import Choice
from pertoken.errors import RecipeError
from pertoken.model.decoder import CausalLM
from pertoken.recipe.homes import ENGINES, OPTIMIZER_KEYS, OPTIMIZERS, TRACKERS, at_home
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.tracking.trackers.tracker import TrackerKind
from pertoken.training.optimizers import OptimizerKind, build_optimizer

BASE = {"stage": "sft", "out_dir": "x", "data": {"path": "p", "tokenizer": "t"}}
OTHER_VALUES = {"betas": [0.5, 0.5], "muon_learning_rate": 0.5, "optimizer_dtype": "bfloat16"}


def small_model() -> CausalLM:
    config = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).resolve(11)
    return CausalLM(config, dtype=torch.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_at_home_and_keeps_the_state_that_it_announces(name: str) -> None:
    kind = at_home(OPTIMIZERS[name].home)
    assert isinstance(kind, OptimizerKind)
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert kind.name == name
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, learning_rate=1e-3, dtype="float32"))
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        announced, kept = optimizer.new_state(parameter), optimizer.state[parameter]
        assert {k: v.shape for k, v in announced.items()} == {k: v.shape for k, v in kept.items()}, key
        numbers = sum(value.numel() for value in kept.values())
        assert numbers >= kind.state_numbers * parameter.numel(), key


@pytest.mark.parametrize("name", TRACKERS)
def test_each_tracker_is_at_home(name: str) -> None:
    kind = at_home(TRACKERS[name])
    assert isinstance(kind, TrackerKind)
    assert kind.name == name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("name", ENGINES)
def test_each_engine_is_at_home_and_has_its_name_in_the_summary(name: str) -> None:
    choice = at_home(ENGINES[name])(small_model(), "float32", torch.device("cpu"))
    assert isinstance(choice, Choice)
    assert choice.engine == name


@pytest.mark.parametrize(("name", "key"), list(product(OPTIMIZERS, OPTIMIZER_KEYS)))
def test_a_key_that_an_optimizer_does_not_read_is_refused_by_name(name: str, key: str) -> None:
    values = {**BASE, "train": {"optimizer": name, key: OTHER_VALUES[key]}}
    if key in OPTIMIZERS[name].reads:
        Recipe.parse(values)
        return
    with pytest.raises(RecipeError, match=rf'train\.{key}=.*: train\.optimizer="{name}" does not use it; set train'):
        Recipe.parse(values)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fsdp_takes_only_optimizers_that_can_be_sharded(name: str) -> None:
    values = {**BASE, "train": {"optimizer": name, "parallel": "fsdp"}}
    if OPTIMIZERS[name].can_shard:
        Recipe.parse(values)
        return
    with pytest.raises(RecipeError, match=rf'train\.optimizer="{name}": .*; set train\.parallel="ddp"'):
        Recipe.parse(values)


def test_a_recipe_is_read_without_what_it_names() -> None:
    code = f"import sys\nfrom pertoken import Recipe\nRecipe.parse({BASE!r})\n"
    code += "print([m for m in sys.modules if m == 'torch' or m.startswith(('pertoken.training', 'pertoken.engines'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
