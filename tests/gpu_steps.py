"""Steps of small models on a GPU, and how often the host waits in one."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from pertoken.data.batch.pack import Sample
from pertoken.data.batch.share import Share, share_of
from pertoken.folders.adapters import adapt
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.lora import Base, keep_frozen_in
from pertoken.prove.samples import InMemory
from pertoken.recipe.adapter import AdapterConfig
from pertoken.recipe.model import ModelConfig
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

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
