"""Adapted layers: the same gradients by every engine and in every split, none for what is frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import BATCHES, MODELS, VOCAB, batch_of, gradient, largest_error, model_of
from torch import nn

from pertoken.data.batch.pack import Sample, collate
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.lora import (
    Adapter,
    Base,
    LoraLinear,
    add_lora,
    is_of_adapter,
    keep_frozen_in,
    lora_layers,
    merge_lora,
)

pytestmark = pytest.mark.numeric

ADAPTER = Adapter(r=3, alpha=6.0, rslora=False, base=Base("elsewhere"))
EXPERTS = MODELS["experts"]
TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "o alone": ("o_proj",),
    "down alone": ("down_proj",),
    "v and gate": ("v_proj", "gate_proj"),
}


def adapted(changes: dict[str, Any], dtype: torch.dtype, targets: str = "all", adapter: Adapter = ADAPTER) -> CausalLM:
    """With a B that is not zero."""
    model = model_of(changes, torch.float32)
    ends = tuple(f".{name}" for name in TARGETS[targets])
    names = [name for name, _ in model.named_modules() if name.endswith(ends) and ".experts." not in name]
    add_lora(model, names, adapter, seed=1)
    generator = torch.Generator().manual_seed(5)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)
    return model.to(dtype)


CASES = [
    (family, targets) for family in MODELS for targets in TARGETS if family != "experts" or targets != "down alone"
]


@pytest.mark.parametrize("batch", ["short", "all supervised"])
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_kernels_give_the_gradients_of_the_adapter_and_no_other(family, targets, batch):
    changes, micro_batch = MODELS[family], batch_of(*BATCHES[batch])
    loss, exact = gradient(adapted(changes, torch.float64, targets), micro_batch)
    assert exact
    assert all(is_of_adapter(name) for name in exact)
    _, plain = gradient(adapted(changes, torch.float32, targets), micro_batch)
    model, execution = adapted(changes, torch.float32, targets), Execution(CpuEngine(torch.float32))
    assert execution.engine.supports(model) is None
    found_loss, found = gradient(model, micro_batch, execution)
    assert largest_error(found, exact) <= 4 * max(largest_error(plain, exact), 1e-6)
    assert found_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_kernels_in_bfloat16_round_no_worse_than_the_plain_modules(family):
    changes, micro_batch = MODELS[family], batch_of(*BATCHES["all supervised"])
    _, exact = gradient(adapted(changes, torch.float64), micro_batch)
    _, plain = gradient(adapted(changes, torch.float32), micro_batch, low=True)
    execution = Execution(CpuEngine(torch.bfloat16))
    _, found = gradient(adapted(changes, torch.float32), micro_batch, execution, low=True)
    assert largest_error(found, exact) <= 2 * largest_error(plain, exact)


def test_a_frozen_matrix_costs_no_product_and_the_factors_four_small_ones(monkeypatch):
    def shapes(model: CausalLM) -> list[tuple[int, ...]]:
        """Of the right factors of the products that the backward pass makes."""
        execution, seen = Execution(CpuEngine(torch.float32)), []
        out = model(batch_of(*BATCHES["all supervised"]), execution)
        with monkeypatch.context() as patch:
            mm = torch.mm
            patch.setattr(
                torch, "mm", lambda a, b, **settings: seen.append((*a.shape, b.shape[1])) or mm(a, b, **settings)
            )
            patch.setattr(Kernels, "norm_transposed", lambda *args: pytest.fail("for the gradient of a frozen matrix"))
            out.objective({"supervised": 50.0, "inputs": 60.0}).backward()
        return seen

    plain = model_of({}, torch.float32).requires_grad_(False)
    plain.model.embed_tokens.requires_grad_(True)
    small = [shape for shape in shapes(adapted({}, torch.float32)) if ADAPTER.r in shape]
    large = [shape for shape in shapes(adapted({}, torch.float32)) if ADAPTER.r not in shape]
    assert len(small) == 4 * 7 * 3  # for each adapted matrix
    assert len(large) <= len(shapes(plain))


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_no_split_changes_the_gradient(changes):
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(0, VOCAB, n + 1), rng.random(n) < p) for n, p in ((9, 0.1), (30, 0.9), (17, 0.5))]
    model = adapted(changes, torch.float64)
    _, whole = gradient(model, collate(samples))
    parts = [gradient(model, collate(some))[1] for some in (samples[:1], samples[1:])]
    assert largest_error({name: parts[0][name] + parts[1][name] for name in whole}, whole) <= 1e-10


def test_a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same():
    micro_batch = batch_of(*BATCHES["short"])
    plain, model = model_of({}, torch.float64), model_of({}, torch.float64)
    names = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    add_lora(model, names, ADAPTER, seed=3)
    assert torch.equal(plain.hidden_states(micro_batch), model.hidden_states(micro_batch))
    model = adapted({}, torch.float64)
    hidden = model.hidden_states(micro_batch).detach()
    assert (hidden - plain.hidden_states(micro_batch)).abs().max() > 0.01
    merge_lora(model)
    assert not list(lora_layers(model))
    assert all(p.requires_grad for p in model.parameters())
    assert (model.hidden_states(micro_batch) - hidden).abs().max() < 1e-12


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
def test_what_is_frozen_may_be_kept_in_bfloat16_where_products_are(kernels):
    micro_batch = batch_of(*BATCHES["short"])
    execution = Execution(CpuEngine(torch.bfloat16)) if kernels else PLAIN
    for changes in ({}, EXPERTS):
        _, wide = gradient(adapted(changes, torch.float32), micro_batch, execution, low=True)
        model = adapted(changes, torch.float32)
        keep_frozen_in(torch.bfloat16, model.layers)
        low = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]
        matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n and not is_of_adapter(n)]
        assert low == [name for name in matrices if not name.endswith(".mlp.gate.weight")]
        assert execution.engine.supports(model) is None
        _, found = gradient(model, micro_batch, execution, low=True)
        if kernels:  # W + s B A is rounded once more
            _, exact = gradient(adapted(changes, torch.float64), micro_batch)
            assert largest_error(found, exact) <= 2 * largest_error(wide, exact)
            assert any(not torch.equal(found[name], wide[name]) for name in wide)
        else:
            assert all(torch.equal(found[name], wide[name]) for name in wide)


def test_what_the_kernels_read_is_rounded_once():
    layer = next(layer for _, layer in lora_layers(adapted({}, torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        merged = layer.merged_weight()
    exact = layer.weight.double() + layer.scale * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    assert merged.dtype == torch.float32
    assert (merged - exact).abs().max() < 1e-6


def test_rslora_divides_by_the_root_of_r():
    assert Adapter(16, 32.0, False, Base("")).scale == 2.0
    assert Adapter(16, 32.0, True, Base("")).scale == 8.0


def hooked(layer: LoraLinear) -> None:
    layer.lora_A.register_forward_hook(lambda module, inputs, output: 2 * output)


def biased(layer: LoraLinear) -> None:
    layer.lora_B.bias = nn.Parameter(torch.ones(layer.out_features))


def more(layer: LoraLinear) -> None:
    layer.dropout = nn.Dropout(0.5)


def other_factor(layer: LoraLinear) -> None:
    layer.lora_A = nn.Sequential(layer.lora_A)


def subclass(layer: LoraLinear) -> None:
    layer.__class__ = type("Mine", (LoraLinear,), {})


def own_forward(layer: LoraLinear) -> None:
    layer.forward = lambda x: x


@pytest.mark.parametrize("change", [hooked, biased, more, other_factor, subclass, own_forward])
def test_an_adapted_layer_that_a_user_has_changed_runs_plain(change):
    model = adapted({}, torch.float32)
    engine = CpuEngine(torch.float32)
    assert engine.supports(model) is None
    change(model.model.layers[1].self_attn.v_proj)
    why = engine.supports(model)
    assert why is not None
    assert why.startswith("model.layers.1.self_attn.v_proj")


def test_an_adapted_head_is_not_read_past(monkeypatch):
    model = model_of({"tie_word_embeddings": False}, torch.float32)
    add_lora(model, ["lm_head"], ADAPTER, seed=0)
    nn.init.ones_(model.lm_head.lora_B.weight)
    assert CpuEngine(torch.float32).supports(model) == "lm_head is a LoraLinear"
    _, found = gradient(model, batch_of(*BATCHES["short"]), PLAIN)
    assert float(found["lm_head.lora_B.weight"].abs().max()) > 0
