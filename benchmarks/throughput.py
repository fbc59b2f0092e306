"""Throughput of training on this machine: samples and tokens a second, and the share of its matrix rate that is used.

    python benchmarks/throughput.py [--dtype bfloat16] [--compile] [--steps 8]

The 30M model of recipes/gsm8k-30m.toml on samples of GSM8K's lengths (mean 226 tokens, at most 340, 57% supervised), so
nothing needs to be downloaded. Useful operations are 6 * (parameters without the embedding) a token, 6 * vocabulary *
hidden size a supervised token, and causal attention; padding and logits that nobody supervises do not count. The matrix
rate is the best of three shapes of this very model, measured in the same call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from pertoken.config import ModelConfig, ResolvedModelConfig
from pertoken.data.batch import Sample, collate, plan
from pertoken.model.transformer import CausalLM
from pertoken.training.optim import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

BATCH_SIZE, MAX_SEQ_LEN, SUPERVISED = 16, 340, 0.57
WARM_UP = 3


def samples(rng: np.random.Generator, vocab_size: int) -> list[Sample]:
    lengths = np.clip(rng.normal(226, 62, BATCH_SIZE).astype(int), 90, MAX_SEQ_LEN)
    return [
        Sample(rng.integers(0, vocab_size, n + 1).astype(np.int32), np.arange(n) >= n * (1 - SUPERVISED))
        for n in lengths
    ]


def useful_operations(model: CausalLM, batch: list[Sample]) -> float:
    c = model.config
    body = model.num_parameters - c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    tokens = sum(len(s) for s in batch)
    supervised = sum(int(s.loss_mask.sum()) for s in batch)
    # q k^T and p v over half the square, forward once and backward twice
    attention = sum(6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * len(s) ** 2 for s in batch)
    return 6.0 * body * tokens + 6.0 * c.vocab_size * c.hidden_size * supervised + attention


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(config: ResolvedModelConfig, dtype: torch.dtype) -> float:
    """Operations a second of a linear layer: the best of the model's shapes."""
    rates = []
    for wide in (config.hidden_size, config.intermediate_size, config.vocab_size):
        x, w = torch.randn(4096, config.hidden_size).to(dtype), torch.randn(wide, config.hidden_size).to(dtype)
        rates.append(2 * x.shape[0] * w.numel() / seconds(lambda x=x, w=w: F.linear(x, w), 10))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()

    config = ModelConfig(num_key_value_heads=4, intermediate_size=1664).resolve(6400)
    model = CausalLM(config)
    if arguments.compile:
        model.compile_layers()
    precision = Precision(arguments.dtype, torch.device("cpu"))
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    state = TrainState(model, optimizer, precision.new_scaler(), precision)
    rng = np.random.default_rng(0)
    rate = matrix_rate(config, getattr(torch, arguments.dtype))
    times, tokens, operations = [], [], []
    for step in range(WARM_UP + arguments.steps):
        batch = samples(rng, config.vocab_size)
        start = time.perf_counter()
        (cut,) = plan([len(s) for s in batch], world_size=1, token_budget=8192)
        micro_batches = [collate([batch[i] for i in indices]) for indices in cut]
        num_tokens, num_routed = float(sum(s.loss_mask.sum() for s in batch)), float(sum(map(len, batch)))
        train_step(state, micro_batches, num_tokens=num_tokens, num_routed=num_routed, lr=1e-4, max_norm=1.0)
        if step >= WARM_UP:
            times.append(time.perf_counter() - start)
            tokens.append(sum(len(s) for s in batch))
            operations.append(useful_operations(model, batch))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "commit": commit,
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "step_s": [round(min(times), 3), round(statistics.median(times), 3), round(max(times), 3)],
        "samples_per_s": round(BATCH_SIZE * len(times) / sum(times), 2),
        "tokens_per_s": round(sum(tokens) / sum(times)),
        "useful_gflop_per_s": round(sum(operations) / sum(times) / 1e9),
        "matrix_gflop_per_s": round(rate / 1e9),
        "share_of_matrix_rate": round(sum(operations) / sum(times) / rate, 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
