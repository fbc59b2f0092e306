"""What is said before the first step: counts, an example, and how long it may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import Share, share_of
from pertoken.data.store.store import Store
from pertoken.data.view import supervised_pieces
from pertoken.model.decoder import CausalLM
from pertoken.recipe.schema import Recipe
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import synchronized
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """What is about to be trained."""

    stage: str
    out_dir: Path
    device: str
    dtype: str
    num_parameters: int
    num_active_parameters: int  # what one token's way leads through: fewer only where there are experts
    family: str
    num_samples: int
    num_eval_samples: int
    num_tokens: int  # supervised, in an epoch
    total_tokens: int  # all inputs, in an epoch
    data_notes: tuple[str, ...]  # what was skipped, dropped or cut while preparing
    batch_size: int
    micro_batches: int  # of the first step, on each rank
    padding_share: float  # of the operations of this rank's part of the first step
    world_size: int
    epochs: int
    start_step: int  # the last step already done
    total_steps: int
    expected_s: float
    example_source: str  # file:line
    example: tuple[tuple[str, bool], ...]  # pieces of the first sample's text: (text, supervised)


def summarize(
    recipe: Recipe,
    store: Store,
    eval_store: Store | None,
    tokenizer: Any,
    model: CausalLM,
    state: TrainState,
    *,
    token_budget: int,
    start_step: int,
    total_steps: int,
) -> Summary:
    """Of a run that is about to take step `start_step + 1`. Computes a few samples to see how long they take."""
    train = recipe.train
    first = step_at(start_step + 1, num_samples=len(store), batch_size=train.batch_size, seed=train.seed)
    share = share_of(
        store, first.sample_ids, token_budget=token_budget, rank=state.world.rank, world_size=state.world.size
    )
    epochs = total_steps / steps_per_epoch(len(store), train.batch_size)
    tokens_left = float(store.lengths.sum()) * epochs * max(0.0, 1 - start_step / total_steps)
    example = int(first.sample_ids[0])
    return Summary(
        stage=recipe.stage,
        out_dir=Path(recipe.out_dir),
        device=str(state.precision.device),
        dtype=state.precision.dtype,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        family=model.config.family,
        num_samples=len(store),
        num_eval_samples=len(eval_store) if eval_store is not None else 0,
        num_tokens=int(store.num_tokens.sum()),
        total_tokens=int(store.lengths.sum()),
        data_notes=tuple(store.report.notes()),
        batch_size=train.batch_size,
        micro_batches=len(share.micro_batches),
        padding_share=_padding_share(model, share, state.precision),
        world_size=state.world.size,
        epochs=-(-total_steps // steps_per_epoch(len(store), train.batch_size)),
        start_step=start_step,
        total_steps=total_steps,
        expected_s=tokens_left * _seconds_per_token(state, store, first.sample_ids) / state.world.size,
        example_source=store.where(example),
        example=tuple(supervised_pieces(store[example], tokenizer)),
    )


def _padding_share(model: CausalLM, share: Share, precision: Precision) -> float:
    with precision.autocast():  # attention's form depends on what it would be given
        counts = [model.padding(micro_batch.to(precision.device)) for micro_batch in share.micro_batches]
    operations = sum(float(of_all) for _, of_all in counts)
    return sum(float(on_padding) for on_padding, _ in counts) / operations if operations else 0.0


def _seconds_per_token(state: TrainState, store: Store, sample_ids: np.ndarray) -> float:
    """Of a forward and backward pass over a few real samples, timed the second time; the gradients are thrown away.

    Every rank passes the same samples. DDP settles the order of its messages in the first passes that it synchronizes:
    done here, sums over ranks round in the same way in every step, before and after a resume.
    """
    chosen: list[Sample] = []
    tokens = 0
    for i in sample_ids:
        if chosen and tokens + int(store.lengths[i]) > 1024:
            break
        chosen.append(store[int(i)])
        tokens += int(store.lengths[i])
    precision = state.precision
    micro_batch = collate(chosen).to(precision.device)

    def pass_once() -> None:
        with synchronized(state.model, now=True):
            with precision.autocast():
                out = state.model(micro_batch, objective=state.objective)
            out.objective({term.denominator: 1.0 for term in out.terms.values()}).backward()
        state.model.zero_grad(set_to_none=True)
        if precision.device.type == "cuda":
            torch.cuda.synchronize(precision.device)

    try:
        pass_once()
        start = time.perf_counter()
        pass_once()
    except Exception as error:
        if not out_of_memory(error):
            raise
        state.model.zero_grad(set_to_none=True)
        return math.nan  # the step itself knows what to do about it
    return (time.perf_counter() - start) / tokens
