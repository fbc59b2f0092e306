"""What a step asks of the GPU: one wait, kernels that read documents where they lie, memory that does not grow."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from attention_reference import qkv

from pertoken.data.batch.pack import Sample
from pertoken.data.batch.share import Share, share_of
from pertoken.engines.torch_compile import CompileEngine
from pertoken.model.attention import AttentionLayout, attention, flash_capability, varlen_attention
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.lora import keep_frozen_in
from pertoken.prove.samples import InMemory
from pertoken.recipe.adapter import AdapterConfig
from pertoken.recipe.model import ModelConfig
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda", 0)
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCAB = 512


def share(*, micro_batches: int = 1, weights: bool = False, seed: int = 0) -> Share:
    """24 samples of 5 to 90 tokens, two thirds of them supervised."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in rng.integers(5, 90, 24):
        mask = rng.random(n) < 0.67
        mask[-1] = True
        samples.append(Sample(rng.integers(0, VOCAB, n + 1), mask.astype(np.float32) * 0.5 if weights else mask))
    budget = sum(map(len, samples)) // micro_batches + 90
    return share_of(InMemory(samples), np.arange(len(samples)), token_budget=budget)


def state_of(dtype: str = "bfloat16", *, lora: bool = False, execution: Execution = PLAIN, **keys) -> TrainState:
    from pertoken.folders.adapters import adapt
    from pertoken.model.lora import Base

    config = ModelConfig(**(SIZES | keys)).resolve(VOCAB)
    model = CausalLM(config, seed=1)
    if lora:
        adapt(model, AdapterConfig(kind="lora", r=4), Base("base"), seed=1)
        keep_frozen_in(torch.bfloat16, model.layers)
    model.to(CUDA)
    precision = Precision(dtype, CUDA)
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    return TrainState(model, optimizer, precision.new_scaler(), precision, execution=execution)


def waits_of(state: TrainState, shares: list[Share]) -> list[int]:
    """How often the host waits for the GPU in each step."""
    found = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for this in shares:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(state, this, lr=1e-3, max_norm=1.0)
            found.append(sum("synchroniz" in str(w.message) for w in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


KINDS = {
    "dense": {},
    "float32": {"dtype": "float32"},
    "windows": {"family": "mistral", "sliding_window": 16},
    "capped logits": {"family": "gemma3", "sliding_window": 16, "final_logit_softcapping": 7.0},
    "LoRA": {"lora": True},
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_once_a_step(kind, micro_batches):
    state = state_of(**KINDS[kind])
    shares = [share(micro_batches=micro_batches, seed=s) for s in range(5)]
    assert len(shares[0].micro_batches) == micro_batches
    assert waits_of(state, shares)[2:] == [1, 1, 1]


def test_the_host_waits_once_a_step_with_weighted_tokens():
    assert waits_of(state_of(), [share(weights=True, seed=s) for s in range(4)])[2:] == [1, 1]


def test_the_host_waits_once_a_step_of_compiled_layers():
    state = state_of(execution=Execution(CompileEngine()))
    assert waits_of(state, [share(micro_batches=2, seed=s) for s in range(6)])[4:] == [1, 1]


def test_steps_of_the_same_samples_do_not_take_more_and_more_memory():
    state = state_of()
    peaks = []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        train_step(state, share(micro_batches=2), lr=1e-3, max_norm=1.0)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[-1] <= peaks[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize(("heads", "keys", "size"), [(4, 4, 64), (8, 2, 64), (4, 1, 128), (4, 2, 192)])
def test_documents_attend_where_they_lie(dtype, window, heads, keys, size):
    if flash_capability(CUDA) is None:
        pytest.skip("this PyTorch has no attention over documents of any length for this GPU")
    lengths = (129, 7, 1, 64)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    layout = AttentionLayout.of(lengths, CUDA, cu_seqlens=ends.to(CUDA))
    q, k, v = (x.to(dtype) for x in qkv(sum(lengths), heads, keys, size))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    low = [x.detach().to(CUDA).requires_grad_() for x in (q, k, v)]
    expected = attention(*exact, layout=AttentionLayout.of(lengths, torch.device("cpu")), window=window)
    found = varlen_attention(*low, layout=layout, window=window)
    up = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected.backward(up)
    found.backward(up.to(CUDA, dtype))
    bound = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for mine, truth in zip((found, *(x.grad for x in low)), (expected, *(x.grad for x in exact)), strict=True):
        assert float((mine.cpu().double() - truth).norm() / truth.norm()) < bound
