"""What a listener is told before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """What is about to be trained."""

    stage: str
    out_dir: Path
    device: str
    dtype: str
    num_parameters: int
    num_active_parameters: int  # what one token's way leads through: fewer only where there are experts
    num_trained_parameters: int  # fewer where some are frozen
    family: str
    engine: str  # "plain", "cpu" or "compile"
    engine_note: str  # what it is, or why there is no faster one
    num_samples: int
    num_eval_samples: int
    num_tokens: int | float  # supervised, in an epoch: the sum of their weights
    total_tokens: int  # all inputs, in an epoch
    data_notes: tuple[str, ...]  # what was skipped, dropped or cut while preparing
    batch_size: int
    micro_batches: int  # of the first step, on each rank
    padding_share: float  # of the operations of this rank's part of the first step
    world_size: int
    epochs: int | float
    start_step: int  # the last step already done
    total_steps: int
    expected_s: float
    example_source: str  # file:line
    example: tuple[tuple[str, bool], ...]  # pieces of the first sample's text: (text, supervised)
