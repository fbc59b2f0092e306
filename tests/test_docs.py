"""The examples of docs/ run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.families import FAMILIES, Family
from pertoken.folders.config import NotCovered, config_from_hf
from pertoken.folders.weights import load_folder, save_folder
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric

EXTENDING = Path(__file__).parents[1] / "docs" / "extending.md"


def section(title: str) -> str:
    text = EXTENDING.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def run_block(title: str) -> dict[str, Any]:
    (block,) = re.findall(r"^```python$(.*?)^```$", section(title), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, str(EXTENDING), "exec"), names)
    return names


def test_sections_are_short():
    assert len(section("A family").splitlines()) < 60


def test_the_family_of_the_documentation_computes_what_transformers_does(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, MistralConfig

    family = run_block("A family")["MISTRAL"]
    assert isinstance(family, Family)
    assert family.model_type not in FAMILIES, "then the documentation needs another example"
    monkeypatch.setitem(FAMILIES, family.model_type, family)

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": False, "max_position_embeddings": 256}
    ours = CausalLM(ModelConfig.model_validate({"family": "mistral", **sizes}).resolve(61), seed=1)
    save_folder(ours, tmp_path, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "MistralForCausalLM"
    ids = torch.arange(50) % 61
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0, -1]
        found = load_folder(tmp_path).decode(ids, ours.new_cache(50))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5

    assert config_from_hf(MistralConfig(**sizes, sliding_window=None).to_dict()) == ours.config
    for values in (MistralConfig(**sizes).to_dict(), {**sizes, "model_type": "mistral"}):  # windows, said or not
        with pytest.raises(NotCovered, match="sliding_window=4096"):
            config_from_hf(values)
