"""The loop around the step: epochs, evaluation, logging, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pertoken.checkpoints.write import Progress, Saver
from pertoken.data.batch.order import Step, step_at
from pertoken.data.batch.share import Share, share_of
from pertoken.data.store.store import Store
from pertoken.errors import CheckpointError, Interrupted, NonFiniteError, PertokenError, SpikeError
from pertoken.kernels.memory import forget_blocks
from pertoken.model.decoder import CausalLM
from pertoken.recipe.schema import Recipe
from pertoken.runs.keeping import keep_last_step, note_save_result, save
from pertoken.runs.probe import Probe
from pertoken.runs.reports import non_finite_error, spike_error, spike_message
from pertoken.runs.signals import StopRequest
from pertoken.runs.spikes import Spikes, SpikeStep
from pertoken.runs.summary import Summary
from pertoken.tracking.listening import Heard
from pertoken.tracking.metrics import Listener, MetricsFile, Row, Tracker, gradient_stats, routing_of
from pertoken.training.evaluate import evaluate
from pertoken.training.memory import memory_problem, out_of_memory
from pertoken.training.optim import lr_at
from pertoken.training.parallel import World
from pertoken.training.step import NonFiniteStep, StepMetrics, TrainState, train_step

__all__ = ["Run", "fit", "samples_of", "update"]


@dataclass
class Run:
    """What a run is made of while it trains."""

    recipe: Recipe
    out_dir: Path
    model: CausalLM
    state: TrainState
    world: World
    tokenizer: Any
    eos_token_id: int
    train_store: Store
    eval_store: Store | None
    start_step: int  # the last step already done
    total_steps: int
    token_budget: int  # per micro-batch; halved when memory ends
    best_eval_loss: float | None
    last_checkpoint: Path | None
    last_saved: int | None  # its step
    saver: Saver
    probe: Probe
    spikes: Spikes
    checkpoint_meta: dict[str, Any]  # what a checkpoint must know besides: recipe, fingerprints, versions
    metrics: MetricsFile | None  # as trackers and listener, on rank 0 alone
    trackers: dict[str, Tracker]
    summary: Summary
    listener: Listener
    started_s: float  # time.monotonic()
    whole_step: int = 0  # the last one with weights, optimizer and row in place, unless `state.changed` since


def fit(run: Run, stop: StopRequest) -> int:
    """Train from `run.start_step` to `run.total_steps`; the last step done, which is earlier if time is up.

    Raises NonFiniteError, SpikeError or Interrupted, all after saving, and CheckpointError where the last save failed:
    one before it is a message, since the next may succeed. Whatever else ends it, the last whole step is saved first,
    but for KeyboardInterrupt: a second signal waits for nothing. What the listener raises ends it after the step.
    """
    run.whole_step, listener = run.start_step, Heard(run.listener)
    run.listener = listener
    try:
        last = _fit(run, stop, listener)
    except (KeyboardInterrupt, NonFiniteError, SpikeError, Interrupted, CheckpointError):
        raise
    except BaseException as error:
        error.add_note(keep_last_step(run))
        raise
    if listener.problem is not None:
        raise listener.problem
    return last


def _fit(run: Run, stop: StopRequest, listener: Heard) -> int:
    train, checkpoint = run.recipe.train, run.recipe.checkpoint
    for step in range(run.start_step + 1, run.total_steps + 1):
        this = samples_of(run, step)
        try:
            row = update(run, this, skips=partial(run.spikes.skips, world=run.world))
        except (NonFiniteStep, SpikeStep) as problem:
            raise _given_up(run, this, problem) from None
        last = step == run.total_steps
        best = False
        try:
            _watch_norm(run, this, row)
            if run.eval_store is not None and (last or _due(step, train.eval_interval, this)):
                best = _evaluate(run, run.eval_store, row)
        finally:  # the step is made, whatever becomes of what is said of it, and of its evaluation
            _log(run, row)
            run.whole_step, run.state.changed = step, False
        asked = _sync_requests(run, stop, listener)
        stopping = last or asked.signal_number is not None or asked.time_is_up or asked.listener_failed
        is_best = best and checkpoint.keep_best
        if stopping or asked.save or is_best or _due(step, checkpoint.save_interval, this):
            save(run, step, is_best=is_best, last=stopping)
        if asked.listener_failed:
            raise listener.problem or PertokenError(f"stopped after step {step}, saved: the listener of rank 0 failed")
        if asked.signal_number is not None and not last:
            name = signal.Signals(asked.signal_number).name
            raise Interrupted(f"stopped by {name} after step {step}, saved; go on with --resume", asked.signal_number)
        if stopping:
            if not last:
                run.listener.message(
                    f"train.max_minutes={train.max_minutes:g}: stopped after step {step} of {run.total_steps}, saved; "
                    "go on with --resume"
                )
            return step
    return run.total_steps  # all done before


def _log(run: Run, row: Row) -> None:
    """The row to everyone who is told. What cannot be written costs no training."""
    if run.metrics is not None and (error := run.metrics.write(row)) is not None:
        run.listener.message(f"step {row['step']}: metrics.jsonl: {error}; its rows are kept until they can be written")
    for name, tracker in list(run.trackers.items()):
        try:
            tracker.log(row)
        except Exception as error:  # whatever a foreign package raises
            del run.trackers[name]
            run.listener.message(f"step {row['step']}: log.trackers: {name} gets no more rows ({error})")
    run.listener.stepped(row, run.summary)


@dataclass(frozen=True)
class _Asked:
    """What any rank was asked for: all do the same after the same step."""

    signal_number: int | None
    save: bool
    time_is_up: bool
    listener_failed: bool


def _sync_requests(run: Run, stop: StopRequest, listener: Heard) -> _Asked:
    """One message between ranks a step: requests, and how far each is with a save in the background."""
    minutes = run.recipe.train.max_minutes
    late = minutes is not None and time.monotonic() - run.started_s >= 60 * minutes
    flags, failed = (stop.signal_number or 0, stop.save, late), listener.problem is not None
    mine: tuple[tuple[int, bool, bool], bool, Progress] = (flags, failed, run.saver.progress)
    of_all = run.world.gather(mine)
    note_save_result(run, run.saver.advance([progress for *_, progress in of_all]))
    numbers, saves, lates = zip(*(flags for flags, *_ in of_all), strict=True)
    asked = _Asked(max(numbers) or None, any(saves), any(lates), any(failed for _, failed, _ in of_all))
    if asked.save:
        stop.save = False
    return asked


def _due(step: int, interval: int | None, this: Step) -> bool:
    """Every `interval` steps, or at the end of each epoch where no interval is given."""
    return step % interval == 0 if interval else this.last_of_epoch


def samples_of(run: Run, step: int) -> Step:
    """Which samples step `step` takes."""
    train = run.recipe.train
    return step_at(step, num_samples=len(run.train_store), batch_size=train.batch_size, seed=train.seed)


def update(run: Run, this: Step, *, skips: Callable[[float], bool], lr: float | None = None) -> Row:
    """One optimizer step, and its row. `lr` is the schedule's if not given, `skips` is `train_step`'s.

    Raises what `train_step` raises, with nothing changed or written.
    """
    store, ids = run.train_store, this.sample_ids
    lr = _scheduled_lr(run, this.step) if lr is None else lr
    run.state.changed, start = False, time.perf_counter()
    metrics, micro_batches = _step_within_memory(run, this, lr, skips)
    step_s = time.perf_counter() - start
    tokens = int(store.lengths[ids].sum())
    padding, operations = metrics.sums["padding"]
    row: Row = {
        "step": this.step,
        "epoch": this.epoch,
        "loss": metrics.loss_sum / metrics.num_tokens,
        "loss_sum": metrics.loss_sum,
        "num_tokens": int(store.num_tokens[ids].sum()),
        "aux_loss": 0.0,
        "grad_norm": metrics.grad_norm,
        "lr": lr,
        "samples": len(ids),
        "tokens": tokens,
        "micro_batches": micro_batches,
        "padding_share": float(padding) / operations,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "positions": [this.position_start, this.position_end],
    }
    row |= routing_of(metrics.sums)
    for term in run.state.objective.row_terms:
        total, count = metrics.sums[term.name]
        row[term.name] = float(total) / count
    if metrics.loss_scale is not None:
        row["loss_scale"] = metrics.loss_scale
    if metrics.skipped or metrics.loss_scale is not None:
        row["skipped"] = metrics.skipped
    if not math.isfinite(metrics.grad_norm):
        run.listener.message(
            f"step {this.step}: the float16 gradient overflowed at loss scale {metrics.loss_scale:g}; "
            "update skipped, scale halved"
        )
    return row


def _scheduled_lr(run: Run, step: int) -> float:
    train = run.recipe.train
    return lr_at(
        step,
        peak=train.learning_rate or 0.0,
        warmup_steps=train.warmup_steps,
        total_steps=run.total_steps,
        schedule=train.schedule,
        min_lr_ratio=train.min_lr_ratio,
        decay_ratio=train.decay_ratio,
    )


def _step_within_memory(run: Run, this: Step, lr: float, skips: Callable[[float], bool]) -> tuple[StepMetrics, int]:
    """The step, in micro-batches that fit: on out-of-memory the budget is halved and the step done again.

    Not where the update itself had begun, since some weights may have changed, and not with several ranks, where the
    others are further on and wait for this one.
    """
    on_gradients = None
    if run.recipe.log.grad_stats and this.step == run.start_step + 1:

        def on_gradients() -> None:
            run.listener.gradients(gradient_stats(run.model))

    while True:
        share = _share_of(run, this)
        try:
            metrics = train_step(
                run.state,
                share,
                lr=lr,
                max_norm=run.recipe.train.grad_clip,
                on_gradients=on_gradients,
                skips=skips,
            )
            return metrics, len(share.micro_batches) * run.world.size
        except Exception as error:
            if not out_of_memory(error):
                raise
            smallest = len(share.micro_batches) == len(this.sample_ids)
            if run.state.changed or smallest or run.world.size > 1:
                problem = memory_problem(updated=run.state.changed, world=run.world, token_budget=run.token_budget)
                raise PertokenError(f"step {this.step}: {problem}") from None
        # Outside of the handler: its traceback would keep the failed step's activations alive.
        while len(_share_of(run, this).micro_batches) == len(share.micro_batches):
            run.token_budget = max(1, run.token_budget // 2)
        forget_blocks()
        if run.state.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        run.listener.message(
            f"step {this.step}: out of memory; train.micro_batch_tokens halved to {run.token_budget}, step done again"
        )


def _share_of(run: Run, this: Step, rank: int | None = None) -> Share:
    return share_of(
        run.train_store,
        this.sample_ids,
        token_budget=run.token_budget,
        rank=run.world.rank if rank is None else rank,
        world_size=run.world.size,
    )


def _given_up(run: Run, this: Step, problem: NonFiniteStep | SpikeStep) -> PertokenError:
    """Keep the last good weights, and say why this step was not made."""
    note_save_result(run, run.saver.wait())
    saved = f"step {this.step - 1} is saved"
    if run.last_saved != this.step - 1:
        try:
            save(run, this.step - 1, last=True)
        except CheckpointError as error:
            saved = str(error)
    if isinstance(problem, SpikeStep):
        return spike_error(this, problem, run.train_store, run.out_dir, saved)
    suspects = this.sample_ids
    if problem.micro_batch is not None:
        rank, index = problem.micro_batch
        suspects = _share_of(run, this, rank).sample_ids[index]
    return non_finite_error(this, problem, suspects, run.state, run.model, run.train_store, run.out_dir, saved)


def _watch_norm(run: Run, this: Step, row: Row) -> None:
    """Say it if this step's gradient norm is an outlier, and remember the norm for the steps to come."""
    ratio = run.spikes.ratio(row["grad_norm"])
    try:
        if ratio is not None:
            row["spike"] = ratio
            run.listener.message(spike_message(this, run.spikes, row, run.train_store, run.out_dir))
    finally:
        run.spikes.remember(row["grad_norm"])


def _evaluate(run: Run, store: Store, row: Row) -> bool:
    """Add the evaluation to `row`; true if it is the best so far."""
    run.listener.evaluating(row["step"])
    result = evaluate(run.state.model, store, run.state.precision, token_budget=run.token_budget, world=run.world)
    row["eval_loss"] = result.loss
    row["eval_perplexity"] = result.perplexity
    row["eval_bits_per_byte"] = result.bits_per_byte
    best = run.best_eval_loss is None or result.loss < run.best_eval_loss
    if best:
        run.best_eval_loss = result.loss
    return best
