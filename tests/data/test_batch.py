"""Samples, flat micro-batches and the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.data.batch.pack import MicroBatch, Sample, collate, pack_micro_batches


def sample(tokens: list[int], mask: list[float] | None = None) -> Sample:
    loss_mask = np.ones(len(tokens) - 1, dtype=bool) if mask is None else np.array(mask)
    return Sample(np.array(tokens, dtype=np.int32), loss_mask)


def test_labels_are_the_next_tokens():
    s = sample([5, 6, 7, 8])
    assert s.input_ids.tolist() == [5, 6, 7]
    assert s.labels.tolist() == [6, 7, 8]
    assert len(s) == 3


def test_collate_lays_samples_side_by_side():
    batch = collate([sample([1, 2, 3], [False, True]), sample([9, 8], [True])])
    assert batch.input_ids.tolist() == [1, 2, 9]
    assert batch.labels.tolist() == [2, 3, 8]
    assert batch.loss_mask.tolist() == [False, True, True]
    assert batch.position_ids.tolist() == [0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == (2, 1)
    assert batch.num_samples == 2


def test_one_float_mask_makes_the_row_weights():
    batch = collate([sample([1, 2, 3]), sample([9, 8], [0.25])])
    assert batch.loss_mask.dtype == torch.float32
    assert batch.loss_mask.tolist() == [1.0, 1.0, 0.25]


def test_no_samples_make_an_empty_micro_batch():
    batch = collate([])
    assert batch.input_ids.shape == (0,)
    assert batch.input_ids.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0]


def test_a_micro_batch_of_unequal_rows_is_refused():
    rows = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="loss_mask"):
        MicroBatch(rows, rows, torch.ones(2, dtype=torch.bool), rows, torch.tensor([0, 3]), (3,))


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    world_size=st.integers(1, 5),
    token_budget=st.integers(1, 1000),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_seats_every_sample_once_within_the_budget(lengths, world_size, token_budget):
    ranks = pack_micro_batches(lengths, world_size=world_size, token_budget=token_budget)
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1, "ranks must stay in step"
    assert sorted(i for rank in ranks for cut in rank for i in cut) == list(range(len(lengths)))
    for rank in ranks:
        for cut in rank:
            assert sum(lengths[i] for i in cut) <= token_budget or len(cut) == 1
            assert [lengths[i] for i in cut] == sorted((lengths[i] for i in cut), reverse=True)


def test_a_plan_is_as_short_and_as_even_as_can_be():
    (cuts,) = pack_micro_batches([100] * 10, world_size=1, token_budget=900)
    assert [len(c) for c in cuts] == [5, 5]


def test_a_plan_balances_ranks():
    lengths = np.random.default_rng(0).integers(10, 400, 64).tolist()
    loads = [
        sum(lengths[i] for cut in rank for i in cut)
        for rank in pack_micro_batches(lengths, world_size=4, token_budget=2000)
    ]
    assert max(loads) <= 1.05 * min(loads)


def test_more_ranks_than_samples_leaves_ranks_with_empty_micro_batches():
    ranks = pack_micro_batches([5], world_size=3, token_budget=10)
    assert ranks == [[[0]], [[]], [[]]]
