"""A model in GGUF through the commands: looked at, trained, evaluated, talked to, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import byte_level_tokenizer, tokenizer_keys, write_gguf
from tiny import MODEL, World, pertoken, rows_of

from pertoken import load_model, load_tokenizer
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

TEXT = "What is 12 and  345?\n\tred"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with SmolLM's kind of tokenizer."""
    tokenizer = byte_level_tokenizer()
    config = ModelConfig(family="llama", **{**MODEL, "rms_norm_eps": 2.0**-20, "rope_theta": 10000.0})
    model = CausalLM(config.resolve(tokenizer.get_vocab_size()), seed=3).requires_grad_(False)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, model, "llama", more=tokenizer_keys(tokenizer), quantized="Q8_0")


def recipe_from(world: World, out: Path, gguf: Path, **changes: Any) -> Path:
    keys = {"init_from": str(gguf), "model": {}, "data__tokenizer": None, "train__max_steps": 3} | changes
    return world.write_recipe(out, **keys)


def test_a_run_that_starts_from_it_is_a_folder_that_transformers_opens(world, gguf, tmp_path):
    import transformers

    recipe = recipe_from(world, tmp_path / "run", gguf)
    assert pertoken("train", recipe)[0] == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(gguf)
    assert tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert tokenizer.chat_template == ours.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained, ids = load_model(folder), torch.tensor(tokenizer.encode(TEXT))
    with torch.no_grad():
        theirs = model(ids[None]).logits[0, -1]
        assert (trained.decode(ids, trained.new_cache(len(ids))) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_it_trains_as_the_folder_that_it_is_exported_to(world, gguf, tmp_path):
    code, out, err = pertoken("export", gguf, "--out", tmp_path / "hf")
    assert (code, err) == (0, ""), out
    for name, model in (("file", gguf), ("folder", tmp_path / "hf")):
        code, _, err = pertoken("train", recipe_from(world, tmp_path / name, model))
        assert code == 0, err
    file, folder = (rows_of(tmp_path / name) for name in ("file", "folder"))
    assert [(row["loss"], row["grad_norm"]) for row in file] == [(row["loss"], row["grad_norm"]) for row in folder]
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert pertoken("export", gguf, "--out", tmp_path / "bf16", "--dtype", "bfloat16")[0] == 0


def test_every_command_that_takes_a_model_takes_it(world, gguf, tmp_path):
    code, out, err = pertoken("eval", gguf, world.folder / "held-out.jsonl")
    assert (code, err) == (0, ""), out
    code, out, err = pertoken("chat", gguf, "--max-new-tokens", "3", stdin="red cat\n")
    assert code == 0, err
    code, out, err = pertoken("generate", gguf, "--prompt", "red", "--max-new-tokens", "3")
    assert code == 0, err
    code, out, err = pertoken("audit", recipe_from(world, tmp_path / "run", gguf))
    assert code == 0, err
    assert "of the work on padding" in out
    assert "memory: about" in out
    with_its_tokenizer = world.write_recipe(tmp_path / "scratch", data__tokenizer=str(gguf), train__max_steps=1)
    assert pertoken("train", with_its_tokenizer)[0] == 0


def test_an_adapter_needs_the_folder_and_says_how_to_make_it(world, gguf, tmp_path):
    recipe = recipe_from(world, tmp_path / "run", gguf)
    code, _, err = pertoken("train", recipe, "adapter.kind=lora")
    assert code == 2
    assert "make one of it first (pertoken export)" in err


def test_what_is_wrong_with_the_file_is_one_line(world, gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-4096])
    code, _, err = pertoken("train", recipe_from(world, tmp_path / "run", cut))
    assert code == 2
    assert err.strip().count("\n") == 0
    assert "ends before" in err
    assert not (tmp_path / "run").exists()
