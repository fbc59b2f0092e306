"""A rank's share of a step: its micro-batches, and the counts of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pertoken.data.batch.pack import MicroBatch, Sample, collate, pack_micro_batches

__all__ = ["Samples", "Share", "share_of"]


class Samples(Protocol):
    """Samples with their counts: a `Store`, or some held in memory."""

    @property
    def lengths(self) -> np.ndarray: ...  # [len] inputs of each

    @property
    def num_tokens(self) -> np.ndarray: ...  # [len] supervised tokens of each

    def __getitem__(self, i: int, /) -> Sample: ...


@dataclass(frozen=True)
class Share:
    """What one rank computes of a step."""

    micro_batches: tuple[MicroBatch, ...]  # equally many on every rank, empty ones included
    sample_ids: tuple[np.ndarray, ...]  # of each micro-batch
    num_tokens: float  # supervised tokens of the whole step, over all ranks
    num_input_tokens: float  # its input tokens


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
        num_tokens=float(samples.num_tokens[sample_ids].sum()),
        num_input_tokens=float(samples.lengths[sample_ids].sum()),
    )
