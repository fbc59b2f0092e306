"""A micro-batch among rows that count for nothing, so that many micro-batches have one shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch

__all__ = ["Shape", "pad", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """What decides every size in a forward and backward pass."""

    tokens: int
    samples: int  # the padding is the last one that is not empty
    rows: int  # of the head
    longest: int  # no sample is longer


def shape_of(micro_batch: MicroBatch) -> Shape:
    """The next of few sizes: padding is at least one token, at most 64 or an eighth of the tokens, and at most 64 or a
    quarter of the head's rows."""
    tokens = _round_up(sum(micro_batch.lengths) + 1, sixteenths=2)
    padding = tokens - sum(micro_batch.lengths)
    return Shape(
        tokens=tokens,
        samples=_power_of_two(len(micro_batch.lengths) + 1),
        rows=min(tokens, _round_up(len(micro_batch.supervised_rows()), sixteenths=4)),
        longest=max(128, _power_of_two(max((*micro_batch.lengths, padding)))),
    )


def pad(micro_batch: MicroBatch, shape: Shape) -> MicroBatch:
    """`micro_batch`, on the host, in `shape`, which is `shape_of` of it or of another.

    The padding is a sample of its own whose tokens weigh nothing, followed by empty ones; the head's rows are filled up
    with its last row. The mask becomes weights, for padded rows of the head are told from others by nothing else.
    """
    tokens = sum(micro_batch.lengths)
    padding = shape.tokens - tokens
    rows = micro_batch.supervised_rows()
    assert padding > 0, (shape, tokens)

    def filled(x: Tensor, value: int = 0) -> Tensor:
        return torch.cat((x, x.new_full((padding,), value)))

    empty = shape.samples - len(micro_batch.lengths) - 1
    return MicroBatch(
        input_ids=filled(micro_batch.input_ids),
        labels=filled(micro_batch.labels),
        loss_mask=filled(micro_batch.loss_mask.to(torch.float32)),
        position_ids=torch.cat((micro_batch.position_ids, torch.arange(padding))),
        cu_seqlens=torch.cat((micro_batch.cu_seqlens, micro_batch.cu_seqlens.new_full((empty + 1,), shape.tokens))),
        lengths=(*micro_batch.lengths, padding, *([0] * empty)),
        supervised=torch.cat((rows, rows.new_full((shape.rows - len(rows),), shape.tokens - 1))),
        longest=shape.longest,
    )


def _round_up(number: int, *, sixteenths: int) -> int:
    """To a multiple of that part of the power of two not above `number`, and of 64."""
    step = max(64, sixteenths << max(0, number.bit_length() - 5))
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    power = 1
    while power < number:
        power *= 2
    return power
