"""The passes before the first step, whose gradients are thrown away: every rank makes them, on the same samples."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from pertoken.data.batch.pack import MicroBatch, Sample, collate
from pertoken.data.store.dataset import Dataset
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import synchronized
from pertoken.training.step import TrainState

__all__ = ["first_samples", "seconds_per_token", "warm_up_ddp"]

_MOST_TOKENS = 1024


def first_samples(state: TrainState, store: Dataset, sample_ids: np.ndarray) -> MicroBatch:
    """The first of `sample_ids`, up to 1,024 tokens but one at least, on the device."""
    chosen: list[Sample] = []
    tokens = 0
    for i in sample_ids:
        if chosen and tokens + int(store.lengths[i]) > _MOST_TOKENS:
            break
        chosen.append(store[int(i)])
        tokens += int(store.lengths[i])
    return collate(chosen).to(state.precision.device)


def warm_up_ddp(state: TrainState, micro_batch: MicroBatch) -> bool:
    """The first pass that is synchronized between ranks; False where memory does not suffice for it.

    DDP groups gradients into messages in the order in which they become ready in its first pass, and uses these groups
    from the second pass on. Made here, before a first step and after a resume alike, and followed by
    `seconds_per_token`'s pass, it lets sums over ranks round in the same way in every step.
    """
    return _passed(state, micro_batch)


def seconds_per_token(state: TrainState, micro_batch: MicroBatch) -> float:
    """Of a second pass; NaN where memory does not suffice for it."""
    start = time.perf_counter()
    passed = _passed(state, micro_batch)
    return (time.perf_counter() - start) / len(micro_batch.input_ids) if passed else math.nan


def _passed(state: TrainState, micro_batch: MicroBatch) -> bool:
    """Forward and backward; False where memory ends, about which the step itself knows what to do."""
    precision = state.precision
    try:
        with synchronized(state.model, now=True):
            with precision.autocast():
                out = state.model(micro_batch, state.execution, objective=state.objective)
            out.objective({term.denominator: 1.0 for term in out.terms.values()}).backward()
        state.model.zero_grad(set_to_none=True)
        if precision.device.type == "cuda":
            torch.cuda.synchronize(precision.device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        state.model.zero_grad(set_to_none=True)
        return False
    return True
