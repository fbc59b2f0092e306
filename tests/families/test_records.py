"""A family is a record: what it says is what transformers' class has, and no other file knows it by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pertoken
from pertoken.families import FAMILIES, recipe_names, saved_as
from pertoken.recipe.model import ModelConfig

SOURCE = Path(pertoken.__file__).parent
SAVED = [name for name, family in FAMILIES.items() if family.architecture is not None]
OF_BOTH_NAMES = {"num_experts": "num_local_experts"}  # as transformers 5 calls it in most classes


@pytest.mark.parametrize("model_type", SAVED)
def test_defaults_are_those_of_the_class(model_type):
    family, values = FAMILIES[model_type], CONFIG_MAPPING[model_type]().to_dict()
    assert family.model_type == model_type
    assert family.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    rope = values["rope_parameters"]
    values["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    for key, value in family.defaults.items():
        assert values.get(OF_BOTH_NAMES.get(key), values.get(key)) == value, key
    assert values["rms_norm_eps"] == family.defaults.get("rms_norm_eps", 1e-6)
    assert values["max_position_embeddings"] == family.defaults["max_position_embeddings"]


@pytest.mark.parametrize("model_type", SAVED)
def test_what_is_always_written_is_what_the_class_has_without_it(model_type):
    """Or switches a feature off that the class has: no constant says more than the record."""
    family, config = FAMILIES[model_type], CONFIG_MAPPING[model_type]()
    for key, value in family.constants.items():
        assert value in (getattr(config, key, None), None, False), key


def test_a_recipe_names_each_family_and_says_whether_there_are_experts():
    names = [
        "qwen3",
        "qwen2",
        "llama",
        "mistral",
        "smollm3",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi3",
        "granite",
        "gemma",
        "gemma2",
        "gemma3",
    ]
    assert recipe_names() == names
    assert recipe_names(use_moe=True) == ["qwen3", "qwen2", "llama", "olmoe"]
    for name in recipe_names():
        for use_moe in (False, True):
            family = saved_as(name, use_moe=use_moe)
            assert (family is not None) == (name in recipe_names(use_moe=use_moe))
            if family is not None:
                config = ModelConfig(family=name, use_moe=use_moe).resolve(100)
                for feature in ("qk_norm", "qk_norm_of_all_heads", "qkv_bias", "norms", "offset_norms", "activation"):
                    assert getattr(config, feature) == getattr(family, feature)
                assert config.use_moe == (family.experts is not None)
    assert saved_as("minimind", use_moe=False) is None


NAMES = {*FAMILIES, *(family.recipe_name for family in FAMILIES.values()), *SAVED}
# A recipe without a family has Qwen3's; a .pth is MiniMind's; GGUF's names of tokenizers, and the shapes of models in
# the table of what fits, ask for no family.
ALLOWED = {
    "recipe/model.py": {"qwen3"},
    "folders/minimind.py": {"minimind"},
    "checkpoints/export.py": {"minimind"},
    "data/tokens/gguf.py": {"llama", "qwen2"},
    "training/fits.py": {"llama", "gemma3", "qwen3"},
}
OTHERS = [path for path in SOURCE.rglob("*.py") if path.parent.name != "families"]


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_other_file_tests_for_a_family_by_name(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    found = {node.value for node in nodes if isinstance(node.value, str) and node.value in NAMES}
    assert found <= ALLOWED.get(str(path.relative_to(SOURCE)), set())


def test_the_page_of_models_has_every_type_by_its_name_in_a_recipe():
    page = (SOURCE.parents[1] / "docs" / "models.md").read_text(encoding="utf-8").partition("## Through")[0]
    lines = [row.split("|") for row in page.splitlines() if row.startswith("| `") and "`model_type`" not in row]
    rows = {cells[1].strip(): cells[2].strip() for cells in lines}
    found = {key.split("`")[1]: name.split("`")[1::2] for key, name in rows.items()}
    assert found.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        has_experts = family.experts is not None and family.experts.switch is None
        assert found[name] == [family.recipe_name, *(["use_moe"] if has_experts else [])]


def test_reading_a_record_imports_nothing_heavy():
    code = "import sys, pertoken.families; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
