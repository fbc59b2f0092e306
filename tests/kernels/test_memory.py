"""Blocks are used again, never by two at once, and never grow beyond need."""

from __future__ import annotations

import pytest
import torch

from pertoken.kernels import memory
from pertoken.kernels.memory import empty, forget_blocks


@pytest.fixture(autouse=True)
def fresh():
    forget_blocks()
    yield
    forget_blocks()


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_a_block_serves_again_once_nobody_holds_it():
    first = empty(1024, 512, dtype=torch.float32)
    where = address(first)
    view = first[3:5]
    del first
    second = empty(1024, 512, dtype=torch.float32)  # the view still holds the block
    assert address(second) != where
    del view
    assert address(empty(1000, 512, dtype=torch.float32)) == where


def test_what_autograd_keeps_is_not_given_out_again():
    leaf = torch.ones(1024, 512, requires_grad=True)
    kept = empty(1024, 512, dtype=torch.float32).fill_(3.0)
    out = (leaf * kept).sum()
    del kept
    empty(1024, 512, dtype=torch.float32).fill_(5.0)
    out.backward()
    assert torch.equal(leaf.grad, torch.full((1024, 512), 3.0))


def test_growing_tensors_replace_the_blocks_they_outgrow():
    for rows in range(1024, 2048, 64):
        tensors = [empty(rows, 512, dtype=torch.float32) for _ in range(3)]
        assert len({address(x) for x in tensors}) == 3
        del tensors
    assert len(memory._blocks) == 3
    assert sum(block.nbytes() for block in memory._blocks) <= 3 * 2048 * 512 * 4 * 1.25


def test_small_tensors_are_plain_ones():
    empty(10, 10, dtype=torch.float32)
    assert memory._blocks == []
