"""Recipes of earlier versions are read, and the user is told what their keys are called now."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import pertoken

from pertoken import Recipe
from pertoken.errors import RecipeError
from pertoken.recipe.old_keys import without_old_keys

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run"


@pytest.mark.parametrize(
    ("old", "device", "cuda", "engine"),
    [
        ("off", "cuda", True, "plain"),
        ("auto", "cuda", True, "auto"),
        ("on", "cpu", True, "cpu"),
        ("on", "cuda", True, "compile"),
        ("on", "cuda:1", True, "compile"),
        ("on", "auto", True, "compile"),
        ("on", "auto", False, "cpu"),
    ],
)
def test_train_compile_is_read_as_the_engine_that_it_meant(old, device, cuda, engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    values = {"train": {"compile": old, "device": device, "seed": 7}}
    found, remarks = without_old_keys(values)
    assert found == {"train": {"engine": engine, "device": device, "seed": 7}}
    assert remarks == (f'train.compile="{old}" is train.engine="{engine}" now; write that',)
    assert values["train"]["compile"] == old, "what was given is left as it was"


def test_a_recipe_of_today_is_left_alone(world, tmp_path):
    recipe = world.recipe(tmp_path / "run", train__engine="plain")
    assert recipe.remarks == ()
    assert tomllib.loads(recipe.to_toml())["train"]["engine"] == "plain"


def test_both_keys_are_an_error(world, tmp_path):
    with pytest.raises(RecipeError, match=r"^train\.compile=.*train\.engine, which is given too; leave .* out$"):
        world.recipe(tmp_path / "run", train__compile="off", train__engine="plain")


@pytest.mark.parametrize("value", [True, "fast", ["on"]])
def test_an_old_key_with_a_value_that_it_never_had_is_an_error(world, tmp_path, value):
    with pytest.raises(RecipeError, match=r'^train\.compile=.*must be "auto", "on" or "off"'):
        world.recipe(tmp_path / "run", train__compile=value)


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_file_with_an_old_key_runs_and_one_line_is_said(world, tmp_path, command):
    path = world.write_recipe(tmp_path / "run", train__max_steps=1, data__eval_path=[])
    path.write_text(path.read_text().replace('engine = "auto"', 'compile = "off"'))
    code, out, err = pertoken(command, path)
    assert code == 0, err
    assert (out + err).count('train.compile="off" is train.engine="plain" now; write that') == 1


def test_an_override_with_an_old_key_runs_and_is_kept_under_the_new_one(world, tmp_path):
    path = world.write_recipe(tmp_path / "run", train__max_steps=1, data__eval_path=[])
    path.write_text(path.read_text().replace('engine = "auto"\n', ""))
    code, out, err = pertoken("train", path, "train.compile=off")
    assert code == 0, err
    assert 'train.compile="off"' in out + err
    kept = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert kept["train"]["engine"] == "plain"
    assert "compile" not in kept["train"]


@pytest.mark.parametrize("engine", [None, "plain"])
def test_a_run_saved_with_the_old_key_resumes_with_either(tmp_path, engine):
    out = Path(shutil.copytree(OLD_RUN, tmp_path / "run", symlinks=True))
    text = (out / "recipe.toml").read_text()
    assert 'compile = "auto"' in text
    if engine is not None:
        (out / "recipe.toml").write_text(text.replace('compile = "auto"', f'engine = "{engine}"'))
    overrides = [f"out_dir={out}", f"data.path={out / 'chats.jsonl'}", f"data.tokenizer={out / 'tokenizer'}"]
    code, _, err = pertoken("train", out / "recipe.toml", *overrides, f"data.store={tmp_path / 'store'}", "--resume")
    assert code == 0, err
    assert Recipe.load(out / "recipe.toml").remarks == (), "written anew, with the key of today"
