"""The order of samples is a permutation, found by number."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from pertoken.data.batch.order import permute, step_at, steps_per_epoch


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), num_samples=n, seed=seed, epoch=epoch)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 101, 1000, 4097])
def test_every_sample_exactly_once(n):
    assert sorted(order(n).tolist()) == list(range(n))


def test_depends_on_seed_and_epoch_alone():
    assert np.array_equal(order(1000), order(1000))
    for other in (order(1000, seed=1), order(1000, epoch=1)):
        assert (order(1000) == other).mean() < 0.02


def test_random_access_equals_the_whole_order():
    whole = order(1001)
    for positions in ([0], [1000], [5, 3, 999, 3]):
        assert permute(np.array(positions), num_samples=1001, seed=0, epoch=0).tolist() == whole[positions].tolist()


@pytest.mark.parametrize("n", [101, 1000, 4096])
def test_looks_shuffled(n):
    """No more fixed points, neighbors or drift than a random permutation has, at five standard deviations."""
    for seed in range(5):
        perm = order(n, seed=seed)
        assert (perm == np.arange(n)).sum() <= 8  # Poisson with mean 1
        assert (np.diff(perm) == 1).sum() <= 8
        correlation = np.corrcoef(perm, np.arange(n))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(n)


def test_all_orders_of_a_tiny_set_occur():
    seen = {tuple(order(3, seed=seed).tolist()) for seed in range(200)}
    assert len(seen) == 6


@pytest.mark.parametrize(("n", "batch_size"), [(101, 8), (8, 8), (7, 8), (1, 1), (16, 5)])
def test_an_epochs_steps_take_every_sample_once_and_the_last_is_smaller(n, batch_size):
    per_epoch = steps_per_epoch(n, batch_size)
    for epoch in (1, 2):
        steps = [
            step_at(s, num_samples=n, batch_size=batch_size, seed=3)
            for s in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1)
        ]
        assert sorted(np.concatenate([s.sample_ids for s in steps]).tolist()) == list(range(n))
        assert all(len(s.sample_ids) == batch_size for s in steps[:-1])
        assert [s.last_of_epoch for s in steps] == [False] * (per_epoch - 1) + [True]
        assert {s.epoch for s in steps} == {epoch}
        assert steps[0].position_start == (epoch - 1) * n
        assert steps[-1].position_end == epoch * n
        assert all(a.position_end == b.position_start for a, b in itertools.pairwise(steps))


def test_every_epoch_has_an_order_of_its_own():
    first, second = (step_at(s, num_samples=101, batch_size=101, seed=3).sample_ids for s in (1, 2))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_a_far_step_is_found_as_fast_as_the_first():
    def seconds(step: int) -> float:
        start = time.perf_counter()
        for _ in range(20):
            step_at(step, num_samples=10**9, batch_size=64, seed=0)
        return time.perf_counter() - start

    seconds(1)
    assert min(seconds(10**7) for _ in range(5)) < 5 * min(seconds(1) for _ in range(5))
