"""A rank's share of a step: its micro-batches, and the counts of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pertoken.data.batch.pack import MicroBatch, Sample, collate, pack_micro_batches

__all__ = ["Samples", "Share", "counts_of", "denominators_of", "share_of", "share_of_all"]


class Samples(Protocol):
    """Samples with their counts: a `Store`, or some held in memory."""

    @property
    def lengths(self) -> np.ndarray: ...  # [len] inputs of each

    @property
    def num_tokens(self) -> np.ndarray: ...  # [len] supervised tokens of each, or sums of their weights

    def __getitem__(self, i: int, /) -> Sample: ...


@dataclass(frozen=True)
class Share:
    """What one rank computes of a step."""

    micro_batches: tuple[MicroBatch, ...]  # equally many on every rank, empty ones included
    sample_ids: tuple[np.ndarray, ...]  # of each micro-batch
    denominators: dict[str, float]  # what terms of the objective are divided by: the whole step's, over all ranks


def share_of(
    samples: Samples, sample_ids: np.ndarray, *, token_budget: int, rank: int = 0, world_size: int = 1
) -> Share:
    """The part of rank `rank` of `world_size` in a step over `sample_ids` [K].

    The counts are there before, so ranks need not tell each other anything before they begin.
    """
    cut = pack_micro_batches(samples.lengths[sample_ids].tolist(), world_size=world_size, token_budget=token_budget)[
        rank
    ]
    ids = tuple(sample_ids[indices] for indices in cut)
    return Share(
        micro_batches=tuple(collate([samples[int(i)] for i in chosen]) for chosen in ids),
        sample_ids=ids,
        denominators=denominators_of(samples, sample_ids),
    )


def share_of_all(micro_batches: Sequence[MicroBatch]) -> Share:
    """A step that consists of `micro_batches`, all of them on one rank. Its counts are read off them."""
    supervised = sum(float(m.loss_mask.sum(dtype=torch.float64)) for m in micro_batches)
    inputs = sum(counts_of(m)["inputs"] for m in micro_batches)
    return Share(tuple(micro_batches), (), {"supervised": supervised, "inputs": inputs})


def denominators_of(samples: Samples, sample_ids: np.ndarray) -> dict[str, float]:
    """Of a step over `sample_ids` [K], before its first pass. `train_step` asserts that it has seen as many.

    A further denominator ("documents", say) is a line here and a line in `counts_of`.
    """
    return {
        "supervised": float(samples.num_tokens[sample_ids].sum()),
        "inputs": float(samples.lengths[sample_ids].sum()),
    }


def counts_of(micro_batch: MicroBatch) -> dict[str, float]:
    """What a micro-batch adds to each denominator but "supervised", which the loss counts by itself."""
    return {"inputs": float(sum(micro_batch.lengths))}
