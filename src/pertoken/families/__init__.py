"""The families that the decoder computes: a record each, by Hugging Face's model type."""

from __future__ import annotations

from pertoken.families.family import Experts, Family
from pertoken.families.gemma import GEMMA
from pertoken.families.gemma2 import GEMMA2
from pertoken.families.gemma3 import GEMMA3
from pertoken.families.granite import GRANITE
from pertoken.families.llama import LLAMA
from pertoken.families.minimind import MINIMIND
from pertoken.families.mistral import MISTRAL
from pertoken.families.mixtral import MIXTRAL
from pertoken.families.olmo2 import OLMO2
from pertoken.families.olmo3 import OLMO3
from pertoken.families.olmoe import OLMOE
from pertoken.families.phi3 import PHI3
from pertoken.families.qwen2 import QWEN2
from pertoken.families.qwen2_moe import QWEN2_MOE
from pertoken.families.qwen3 import QWEN3
from pertoken.families.qwen3_moe import QWEN3_MOE
from pertoken.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Experts", "Family", "recipe_names", "saved_as"]

FAMILIES: dict[str, Family] = {
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "phi3": PHI3,
    "granite": GRANITE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "minimind": MINIMIND,
}


def recipe_names(*, use_moe: bool | None = None) -> list[str]:
    """What `model.family` may be, each name once; with `use_moe`, of families that have a type with or without."""
    found = [f for f in FAMILIES.values() if f.architecture is not None]
    return list(dict.fromkeys(f.recipe_name for f in found if use_moe in (None, f.experts is not None)))


def saved_as(recipe_name: str, *, use_moe: bool) -> Family | None:
    """The family in which a model of a recipe is saved, and whose features it has; None where there is none."""
    for family in FAMILIES.values():
        if family.architecture is not None and (family.recipe_name, family.experts is not None) == (
            recipe_name,
            use_moe,
        ):
            return family
    return None
