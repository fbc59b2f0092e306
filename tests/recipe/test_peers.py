"""What other trainers call an option is answered with what it is here."""

from __future__ import annotations

import copy
import inspect
import re
import tomllib
from typing import Any

import pytest
from coming_from import DOCUMENT, HEADING, options
from pydantic import BaseModel

from pertoken import Recipe
from pertoken.errors import RecipeError
from pertoken.recipe.explain import _all_keys
from pertoken.recipe.peers import PEERS
from pertoken.recipe.schema import apply_override

BASE = {"stage": "sft", "out_dir": "runs/x", "data": {"path": "chats.jsonl", "tokenizer": "tok"}}


def refusal(*overrides: str, **changes: Any) -> str:
    values = copy.deepcopy(BASE) | changes
    for override in overrides:
        apply_override(values, override)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    return str(caught.value)


def test_every_key_that_is_named_exists():
    assert len(PEERS) >= 40
    assert {option.key for option in PEERS.values() if option.kind == "key"} <= set(_all_keys(Recipe))
    for name, option in PEERS.items():
        assert (option.kind == "key") == bool(option.key), name
        assert option.remark or option.kind == "key", name


def test_a_remark_names_only_keys_that_exist():
    sections = [n for n, f in Recipe.model_fields.items() if inspect.isclass(f.annotation)]
    sections = [n for n in sections if issubclass(Recipe.model_fields[n].annotation, BaseModel)]
    keys, found = set(_all_keys(Recipe)), 0
    for option in PEERS.values():
        for word in option.remark.replace(";", " ").replace(",", " ").replace(":", " ").split():
            if word.partition(".")[0] in sections and "." in word:
                found += 1
                assert word in keys, option.remark
    assert found > 5


def test_the_installed_peers_have_the_options_that_are_said_to_be_theirs():
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    theirs = {"transformers": set(transformers.TrainingArguments.__dataclass_fields__)}
    configs = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
    theirs["TRL"] = {name for config in configs for name in config.__dataclass_fields__}
    theirs["TRL"] |= set(inspect.signature(trl.SFTTrainer.__init__).parameters)
    for peer, names in theirs.items():
        said = {name for name, option in PEERS.items() if peer in option.peers}
        assert len(said) > 20
        assert said <= names, peer


@pytest.mark.parametrize("name", [n for n in PEERS if n not in ("model", "data")])
def test_each_is_answered_wherever_it_is_written(name):
    option = PEERS[name]
    for said in (refusal(f"{name}=1"), refusal(**{name: "x"}), refusal(training_args={name: 1})):
        assert f"{name}: unknown key; " in said
        assert "\n" not in said
        if option.key:
            assert option.key in said
        else:
            assert option.remark in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("num_train_epochs=3", "num_train_epochs: unknown key; transformers' num_train_epochs is train.epochs here"),
        ("train.num-train-epochs=3", "transformers' num_train_epochs is train.epochs here"),
        ("data.cutoff_len=3", "data.cutoff_len: unknown key; LLaMA-Factory's cutoff_len is data.max_seq_len here ("),
        (
            "sample_packing=true",
            "sample_packing: unknown key; axolotl's sample_packing needs nothing here: micro-b",
        ),
        ("train.push_to_hub=true", "train.push_to_hub: unknown key; transformers' push_to_hub is not there; `pertoken"),
        ("model=Qwen/Qwen3-0.6B", "[model] is a section, not 'Qwen/Qwen3-0.6B'; TRL's model is init_from here ("),
        ("data=chats.jsonl", "[data] is a section, not 'chats.jsonl'; litgpt's data is data.path here ("),
        ("learning_rate=1", "learning_rate: unknown key; transformers' learning_rate is train.learning_rate here"),
        ("data.seed=1", "data.seed: unknown key; did you mean train.seed?"),
    ],
)
def test_the_answer_names_whose_it_is_and_ours_in_another_section_keeps_its_own(override, said):
    assert said in refusal(override)


def test_the_page_lists_the_options():
    _, heading, listed = DOCUMENT.read_text(encoding="utf-8").partition(HEADING)
    assert heading + listed == options(), "run python tests/coming_from.py"


@pytest.mark.parametrize("peer", ["MiniMind", "TRL", "LLaMA-Factory", "axolotl", "ms-swift"])
def test_the_recipes_of_the_page_are_valid_and_use_names_that_are_answered(peer):
    page = DOCUMENT.read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {peer}$(.*?)(?=^## )", page, re.M | re.S)
    (theirs,) = re.findall(r"^```(?:sh|python|yaml)$(.*?)^```$", part, re.M | re.S)
    (ours,) = re.findall(r"^```toml$(.*?)^```$", part, re.M | re.S)
    names = set(re.findall(r"--(\w+)|(?<=[ (])(\w+)=|^(\w+):", theirs, re.M))
    used = {name for found in names for name in found if name}
    assert len(used) > 8
    assert used <= PEERS.keys()
    recipe, written = Recipe.parse(tomllib.loads(ours)), recipe_keys(tomllib.loads(ours))
    assert recipe.out_dir == "runs/sft"
    needed = {PEERS[name].key for name in used} - {"", "train.schedule", "train.dtype", "data.chat_template"}
    if "warmup_steps=0." in theirs:
        needed = needed - {"train.warmup_steps"} | {"train.warmup_ratio"}
    for key in needed:
        assert key in written or key.startswith(("model.", "log.")), f"{key}: not in our recipe"


def recipe_keys(values: dict[str, Any]) -> set[str]:
    inner = {f"{name}.{key}" for name, value in values.items() if isinstance(value, dict) for key in value}
    return {name for name, value in values.items() if not isinstance(value, dict)} | inner
