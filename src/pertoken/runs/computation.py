"""One step of a run, from its samples to its row: what training, a replay and the proof all make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pertoken.data.batch.order import Step, step_at
from pertoken.data.batch.sample import as_count
from pertoken.data.batch.share import Share, share_of
from pertoken.data.store.dataset import Dataset
from pertoken.errors import PertokenError
from pertoken.kernels.memory import forget_blocks
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.schema import Recipe
from pertoken.tracking.reporter import Reporter
from pertoken.tracking.rows import StepRow
from pertoken.training.memory import memory_problem, out_of_memory
from pertoken.training.schedule import count_warmup_steps, lr_at
from pertoken.training.step import StepMetrics, TrainState, train_step

__all__ = ["Computation", "rank_share", "samples_of", "update"]


@dataclass
class Computation:
    """What a step is computed from."""

    recipe: Recipe
    model: LanguageModel
    state: TrainState
    store: Dataset  # of the training data
    total_steps: int
    token_budget: int  # per micro-batch; halved when memory ends
    reporter: Reporter


def samples_of(computation: Computation, step: int) -> Step:
    """Which samples step `step` takes."""
    train = computation.recipe.train
    return step_at(step, num_samples=len(computation.store), batch_size=train.batch_size, seed=train.seed)


def rank_share(computation: Computation, this: Step, rank: int | None = None) -> Share:
    """The part of the step that a rank computes; of this process's rank if not given."""
    world = computation.state.world
    return share_of(
        computation.store,
        this.sample_ids,
        token_budget=computation.token_budget,
        rank=world.rank if rank is None else rank,
        world_size=world.size,
    )


def update(
    computation: Computation,
    this: Step,
    *,
    skips: Callable[[float], bool],
    lr: float | None = None,
    on_gradients: Callable[[], None] | None = None,
) -> StepRow:
    """One optimizer step, and its row. `lr` is the schedule's if not given; the rest is `train_step`'s.

    Raises what `train_step` raises, with nothing changed or written.
    """
    store, ids = computation.store, this.sample_ids
    lr = _scheduled_lr(computation, this.step) if lr is None else lr
    computation.state.changed, start = False, time.perf_counter()
    metrics, micro_batches = _step_within_memory(computation, this, lr, skips, on_gradients)
    step_s = time.perf_counter() - start
    tokens = int(store.lengths[ids].sum())
    padding, operations = metrics.sums["padding"]
    row = StepRow(
        step=this.step,
        epoch=this.epoch,
        loss=metrics.loss_sum / metrics.num_tokens,
        loss_sum=metrics.loss_sum,
        num_tokens=as_count(store.num_tokens[ids].sum()),
        aux_loss=0.0,
        grad_norm=metrics.grad_norm,
        lr=lr,
        samples=len(ids),
        tokens=tokens,
        micro_batches=micro_batches,
        padding_share=float(padding) / operations,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        positions=[this.position_start, this.position_end],
        loss_scale=metrics.loss_scale,
        skipped=metrics.skipped if metrics.skipped or metrics.loss_scale is not None else None,
    )
    row.add_routing(metrics.sums)
    for term in computation.state.objective.row_terms:
        total, count = metrics.sums[term.name]
        row.row_terms[term.name] = float(total) / count
    if not math.isfinite(metrics.grad_norm):
        computation.reporter.report(
            "loss_scale_overflow",
            f"step {this.step}: the float16 gradient overflowed at loss scale {metrics.loss_scale:g}; "
            "update skipped, scale halved",
            loss_scale=metrics.loss_scale,
        )
    return row


def _scheduled_lr(computation: Computation, step: int) -> float:
    train, total_steps = computation.recipe.train, computation.total_steps
    warm = count_warmup_steps(total_steps, warmup_steps=train.warmup_steps, warmup_ratio=train.warmup_ratio)
    return lr_at(
        step,
        peak=train.learning_rate or 0.0,
        warmup_steps=warm,
        total_steps=total_steps,
        schedule=train.schedule,
        min_lr_ratio=train.min_lr_ratio,
        decay_ratio=train.decay_ratio,
    )


def _step_within_memory(
    computation: Computation,
    this: Step,
    lr: float,
    skips: Callable[[float], bool],
    on_gradients: Callable[[], None] | None,
) -> tuple[StepMetrics, int]:
    """The step, in micro-batches that fit: on out-of-memory the budget is halved and the step done again.

    Not where the update itself had begun, since some weights may have changed, and not with several ranks, where the
    others are further on and wait for this one.
    """
    state, world = computation.state, computation.state.world
    while True:
        share = rank_share(computation, this)
        try:
            metrics = train_step(
                state,
                share,
                lr=lr,
                max_norm=computation.recipe.train.grad_clip,
                on_gradients=on_gradients,
                skips=skips,
            )
            return metrics, len(share.micro_batches) * world.size
        except Exception as error:
            if not out_of_memory(error):
                raise
            smallest = len(share.micro_batches) == len(this.sample_ids)
            if state.changed or smallest or world.size > 1:
                problem = memory_problem(updated=state.changed, world=world, token_budget=computation.token_budget)
                raise PertokenError(f"step {this.step}: {problem}") from None
        # Outside of the handler: its traceback would keep the failed step's activations alive.
        while len(rank_share(computation, this).micro_batches) == len(share.micro_batches):
            computation.token_budget = max(1, computation.token_budget // 2)
        forget_blocks()
        if state.graphs is not None:
            state.graphs.clear()
        if state.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        budget = computation.token_budget
        computation.reporter.report(
            "memory_halved",
            f"step {this.step}: out of memory; train.micro_batch_tokens halved to {budget}, step done again",
            micro_batch_tokens=budget,
        )
