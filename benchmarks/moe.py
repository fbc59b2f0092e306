"""What experts cost: tokens a second of whole training steps, with few and with many experts of the same size.

    python benchmarks/moe.py [--dtype bfloat16] [--experts 4 16] [--rounds 5]

A step has 16,384 tokens in samples of 256, half of them supervised. Every token chooses one expert, so all models
compute the same; the steps alternate between them in one process, and the ratio is taken round by round. Optimizer and
gradient clipping, which do grow with the number of parameters, are part of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time

import numpy as np
import torch

from pertoken.data.batch.pack import Sample, collate, pack_micro_batches
from pertoken.data.batch.share import share_of_all
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

TOKENS, LENGTH, VOCABULARY = 16384, 256, 6400
WARM_UP = 1


def samples(rng: np.random.Generator) -> list[Sample]:
    return [
        Sample(rng.integers(0, VOCABULARY, LENGTH + 1).astype(np.int32), np.arange(LENGTH) >= LENGTH // 2)
        for _ in range(TOKENS // LENGTH)
    ]


def new_state(experts: int, hidden_size: int, layers: int, precision: Precision) -> TrainState:
    config = ModelConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        use_moe=True,
        num_experts=experts,
        num_experts_per_tok=1,
    )
    model = CausalLM(config.resolve(VOCABULARY), dtype=precision.parameter_dtype)
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    return TrainState(model, optimizer, precision.new_scaler(), precision)


def step_seconds(state: TrainState, batch: list[Sample], token_budget: int) -> float:
    start = time.perf_counter()
    (cut,) = pack_micro_batches([len(s) for s in batch], world_size=1, token_budget=token_budget)
    train_step(state, share_of_all([collate([batch[i] for i in indices]) for indices in cut]), lr=1e-4, max_norm=1.0)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    precision = Precision(arguments.dtype, torch.device("cpu"))
    states = {e: new_state(e, arguments.hidden_size, arguments.layers, precision) for e in arguments.experts}
    times: dict[int, list[float]] = {e: [] for e in states}
    rng = np.random.default_rng(0)
    for round_ in range(WARM_UP + arguments.rounds):
        batch = samples(rng)
        for experts, state in states.items():
            took = step_seconds(state, batch, arguments.micro_batch_tokens)
            if round_ >= WARM_UP:
                times[experts].append(took)
    fewest = arguments.experts[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "commit": commit,
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "models": {
            f"{experts} experts": {
                "parameters": state.model.num_parameters,
                "active_parameters": state.model.num_active_parameters,
                "step_s": [round(f(times[experts]), 3) for f in (min, statistics.median, max)],
                "tokens_per_s": round(TOKENS / statistics.median(times[experts])),
                f"speed_relative_to_{fewest}": round(
                    statistics.median(a / b for a, b in zip(times[fewest], times[experts], strict=True)), 3
                ),
            }
            for experts, state in states.items()
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
