"""Samples, flat micro-batches, and the plan that seats one in the other.

Nothing here knows a padding token: a micro-batch is one row of real tokens with the samples' boundaries beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pertoken.data.batch.sample import Sample

__all__ = ["MicroBatch", "Sample", "collate", "pack_micro_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass, one after another in one row of N real tokens."""

    input_ids: Tensor  # [N] int64
    labels: Tensor  # [N] int64, real token ids everywhere
    loss_mask: Tensor  # [N] bool, or float weights
    position_ids: Tensor  # [N] int64, from 0 within each sample
    cu_seqlens: Tensor  # [S + 1] int32, sample s is rows cu_seqlens[s]:cu_seqlens[s + 1]
    lengths: tuple[int, ...]  # the S lengths once more, on the host: shapes are planned from them without a device sync
    # [M] int64, the rows of which `loss_mask` is not 0; None: not looked up yet, see `supervised_rows`.
    supervised: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.input_ids.shape[0]
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            shape = tuple(getattr(self, name).shape)
            assert shape == (n,), f"{name} has shape {shape}, expected {(n,)}"
        assert self.cu_seqlens.shape == (len(self.lengths) + 1,), (self.cu_seqlens.shape, len(self.lengths))
        assert sum(self.lengths) == n, (sum(self.lengths), n)

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    def supervised_rows(self) -> Tensor:
        """[M] int64, in order. `to` looks them up before it copies, since on a GPU the host would wait for them."""
        return (self.loss_mask != 0).nonzero().squeeze(1) if self.supervised is None else self.supervised

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`. A copy from the host to CUDA goes through pinned memory and does not block the host."""
        if device == self.input_ids.device:
            return self
        pin = device.type == "cuda" and self.input_ids.device.type == "cpu"

        def move(t: Tensor) -> Tensor:
            return (t.pin_memory() if pin else t).to(device, non_blocking=pin)

        return MicroBatch(
            move(self.input_ids),
            move(self.labels),
            move(self.loss_mask),
            move(self.position_ids),
            move(self.cu_seqlens),
            self.lengths,
            move(self.supervised_rows()),
        )


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Samples side by side, in the order given. No samples make an empty micro-batch (N = S = 0)."""
    lengths = [len(s) for s in samples]
    cu_seqlens = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    masks = [s.loss_mask for s in samples]
    mask_dtype = np.float32 if any(m.dtype.kind == "f" for m in masks) else np.bool_

    def row(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False))

    return MicroBatch(
        input_ids=row([s.input_ids for s in samples], np.int64),
        labels=row([s.labels for s in samples], np.int64),
        loss_mask=row(masks, mask_dtype),
        position_ids=row([np.arange(n) for n in lengths], np.int64),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=tuple(lengths),
    )


def pack_micro_batches(lengths: Sequence[int], *, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Which rank computes which samples in which micro-batch: `[rank][micro_batch]` lists indices into `lengths`.

    Every index appears exactly once. Within a micro-batch the samples have similar lengths (longest first), and a
    micro-batch holds at most `token_budget` tokens unless a single sample is longer. Every rank gets the same number
    of micro-batches, empty ones included, so that ranks stay in step. A pure function: no plan can change a result.
    """
    assert token_budget >= 1, token_budget
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in by_length:  # longest processing time first: within 4/3 of the best balance
        rank = loads.index(min(loads))
        ranks[rank].append(i)
        loads[rank] += lengths[i]
    micro_batches = [_cut(mine, lengths, token_budget) for mine in ranks]
    most = max(len(cut) for cut in micro_batches)
    return [cut + [[] for _ in range(most - len(cut))] for cut in micro_batches]


def _cut(indices: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive runs of at most `budget` tokens: as few as possible, then as even as possible."""

    def runs(limit: int) -> list[list[int]]:
        out: list[list[int]] = []
        room = 0
        for i in indices:
            if not out or lengths[i] > room:
                out.append([])
                room = limit
            out[-1].append(i)
            room -= lengths[i]
        return out

    fewest = len(runs(budget))
    low, high = 1, budget
    while low < high:  # the smallest limit that still gives the fewest runs
        middle = (low + high) // 2
        if len(runs(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return runs(high)
