"""The order of samples: a permutation with random access, so that step 10^6 is found as fast as step 1.

Nothing is shuffled in memory. A keyed bijection maps a position of the epoch to a sample: a Feistel network over the
smallest power of four that holds the epoch, walked along its cycle until it lands inside (Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002). The order depends on `(seed, epoch, number of samples)` alone: not on ranks,
micro-batches or where a run was resumed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

__all__ = ["Step", "permute", "step_at", "steps_per_epoch"]

_ROUNDS = 6  # four give a pseudo-random permutation against chosen queries; two more for the simple round function


def permute(positions: np.ndarray, *, num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Sample ids [K] int64 at `positions` [K], each in [0, num_samples), of the epoch's order (epochs count from 0)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    out = np.asarray(positions, dtype=np.uint64)
    assert out.size == 0 or int(out.max()) < num_samples, "position outside the epoch"
    out = _feistel(out, keys, half_bits)
    outside = np.flatnonzero(out >= num_samples)
    while outside.size:  # the domain is at most four times too large, so a handful of turns
        out[outside] = _feistel(out[outside], keys, half_bits)
        outside = outside[out[outside] >= num_samples]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    out: np.ndarray = (left << shift) | right
    return out


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014). Overflow wraps, as it must."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Step:
    """Which samples an optimizer step trains on."""

    step: int  # counts from 1
    epoch: int  # counts from 1
    sample_ids: np.ndarray  # [K] int64, K = batch_size, less in the last step of an epoch
    position_start: int  # over the whole run: epoch * num_samples + position in the epoch
    position_end: int  # exclusive
    last_of_epoch: bool


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """The last step of an epoch takes what is left, so nothing is dropped or repeated."""
    return -(-num_samples // batch_size)


def step_at(step: int, *, num_samples: int, batch_size: int, seed: int) -> Step:
    """The samples of step `step` (from 1), from `(seed, step)` alone."""
    assert step >= 1, step
    per_epoch = steps_per_epoch(num_samples, batch_size)
    epoch, index = divmod(step - 1, per_epoch)
    start, end = index * batch_size, min((index + 1) * batch_size, num_samples)
    return Step(
        step=step,
        epoch=epoch + 1,
        sample_ids=permute(np.arange(start, end), num_samples=num_samples, seed=seed, epoch=epoch),
        position_start=epoch * num_samples + start,
        position_end=epoch * num_samples + end,
        last_of_epoch=index == per_epoch - 1,
    )
