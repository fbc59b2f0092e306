"""A resume verifies itself: the loss of a few fixed tokens, kept with each checkpoint and computed again.

Checksums say that a checkpoint's files are what was written. The probe says that weights, data and code still make of
them what they made when the run was interrupted.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.checkpoints.state import ProbeLoss
from pertoken.data.batch.order import permute
from pertoken.data.batch.pack import collate
from pertoken.data.store.dataset import Dataset
from pertoken.errors import CheckpointError
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState

__all__ = ["Probe", "environment", "verify"]

_CANDIDATES = 64  # first samples of the order; the shortest of them is the probe
# With these a user chooses between the processor's instruction sets, each with roundings of its own.
_INSTRUCTION_SETS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "PERTOKEN_KERNELS_MARCH",
)
# How far apart, relative to the loss, two computations of it may be: where nothing about the machine has changed, and
# where ranks, threads, versions, kernels or processor have.
_SAME = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-6, "float16": 1e-6}
_OTHER = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


class Probe:
    """One short sample of a run's training data."""

    def __init__(self, store: Dataset, seed: int) -> None:
        first = np.arange(min(_CANDIDATES, len(store)))
        ids = permute(first, num_samples=len(store), seed=seed, epoch=0)
        self.sample_id = int(ids[np.argmin(store.lengths[ids])])
        self._sample = store[self.sample_id]
        self.where = store.where(self.sample_id)

    @torch.no_grad()
    def measure(self, state: TrainState) -> ProbeLoss:
        """The sample's loss as the state stands, for a checkpoint. Every rank computes the same."""
        was_training = state.model.training
        state.model.eval()
        try:
            with state.precision.autocast():
                out = state.model(collate([self._sample]).to(state.precision.device), state.execution)
        finally:
            state.model.train(was_training)
        return ProbeLoss(self.sample_id, float(out.num_tokens), float(out.loss_sum))


def environment(precision: Precision, *, ranks: int, compiled: bool) -> dict[str, Any]:
    """All that the last bits of a loss may depend on besides weights, data and code."""
    cuda = precision.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(precision.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "dtype": precision.dtype,
        "compiled": compiled,
        "instruction_sets": {name: os.environ[name] for name in _INSTRUCTION_SETS if name in os.environ},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags", "Features"))]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *names[:1]])


def verify(saved: ProbeLoss, now: ProbeLoss, *, same: bool, dtype: str, where: str, force: bool) -> str | None:
    """Compare two measurements of the sample at `where`; what the user should know, None where they are equal.

    `same`: whether the environment is. Raises CheckpointError where they differ by more than rounding, unless `force`.
    """
    before, after = saved.loss_sum, now.loss_sum
    if before == after and saved.num_tokens == now.num_tokens:
        return None
    apart = abs(after - before) / max(abs(before), 1e-300)
    bound = (_SAME if same else _OTHER)[dtype]
    what = (
        f"the loss of {where} is {after:.9g} over {now.num_tokens:g} tokens; it was {before:.9g} over "
        f"{saved.num_tokens:g} when the checkpoint was saved ({apart:.1e} of it apart; rounding allows {bound:.0e})"
    )
    if apart <= bound and saved.num_tokens == now.num_tokens:  # false for NaN
        return f"not bitwise the run as it was, but within rounding: {what}"
    if force:
        return f"going on, though {what}"
    raise CheckpointError(
        f"resume=True: {what}; weights, data or code are no longer those of the run. Restore them, start a new run "
        "from it with init_from, or continue all the same with force=True"
    )
