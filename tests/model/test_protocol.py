"""What the rest of pertoken knows of a model, both kinds have (mypy holds the types, where folders are opened); how a
pass is run is handed in, never set."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from decoder_cases import BATCHES, batch_of, gradient, model_of
from torch import nn

from pertoken.engines.cpu.engine import CpuEngine
from pertoken.hf_fallback.model import FallbackLM
from pertoken.model.execution import PLAIN, Casts, Execution
from pertoken.model.protocol import LanguageModel, ModelFacts, TorchModule


def fallback() -> FallbackLM:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        return FallbackLM(GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32)))


@pytest.mark.parametrize("model", [lambda: model_of({}, torch.float32), fallback], ids=["decoder", "fallback"])
def test_both_models_have_all_that_is_asked_of_one(model):
    found: Any = model()
    asked = {name for kind in (LanguageModel, TorchModule) for name in vars(kind) if not name.startswith("_")}
    assert asked > {"facts", "layers", "wide_modules", "forward", "decode", "state_dict"}
    assert [name for name in asked if not hasattr(found, name)] == []
    assert isinstance(found.facts, ModelFacts)
    assert found.setting("vocab_size") == found.facts.vocab_size
    assert found.setting("no_such_key") is None


def test_facts_say_which_balance_loss_there_is():
    assert model_of({}, torch.float32).facts.balance_loss is None
    experts = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "aux_loss": "micro_batch"}
    model = model_of(experts, torch.float32)
    facts = model.facts
    assert (facts.has_experts, facts.experts_per_token) == (True, 2)
    assert facts.balance_loss is not None
    assert facts.balance_loss.kind == "micro_batch"
    model.set_balance_loss(dataclasses.replace(facts.balance_loss, kind="sequence", coefficient=0.5))
    assert (model.config.aux_loss, model.config.aux_loss_coef) == ("sequence", 0.5)


def state_of(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Every attribute of every module but parameters and buffers."""
    return [(name, {k: v for k, v in vars(m).items() if not k.startswith("_")}) for name, m in model.named_modules()]


@pytest.mark.parametrize(
    "execution",
    [
        lambda: Execution(CpuEngine(torch.float32)),
        lambda: Execution(loss_impl="reference"),
        lambda: Execution(activation_checkpointing=True),
    ],
    ids=["cpu", "reference loss", "checkpointing"],
)
def test_an_execution_leaves_nothing_behind_in_the_model(execution):
    model, batch = model_of({}, torch.float32), batch_of(*BATCHES["short"])
    before, first = state_of(model), gradient(model, batch)
    gradient(model, batch, execution())
    assert state_of(model) == before
    again = gradient(model, batch)
    assert again[0] == first[0]
    assert all(torch.equal(again[1][name], g) for name, g in first[1].items())


def test_an_execution_is_frozen_and_what_it_keeps_is_gone_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.loss_impl = "reference"
    model, batch = model_of({}, torch.float32), batch_of(*BATCHES["short"])
    with Execution(CpuEngine(torch.bfloat16)).keeping_casts() as keeping:
        gradient(model, batch, keeping, low=True)
        assert isinstance(keeping.casts, Casts)
        assert keeping.casts._matrices
    assert not keeping.casts._matrices
    assert PLAIN.casts is None
