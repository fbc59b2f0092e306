"""Runs of a small mixture of experts, from recipe to export."""

from __future__ import annotations

import pytest
import torch
from tiny import pertoken, rows_of, untimed

from pertoken import load_model, train
from pertoken.errors import RecipeError
from pertoken.inference.generate import generate
from pertoken.runs.data import load_data
from pertoken.runs.model import build_model
from pertoken.tracking.listener import Listener
from pertoken.training.parallel import World
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric

MOE = {"model__use_moe": True, "model__num_experts": 4, "model__moe_intermediate_size": 48}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "run"
    train(world.recipe(folder, **MOE, train__micro_batch_tokens=1500, train__learning_rate=5e-3))
    return folder


def test_the_loss_falls(run):
    rows = rows_of(run)
    assert rows[0]["loss"] - rows[-1]["loss"] > 0.5


@pytest.mark.parametrize("aux_loss", ["sequence", "none"])
def test_how_steps_are_split_changes_no_row(world, tmp_path, aux_loss):
    changes = MOE | {"model__aux_loss": aux_loss, "model__aux_loss_coef": 0.1, "model__num_experts_per_tok": 2}
    runs = []
    for budget in (100_000, 600):
        out = tmp_path / str(budget)
        train(
            world.recipe(out, **changes, train__micro_batch_tokens=budget, train__max_steps=5, train__dtype="float64")
        )
        runs.append(rows_of(out))
    for whole, split in zip(*runs, strict=True):
        assert split["micro_batches"] > whole["micro_batches"]
        for key in ("loss", "grad_norm"):
            assert split[key] == pytest.approx(whole[key], rel=1e-10)


def test_resume_is_bitwise(world, run, tmp_path):
    changes = MOE | {"train__micro_batch_tokens": 1500}
    train(world.recipe(tmp_path / "run", **changes, train__max_steps=10, train__schedule="constant"))
    train(world.recipe(tmp_path / "run", **changes, train__schedule="constant"), resume=True)
    train(world.recipe(tmp_path / "whole", **changes, train__schedule="constant"))
    whole, parts = (untimed(rows_of(tmp_path / name))[10:] for name in ("whole", "run"))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    for name, weight in load_model(tmp_path / "whole").state_dict().items():
        assert torch.equal(load_model(tmp_path / "run").state_dict()[name], weight), name


def test_generation_with_a_cache_equals_generation_without(run):
    model = load_model(run)
    with_cache, without = (list(generate(model, [3, 4, 5], max_new_tokens=12, use_cache=c)) for c in (True, False))
    assert with_cache == without
    assert len(with_cache) == 12


def test_the_rows_say_how_the_experts_are_used(run):
    for row in rows_of(run):
        assert len(row["expert_load"]) == len(row["expert_max_share"]) == 4
        assert sum(row["expert_load"]) == pytest.approx(1, abs=1e-4)
        assert row["max_expert_share"] == pytest.approx(max(row["expert_max_share"]), abs=1e-5)
        assert all(most >= mean for most, mean in zip(row["expert_max_share"], row["expert_load"], strict=True))
        assert 1.9 < row["aux_loss"] < 8  # two layers: 2 when balanced, 8 if one expert had all
    assert len({row["aux_loss"] for row in rows_of(run)}) > 1


def test_both_exports_compute_the_same(run, tmp_path):
    for format_, out in (("hf", tmp_path / "hf"), ("minimind", tmp_path / "moe.pth")):
        code, _, err = pertoken("export", run, "--format", format_, "--dtype", "float32", "--out", out)
        assert code == 0, err
        # the balance loss is not kept in a .pth, nor are the limits of the positions
        for name, weight in load_model(run).state_dict().items():
            assert torch.equal(load_model(out).state_dict()[name], weight), name


def built(recipe):
    """The model that a run of `recipe` would start from."""
    return build_model(recipe, load_data(recipe, Listener(), World()), None, Precision("float32", torch.device("cpu")))


def test_fine_tuning_may_set_the_balance_loss_of_a_loaded_model(world, run, tmp_path):
    recipe = world.recipe(tmp_path / "out", init_from=str(run), model={})
    config = built(recipe).config
    assert (config.use_moe, config.aux_loss, config.aux_loss_coef) == (True, "sequence", 5e-4)
    objective = {"aux_loss": "micro_batch", "aux_loss_coef": 0.5}
    asked = world.recipe(tmp_path / "out", init_from=str(run), model=objective, train__max_steps=2)
    config = built(asked).config
    assert (config.aux_loss, config.aux_loss_coef) == ("micro_batch", 0.5)
    with pytest.raises(RecipeError, match=r"model\.num_experts=8: the model at .* has 4; leave the key out"):
        built(world.recipe(tmp_path / "out", init_from=str(run), model={"num_experts": 8}))


def test_resume_keeps_the_balance_loss_of_the_recipe(world, run, tmp_path):
    objective = {"aux_loss": "none", "aux_loss_coef": 0.5}
    changes = {"init_from": str(run), "model": objective, "train__schedule": "constant"}
    train(world.recipe(tmp_path / "parts", **changes, train__max_steps=3))
    train(world.recipe(tmp_path / "parts", **changes, train__max_steps=6), resume=True)
    train(world.recipe(tmp_path / "whole", **changes, train__max_steps=6))
    parts, whole = (load_model(tmp_path / name).state_dict() for name in ("parts", "whole"))
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name


def test_a_dense_model_has_no_balance_loss_to_set(world, tmp_path):
    train(world.recipe(tmp_path / "dense", train__max_steps=1))
    recipe = world.recipe(tmp_path / "out", init_from=str(tmp_path / "dense"), model={"aux_loss": "none"})
    with pytest.raises(RecipeError, match=r"model\.aux_loss=none: the model at .* has no experts"):
        built(recipe)


def test_the_summary_says_how_many_parameters_are_active(world, tmp_path):
    code, out, err = pertoken("train", world.write_recipe(tmp_path / "run", **MOE, train__max_steps=1))
    assert code == 0, err
    model = load_model(tmp_path / "run")
    assert f"{model.num_parameters:,} parameters ({model.num_active_parameters:,} active for a token)" in out
