"""A few real samples of a recipe's first step, small enough to be computed in many ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.pack import Sample
from pertoken.data.store.dataset import Dataset

__all__ = ["LONG", "Chosen", "InMemory", "choose", "choose_long"]

_PIECES = 5  # so that a step of two has a last, shorter one, and three ranks can be dealt skewed shares


LONG = 384  # inputs; attention's kernels take the queries of longer samples in blocks, which tests/prove holds
_LONGEST = 900  # inputs: where half of them are supervised, these too are several blocks


class InMemory:
    """Samples held in memory, with the counts that training reads off a store."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)
        self.lengths = np.array([len(s) for s in samples], dtype=np.int64)
        self.num_tokens = np.array([s.num_tokens for s in samples])  # int64 unless a sample is weighted
        self.num_bytes = 4 * self.num_tokens  # as if each token were of four; pieces have no text of their own

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Sample:
        return self._samples[i]


@dataclass(frozen=True)
class Chosen:
    """What the proof computes with."""

    samples: InMemory  # real ones, and last a start of one that nobody supervises
    ids: tuple[int, ...]  # of the real ones in the store, uncut
    sources: tuple[str, ...]  # file:line of each real one
    cut: int  # how many had to be cut

    @property
    def unsupervised(self) -> int:
        """The index of the sample without a supervised token."""
        return len(self.samples) - 1


def choose(store: Dataset, *, tokens: int, batch_size: int, seed: int, step: int = 1) -> Chosen:
    """About `tokens` inputs of the shortest samples of step `step`, at least five where the store has them.

    Longer ones are cut around their first supervised token, for a piece of a sequence is a sequence.
    """
    ids: list[int] = []
    for number in range(step, step + steps_per_epoch(len(store), batch_size)):
        drawn = step_at(number, num_samples=len(store), batch_size=batch_size, seed=seed).sample_ids
        ids += [int(i) for i in drawn if i not in ids]
        if len(ids) >= _PIECES:
            break
    ids.sort(key=lambda i: (int(store.lengths[i]), i))
    limit = max(8, tokens // _PIECES)
    pieces: list[Sample] = []
    for i in ids:
        if len(pieces) >= _PIECES and sum(map(len, pieces)) + min(limit, int(store.lengths[i])) > tokens:
            break
        pieces.append(_cut(store[i], limit))
    chosen = ids[: len(pieces)]
    longest = max(pieces, key=len)
    start = Sample(longest.tokens[: max(2, len(longest) // 3)], np.zeros(max(2, len(longest) // 3) - 1, dtype=np.bool_))
    return Chosen(
        samples=InMemory([*pieces, start]),
        ids=tuple(chosen),
        sources=tuple(store.where(i) for i in chosen),
        cut=sum(len(piece) < int(store.lengths[i]) for piece, i in zip(pieces, chosen, strict=True)),
    )


def choose_long(store: Dataset) -> Sample | None:
    """The sample with the most supervised tokens, or the longest, cut to 900 inputs; None if none has more than 384."""
    for i in (int(np.argmax(store.num_tokens)), int(np.argmax(store.lengths))):
        if store.lengths[i] > LONG:
            return _cut(store[i], _LONGEST)
    return None


def _cut(sample: Sample, limit: int) -> Sample:
    """At most `limit` inputs, the first supervised one in the middle."""
    if len(sample) <= limit:
        return sample
    first = int(np.flatnonzero(sample.loss_mask)[0])
    start = min(max(0, first - limit // 2), len(sample) - limit)
    return Sample(sample.tokens[start : start + limit + 1], sample.loss_mask[start : start + limit])
