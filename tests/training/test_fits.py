"""What training takes is computed from the recipe, told before anything is loaded, and tabled in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pertoken import Recipe, train
from pertoken.errors import RecipeError
from pertoken.folders.adapters import adapt
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import Base, keep_frozen_in
from pertoken.recipe.model import ModelConfig
from pertoken.runs import setup
from pertoken.tracking.listener import Listener
from pertoken.training import memory
from pertoken.training.fits import SHAPES, fitting_table, methods_bytes
from pertoken.training.memory import training_bytes
from pertoken.training.methods import METHODS, with_method
from pertoken.training.optimizers import build_optimizer


def a_recipe(**sections: dict[str, object]) -> Recipe:
    values = {"stage": "sft", "out_dir": "run", "init_from": "model", "data": {"path": "a"}, **sections}
    return Recipe.parse(values)


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_an_estimate_are_those_of_the_parameters_that_there_are(method: str) -> None:
    """Weights, gradients and optimizer, of a dense model and of a mixture, whose experts are not adapted."""
    if method == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for more in ({}, {"use_moe": True, "num_experts": 3, "moe_intermediate_size": 80}):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = ModelConfig.model_validate({**sizes, "intermediate_size": 96, **more}).resolve(100)
        recipe = with_method(a_recipe(), method)
        model = CausalLM(config)
        if recipe.adapter.kind != "none":
            adapt(model, recipe.adapter, Base("model"), seed=0)
        if recipe.model.frozen_dtype == "bfloat16":
            keep_frozen_in(torch.bfloat16, model.layers)
        optimizer = build_optimizer(model, recipe.train)
        trained = [p for p in model.parameters() if p.requires_grad]
        state = [t for p in trained for key, t in optimizer.new_state(p).items() if key != "step"]
        needed = training_bytes(recipe, config)
        assert needed["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
        assert needed["gradients"] == 4 * sum(p.numel() for p in trained)
        found = sum(t.numel() * t.element_size() for t in state)
        assert needed["optimizer"] == found or method == "adamw8bit"
        small = sum(p.numel() for p in trained if p.numel() < 4096)  # keep float32 moments
        assert needed["optimizer"] <= found <= needed["optimizer"] + 8 * small + 16 * len(trained)


def test_a_model_that_does_not_fit_is_refused_with_a_method_that_does(monkeypatch):
    numbers = 10**9
    cases = {
        13: (a_recipe(), 'Set train.optimizer_dtype="bfloat16", which takes at least 12 GB'),
        11: (a_recipe(), 'Set train.optimizer="adamw8bit", which takes at least 10 GB'),
        5: (a_recipe(), 'Set adapter.kind="lora", which takes at least 4 GB'),
        3: (a_recipe(), 'Set adapter.kind="lora" and model.frozen_dtype="bfloat16", which takes at least 2 GB'),
        1: (a_recipe(), "Make the model smaller"),
        2: (a_recipe(adapter={"kind": "lora"}), 'Set adapter.kind="lora" and model.frozen_dtype="bfloat16"'),
    }
    for there, (recipe, remedy) in cases.items():
        monkeypatch.setattr(memory, "machine_bytes", lambda there=there: there * 10**9)
        with pytest.raises(RecipeError) as caught:
            memory.check_parameters("init_from=model", numbers, recipe, None)
        assert remedy in str(caught.value), there
        assert len(str(caught.value).splitlines()) == 1


def test_a_run_says_what_it_needs_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    told: list[str] = []

    class Ears(Listener):
        def needs(self, memory):
            told.append(memory)

    def build_model(*args, **kwargs):
        assert told
        raise RecipeError("so far")

    monkeypatch.setattr(setup, "build_model", build_model)
    with pytest.raises(RecipeError, match="so far"):
        train(world.recipe(tmp_path / "run"), listener=Ears())
    (line,) = told
    assert line.startswith("about ")
    assert all(f" {part} " in line for part in ("weights", "gradients", "optimizer", "activations"))
    assert "of this machine" in line


def test_the_table_of_the_documentation_is_the_computed_one():
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(fitting_table()) in text


def test_each_method_takes_less_than_the_one_before():
    for shape, config in SHAPES.items():
        sizes = list(methods_bytes(a_recipe(), config).values())
        assert sizes == sorted(sizes, reverse=True), shape
