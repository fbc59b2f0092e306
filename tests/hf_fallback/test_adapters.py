"""Adapters of transformers' own models, through peft."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import World, pertoken, rows_of, untimed

from pertoken import load_model, load_tokenizer, train
from pertoken.data.batch.pack import collate
from pertoken.errors import ModelError
from pertoken.hf_fallback.model import FallbackLM
from pertoken.model.lora import is_of_adapter
from pertoken.prove.run import prove
from pertoken.runs.data import prepare

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # between peft and transformers
]

LORA: dict[str, Any] = {
    "model": {},
    "adapter__kind": "lora",
    "adapter__r": 4,
    "train__learning_rate": 1e-2,
    "train__max_steps": 4,
    "checkpoint__save_interval": 2,
}


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory, peft: Any) -> Path:
    """GPT-2, whose matrices lie transposed, and whose configuration would drop out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(world.folder / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=1024, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(world: World, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(world.recipe(out, **LORA, init_from=str(base)))
    return out


def test_resume_is_bitwise_and_the_optimizer_has_the_adapter_alone(world, base, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train(world.recipe(tmp_path / "run", **LORA, init_from=str(base)), resume=True)
    assert untimed(rows_of(tmp_path / "run")) == untimed(rows_of(run))
    assert rows_of(run)[-1]["loss"] < rows_of(run)[0]["loss"] - 0.05
    last = run / "checkpoints" / "step-00000004"
    state = load_file(last / "optimizer.safetensors")
    assert state
    assert all(is_of_adapter(name) for name in state)
    config = json.loads((last / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert config["fan_in_fan_out"] is True


def test_peft_opens_it_and_merged_it_is_the_same_model(world, run, tmp_path, peft):
    store, _ = prepare(world.recipe(tmp_path / "unused"))
    micro_batch = collate([store[0]])
    assert pertoken("export", run, "--out", tmp_path / "merged", "--merge")[0] == 0
    ours, merged = load_model(run), load_model(tmp_path / "merged")
    assert isinstance(merged, FallbackLM)
    assert merged.adapter is None
    assert all(p.requires_grad for p in merged.parameters())
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(run / "checkpoints" / "step-00000004")
    with torch.no_grad():
        logits = ours.eval().logits(ours.hidden_states(micro_batch))
        of_merged = merged.eval().logits(merged.hidden_states(micro_batch))
        theirs = opened(input_ids=micro_batch.input_ids[None]).logits[0]
    assert (of_merged - logits).abs().max() < 1e-5
    assert (theirs - logits).abs().max() < 1e-5


def test_prove_passes_for_it(world, base, tmp_path):
    names = ["accumulation", "resume in mid-epoch", "update, clipped", "transformers, padded"]
    proof = prove(world.recipe(tmp_path / "run", **LORA, init_from=str(base)), only=names)
    assert [(result.name, result.verdict) for result in proof.results] == [(name, "passed") for name in names]


def test_targets_are_named_and_without_peft_the_extra_is(world, base, tmp_path, monkeypatch):
    train(
        world.recipe(tmp_path / "run", **LORA | {"train__max_steps": 1}, init_from=str(base), adapter__targets="c_fc")
    )
    config = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_fc"]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"need peft; install it: pip install 'pertoken\[lora\]'"):
        train(world.recipe(tmp_path / "other", **LORA, init_from=str(base)))
