"""A run of each family from the recipe to transformers: trained by the kernels, resumed, exported, proved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, pertoken, rows_of, untimed

from pertoken import load_model, train
from pertoken.inference.generate import generate
from pertoken.model.decoder import CausalLM

pytestmark = pytest.mark.numeric

# Samples have up to some 500 tokens: beyond the length that the rotary frequencies are scaled from.
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model__family": "qwen2"},
    "qwen2, untied": {"model__family": "qwen2", "model__tie_word_embeddings": False},
    "llama3": {"model__family": "llama", "model__rope_theta": 500.0, "model__rope_scaling": dict(ROPE)},
    "olmo2": {"model__family": "olmo2"},
    "granite": {
        "model__family": "granite",
        "model__embedding_multiplier": 6.0,
        "model__residual_multiplier": 0.7,
        "model__attention_multiplier": 0.2,
        "model__logits_scaling": 0.3,
    },
    "gemma": {"model__family": "gemma"},
    "gemma2": {
        "model__family": "gemma2",
        "model__attn_logit_softcapping": 2.0,
        "model__final_logit_softcapping": 7.0,
        "model__sliding_window": 40,
    },
    "phi3": {"model__family": "phi3", "model__head_dim": 16, "model__partial_rotary_factor": 0.75},
    "olmo3": {
        "model__family": "olmo3",
        "model__sliding_window": 40,
        "model__rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "olmoe": {"model__family": "olmoe", "model__use_moe": True, "model__num_experts_per_tok": 2},
    "shared expert": {"model__family": "qwen2", "model__use_moe": True, "model__num_experts_per_tok": 2},
    "gemma3": {
        "model__family": "gemma3",
        "model__query_pre_attn_scalar": 5,
        "model__final_logit_softcapping": 7.0,
    },
}
CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "shared expert": "Qwen2MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2, untied": "Qwen2ForCausalLM",
    "llama3": "LlamaForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def weights(run: Path, step: int) -> str:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_decodes_and_opens_in_transformers_with_the_same_logits(
    world: World, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    keys = {**MODELS[name], "train__max_steps": 6, "data__eval_path": []}
    recipe = world.recipe(tmp_path / "run", **keys)
    train(recipe)
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses[-1] < losses[0]

    code, _, err = pertoken("export", tmp_path / "run", "--format", "hf", "--out", tmp_path / "exported")
    assert code == 0, err
    values = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert values["architectures"] == [CLASSES[name]]
    ours = load_model(tmp_path / "run").eval()
    assert isinstance(ours, CausalLM)
    assert ours.config.rope_scaling == recipe.model.rope_scaling
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    ids = torch.arange(200) % ours.config.vocab_size
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
        cache = ours.new_cache(200)
        logits = [ours.decode(part, cache) for part in ids.split([150, 1, 49])]
    for found, at in zip(logits, (149, 150, 199), strict=True):
        assert float((found - expected[at]).abs().max() / expected.abs().max()) < 1e-5
    made = list(generate(ours, ids[:150].tolist(), max_new_tokens=5, temperature=0.0))
    with torch.no_grad():
        seen = torch.ones(1, 150, dtype=torch.int64)  # else transformers would leave out the padding token
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        greedy = theirs.generate(ids[None, :150], attention_mask=seen, **settings)[0, 150:]
    assert made == greedy.tolist()


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma3", "phi3"])
def test_a_resumed_run_is_the_uninterrupted_one(world: World, tmp_path: Path, name: str) -> None:
    keys = {**MODELS[name], "train__max_steps": 6, "checkpoint__save_interval": 3, "data__eval_path": []}
    train(world.recipe(tmp_path / "run", **keys))
    rows, last = untimed(rows_of(tmp_path / "run")), weights(tmp_path / "run", 6)
    for file in sorted((tmp_path / "run" / "checkpoints" / "step-00000006").iterdir()):
        file.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000006").rmdir()
    train(world.recipe(tmp_path / "run", **keys), resume=True)
    assert untimed(rows_of(tmp_path / "run")) == rows
    assert weights(tmp_path / "run", 6) == last


def test_the_start_says_what_transformers_makes_of_a_tokenizer_beside_the_model(world: World, tmp_path: Path) -> None:
    """AutoTokenizer opens it as Qwen2Tokenizer, which drops spaces; ours, and the generic class, take what is saved."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from pertoken.data.tokens.tokenizer import load_tokenizer, open_tokenizer

    recipe = world.write_recipe(tmp_path / "run", **MODELS["qwen2"], train__max_steps=1)
    code, out, err = pertoken("train", recipe)
    assert code == 0
    assert "AutoTokenizer opens every tokenizer beside a qwen2 model as its Qwen2Tokenizer" in " ".join(
        (out + err).split()
    )
    folder, text = tmp_path / "run" / "checkpoints" / "step-00000001", "red green"
    ids = open_tokenizer(world.folder / "tokenizer").encode(text)
    assert open_tokenizer(folder).encode(text) == load_tokenizer(folder).encode(text) == ids
    assert PreTrainedTokenizerFast.from_pretrained(folder).encode(text) == ids
    assert AutoTokenizer.from_pretrained(folder).encode(text) != ids, "then the message may go"
