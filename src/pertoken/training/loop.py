"""The loop around the step: epochs, evaluation, logging, checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from pertoken.config import Recipe
from pertoken.data.batch import collate, plan
from pertoken.data.order import Step, step_at
from pertoken.data.store import Store
from pertoken.errors import Interrupted, NonFiniteError, PertokenError
from pertoken.model.transformer import CausalLM
from pertoken.training.checkpoint import prune, save_checkpoint, set_best
from pertoken.training.evaluate import evaluate
from pertoken.training.metrics import Listener, MetricsFile, Row, Tracker, gradient_stats
from pertoken.training.optim import lr_at
from pertoken.training.step import NonFiniteStep, StepMetrics, TrainState, train_step
from pertoken.training.summary import Summary

__all__ = ["Run", "StopRequest", "fit", "stop_on_signals"]


@dataclass
class StopRequest:
    """Set by the first SIGINT or SIGTERM: finish the step, save, stop."""

    signal_number: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while inside; a second one stops at once."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal_number is not None:
            raise KeyboardInterrupt
        stop.signal_number = number

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may listen; elsewhere the caller's own handlers stay in charge
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """What a run is made of while it trains."""

    recipe: Recipe
    out_dir: Path
    model: CausalLM
    state: TrainState
    tokenizer: Any
    eos_token_id: int
    train_store: Store
    eval_store: Store | None
    start_step: int  # the last step already done
    total_steps: int
    token_budget: int  # per micro-batch; halved when CUDA runs out of memory
    best_eval_loss: float | None
    last_saved: int | None
    carried: dict[str, Any]  # what a checkpoint must know besides: recipe, fingerprints, versions
    metrics: MetricsFile
    trackers: dict[str, Tracker]
    summary: Summary
    listener: Listener


def fit(run: Run, stop: StopRequest) -> None:
    """Train from `run.start_step` to `run.total_steps`. Raises NonFiniteError or Interrupted, both after saving."""
    train, checkpoint = run.recipe.train, run.recipe.checkpoint
    for step in range(run.start_step + 1, run.total_steps + 1):
        this = _samples_of(run, step)
        row = _update(run, this)
        last = step == run.total_steps
        best = False
        if run.eval_store is not None and (last or _due(step, train.eval_interval, this)):
            best = _evaluate(run, run.eval_store, row)
        run.metrics.write(row)
        for tracker in run.trackers.values():
            tracker.log(row)
        run.listener.stepped(row, run.summary)
        stopping = stop.signal_number is not None
        if last or stopping or (best and checkpoint.keep_best) or _due(step, checkpoint.save_interval, this):
            folder = _save(run, step)
            if best and checkpoint.keep_best:
                set_best(run.out_dir, folder)
            prune(run.out_dir, keep_last=checkpoint.keep_last)
        if stopping and not last:
            assert stop.signal_number is not None
            name = signal.Signals(stop.signal_number).name
            raise Interrupted(f"stopped by {name} after step {step}, saved; go on with --resume", stop.signal_number)


def _due(step: int, interval: int | None, this: Step) -> bool:
    """Every `interval` steps, or at the end of each epoch where no interval is given."""
    return step % interval == 0 if interval else this.last_of_epoch


def _samples_of(run: Run, step: int) -> Step:
    train = run.recipe.train
    return step_at(step, num_samples=len(run.train_store), batch_size=train.batch_size, seed=train.seed)


def _update(run: Run, this: Step) -> Row:
    """One optimiser step, and its row."""
    train, store = run.recipe.train, run.train_store
    ids = this.sample_ids
    lr = lr_at(
        this.step,
        peak=train.learning_rate or 0.0,
        warmup_steps=train.warmup_steps,
        total_steps=run.total_steps,
        schedule=train.schedule,
        min_lr_ratio=train.min_lr_ratio,
        decay_ratio=train.decay_ratio,
    )
    start = time.perf_counter()
    metrics, micro_batches = _step_within_memory(run, this, lr)
    step_s = time.perf_counter() - start
    tokens = int(store.lengths[ids].sum())
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
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "positions": [this.position_start, this.position_end],
    }
    if metrics.loss_scale is not None:
        row |= {"loss_scale": metrics.loss_scale, "skipped": metrics.skipped}
    if metrics.skipped:
        run.listener.message(
            f"step {this.step}: the float16 gradient overflowed at loss scale {metrics.loss_scale:g}; "
            "update skipped, scale halved"
        )
    return row


def _step_within_memory(run: Run, this: Step, lr: float) -> tuple[StepMetrics, int]:
    """The step, in micro-batches that fit: on out-of-memory the budget is halved and the step done again."""
    store, ids = run.train_store, this.sample_ids
    on_gradients = None
    if run.recipe.log.grad_stats and this.step == run.start_step + 1:

        def on_gradients() -> None:
            run.listener.gradients(gradient_stats(run.model))

    while True:
        cut = plan(store.lengths[ids].tolist(), world_size=1, token_budget=run.token_budget)[0]
        try:
            metrics = train_step(
                run.state,
                [collate([store[int(i)] for i in ids[indices]]) for indices in cut],
                num_tokens=float(store.num_tokens[ids].sum()),
                num_routed=float(store.lengths[ids].sum()),
                lr=lr,
                max_norm=run.recipe.train.grad_clip,
                on_gradients=on_gradients,
            )
            return metrics, len(cut)
        except NonFiniteStep as problem:
            suspects = ids if problem.micro_batch is None else ids[cut[problem.micro_batch]]
            raise _non_finite(run, this.step, str(problem), suspects) from None
        except torch.OutOfMemoryError:
            if len(cut) == len(ids):
                raise PertokenError(
                    f"step {this.step}: out of memory with one sample in a micro-batch; lower data.max_seq_len, "
                    "or set train.activation_checkpointing=true"
                ) from None
        # Outside of the handler: its traceback would keep the failed step's activations alive.
        while len(plan(store.lengths[ids].tolist(), world_size=1, token_budget=run.token_budget)[0]) == len(cut):
            run.token_budget = max(1, run.token_budget // 2)
        if run.state.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        run.listener.message(
            f"step {this.step}: out of memory; train.micro_batch_tokens halved to {run.token_budget}, step done again"
        )


def _non_finite(run: Run, step: int, what: str, suspects: np.ndarray) -> NonFiniteError:
    """Keep the last good weights, and say which samples make the loss non-finite."""
    if run.last_saved != step - 1:
        _save(run, step - 1)
    guilty = [i for i in suspects if not _finite_alone(run, int(i))]
    named = [run.train_store.where(int(i)) for i in (guilty or suspects)]
    shown = ", ".join(named[:20]) + (f" and {len(named) - 20} more" if len(named) > 20 else "")
    return NonFiniteError(
        f"step {step}: {what}; the weights were not touched and step {step - 1} is saved. "
        f"{'Non-finite by itself' if guilty else 'Its samples'}: {shown}"
    )


@torch.no_grad()
def _finite_alone(run: Run, sample_id: int) -> bool:
    with run.state.precision.autocast():
        out = run.model(collate([run.train_store[sample_id]]).to(run.state.precision.device))
    return bool(out.loss_sum.isfinite())


def _evaluate(run: Run, store: Store, row: Row) -> bool:
    """Add the evaluation to `row`; true if it is the best so far."""
    run.listener.evaluating(row["step"])
    result = evaluate(run.state.model, store, run.state.precision, token_budget=run.token_budget)
    row["eval_loss"] = result.loss
    row["eval_perplexity"] = result.perplexity
    row["eval_bits_per_byte"] = result.bits_per_byte
    best = run.best_eval_loss is None or result.loss < run.best_eval_loss
    if best:
        run.best_eval_loss = result.loss
    return best


def _save(run: Run, step: int) -> Path:
    run.metrics.sync()
    run_ids = {name: tracker.run_id for name, tracker in run.trackers.items() if tracker.run_id}
    folder = save_checkpoint(
        run.out_dir,
        step=step,
        model=run.model,
        tokenizer=run.tokenizer,
        eos_token_id=run.eos_token_id,
        optimizer=run.state.optimizer,
        state={
            **run.carried,
            "scaler": run.state.scaler.state_dict(),
            "micro_batch_tokens": run.token_budget,
            "best_eval_loss": run.best_eval_loss,
            "tracker_run_ids": run_ids,
        },
    )
    run.last_saved = step
    run.listener.saved(folder)
    return folder
