"""A row of `metrics.jsonl`: the figures of one step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pertoken.objective.choose import ROW_TERMS

__all__ = ["ROWS_VERSION", "StepRow"]

ROWS_VERSION = 1
"""Of the lines of `metrics.jsonl` and `events.jsonl`, in the run's `.pertoken.json`: a number in every row would cost
every row, and in a first line would make row N line N + 1. Raised when a key changes its meaning, not for a new key."""


@dataclass(kw_only=True)
class StepRow:
    """One step. Fields stand in the order of the file's keys.

    A figure that is not finite is null in the file. The keys of fields that may be None are left out there, but for
    the six that every row has, which are null in a row that a resume had to rebuild.
    """

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # nats per supervised token
    loss_sum: float  # nats
    num_tokens: int | float  # supervised: the sum of their weights, an int where it is whole
    aux_loss: float | None = None  # a mixture's balance loss before its coefficient, summed over layers; 0 if dense
    grad_norm: float  # before clipping
    lr: float
    samples: int
    tokens: int | None = None  # inputs
    micro_batches: int | None = None  # on all ranks
    padding_share: float | None = None  # of the operations, on padding
    step_s: float | None = None
    tokens_per_s: float | None = None
    positions: list[int]  # [first, one past the last) in the order of samples
    expert_load: list[float] | None = None  # each expert's share of the routed tokens, averaged over layers
    expert_max_share: list[float] | None = None  # its largest share in any layer
    max_expert_share: float | None = None  # the largest of all
    loss_scale: float | None = None  # float16 only
    skipped: bool | None = None  # the update was; None: it was not, and there is no loss scale
    spike: float | None = None  # the norm over the median of the steps before, where that is too much
    eval_loss: float | None = None  # nats per supervised token
    eval_perplexity: float | None = None
    eval_bits_per_byte: float | None = None
    eval_sources: dict[str, float] | None = None  # the evaluation loss of each of [[data.sources]], by its name
    # By its own key in the file: the mean over supervised tokens of each term beside the cross entropy, before its
    # coefficient.
    row_terms: dict[str, float] = field(default_factory=dict)
    rebuilt: bool | None = None  # from a checkpoint, by a resume that found the row missing

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= values.pop("row_terms")
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
            if value is not None or name in _IN_EVERY_ROW
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepRow | None:
        """The row in an object of the file; None where a figure is missing or of another type, as in a lost row."""
        numbers = {name: math.nan if name in _NUMBERS and value is None else value for name, value in values.items()}
        numbers["row_terms"] = {name: numbers[name] for name in ROW_TERMS if isinstance(numbers.get(name), float)}
        try:
            return _adapter().validate_json(json.dumps(numbers), strict=True)
        except ValidationError:
            return None

    def add_routing(self, sums: dict[str, tuple[np.ndarray, float]]) -> None:
        """A mixture's part of the row, from a step's (sum, count) metrics; nothing for a dense model."""
        if "aux_loss" in sums:
            aux_sum, num_input_tokens = sums["aux_loss"]
            self.aux_loss = float(aux_sum) / num_input_tokens
        if "expert_load" in sums:
            load_LE, choices = sums["expert_load"]
            share_LE = load_LE / choices
            self.expert_load = [round(float(x), 5) for x in share_LE.mean(0)]
            self.expert_max_share = [round(float(x), 5) for x in share_LE.max(0)]
            self.max_expert_share = float(share_LE.max())


_NUMBERS = ("loss", "loss_sum", "grad_norm", "lr")
_IN_EVERY_ROW = {"aux_loss", "tokens", "micro_batches", "padding_share", "step_s", "tokens_per_s"}


@cache
def _adapter() -> TypeAdapter[StepRow]:
    return TypeAdapter(StepRow)
