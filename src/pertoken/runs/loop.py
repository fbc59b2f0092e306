"""The loop around the step: evaluation, rows, checkpoints, and when to stop."""

from __future__ import annotations

import signal
import time
from functools import partial

from pertoken.checkpoints.saver import Progress
from pertoken.data.batch.order import Step
from pertoken.data.store.dataset import Dataset
from pertoken.errors import CheckpointError, Interrupted, NonFiniteError, PertokenError, SpikeError
from pertoken.runs.computation import rank_share, samples_of, update
from pertoken.runs.policy import Requests, decide, is_due, is_out_of_patience
from pertoken.runs.reports import non_finite_error, spike_error, spike_message
from pertoken.runs.run import Run
from pertoken.runs.saving import keep_last_step, note_save_result, save
from pertoken.runs.signals import StopRequest
from pertoken.runs.spikes import SpikeStep
from pertoken.tracking.rows import StepRow
from pertoken.training.evaluate import evaluate_sources
from pertoken.training.gradient_stats import gradient_stats
from pertoken.training.step import NonFiniteStep

__all__ = ["fit"]


def fit(run: Run, stop: StopRequest) -> int:
    """Train from `run.start_step` to the last step; the last step done, which is earlier if time is up.

    Raises NonFiniteError, SpikeError or Interrupted, all after saving, and CheckpointError where the last save failed:
    one before it is a message, since the next may succeed. Whatever else ends it, the last whole step is saved first,
    but for KeyboardInterrupt: a second signal waits for nothing. What a listener raises ends it after the step.
    """
    run.output.reporter.defer_problems()
    try:
        last = _fit(run, stop)
    except (KeyboardInterrupt, NonFiniteError, SpikeError, Interrupted, CheckpointError):
        raise
    except BaseException as error:
        error.add_note(keep_last_step(run))
        raise
    if (problem := run.output.reporter.problem) is not None:
        raise problem
    return last


def _fit(run: Run, stop: StopRequest) -> int:
    computation, reporter, recipe = run.computation, run.output.reporter, run.computation.recipe
    total_steps, patience = computation.total_steps, recipe.train.early_stopping
    if run.start_step < total_steps and is_out_of_patience(patience, run.evals_without_best):
        _say_it_stopped_early(run, run.start_step)
        return run.start_step
    for step in range(run.start_step + 1, total_steps + 1):
        reporter.step = step
        this = samples_of(computation, step)
        row = _take_step(run, this)
        best = False
        try:
            _watch_norm(run, this, row)
            evaluates = step == total_steps or is_due(this, recipe.train.eval_interval)
            if run.eval_store is not None and evaluates:
                best = _evaluate(run, run.eval_store, row)
        finally:  # the step is made, whatever becomes of what is said of it, and of its evaluation
            run.output.log(row, run.summary)
            run.whole_step, computation.state.changed = step, False
        requests = _sync_requests(run, stop)
        is_best = best and recipe.checkpoint.keep_best
        save_interval = recipe.checkpoint.save_interval
        decision = decide(
            this,
            requests,
            total_steps=total_steps,
            save_interval=save_interval,
            is_best=is_best,
            out_of_patience=is_out_of_patience(patience, run.evals_without_best),
        )
        if decision.save:
            save(run, step, is_best=is_best, last=decision.stops is not None, unfinished=decision.is_unfinished)
        if decision.stops is not None:
            _stop(run, step, decision.stops, requests)
            return step
    return total_steps  # all done before


def _take_step(run: Run, this: Step) -> StepRow:
    computation, reporter = run.computation, run.output.reporter
    wants_gradients = computation.recipe.log.grad_stats and this.step == run.start_step + 1
    skips = partial(run.spikes.skips, world=computation.state.world)
    try:
        return update(
            computation,
            this,
            skips=skips,
            on_gradients=(lambda: reporter.gradients(gradient_stats(computation.model))) if wants_gradients else None,
        )
    except (NonFiniteStep, SpikeStep) as problem:
        raise _given_up(run, this, problem) from None


def _stop(run: Run, step: int, why: str, requests: Requests) -> None:
    """Say why the run ends after `step`, which is saved. Raises what ends it early, unless its time is up or it is
    finished."""
    reporter, train = run.output.reporter, run.computation.recipe.train
    if why == "listener":
        raise reporter.problem or PertokenError(f"stopped after step {step}, saved: the listener of rank 0 failed")
    if why == "signal" and requests.signal_number is not None:
        name = signal.Signals(requests.signal_number).name
        text = f"stopped by {name} after step {step}, saved; continue with resume=True"
        raise Interrupted(text, requests.signal_number)
    if why == "early":
        _say_it_stopped_early(run, step)
    if why == "time":
        reporter.message(
            f"train.max_minutes={train.max_minutes:g}: stopped after step {step} of {run.computation.total_steps}, "
            "saved; continue with resume=True"
        )


def _say_it_stopped_early(run: Run, step: int) -> None:
    recipe, count = run.computation.recipe, run.evals_without_best
    evaluations = f"{count} evaluation{'' if count == 1 else 's'}"
    where = "that one was not kept (checkpoint.keep_best=false)"
    if recipe.checkpoint.keep_best:
        where = f"that one is {run.checkpoints.out_dir / 'checkpoints' / 'best'}"
    run.output.reporter.message(
        f"train.early_stopping={recipe.train.early_stopping}: ended after step {step} of "
        f"{run.computation.total_steps}, saved; {evaluations} in a row without a better "
        f"loss than {run.best_eval_loss:.4f}; {where}"
    )


def _sync_requests(run: Run, stop: StopRequest) -> Requests:
    """One message between ranks a step: requests, and how far each is with a save in the background."""
    minutes, reporter, saver = run.computation.recipe.train.max_minutes, run.output.reporter, run.checkpoints.saver
    late = minutes is not None and time.monotonic() - run.started_s >= 60 * minutes
    flags, failed = (stop.signal_number or 0, stop.save, late), reporter.problem is not None
    mine: tuple[tuple[int, bool, bool], bool, Progress] = (flags, failed, saver.progress)
    of_all = run.computation.state.world.gather(mine)
    note_save_result(run, saver.advance([progress for *_, progress in of_all]))
    numbers, saves, lates = zip(*(flags for flags, *_ in of_all), strict=True)
    requests = Requests(max(numbers) or None, any(saves), any(lates), any(failed for _, failed, _ in of_all))
    if requests.signal_number is not None:
        name = signal.Signals(requests.signal_number).name
        reporter.report("signal", f"{name}: stops after this step", told=False, signal=name)
    if requests.save:
        stop.save = False
        reporter.report("signal", "SIGUSR1: saves after this step", told=False, signal="SIGUSR1")
    return requests


def _given_up(run: Run, this: Step, problem: NonFiniteStep | SpikeStep) -> PertokenError:
    """Keep the last good weights, and say why this step was not made."""
    computation, checkpoints = run.computation, run.checkpoints
    note_save_result(run, checkpoints.saver.wait())
    saved = f"step {this.step - 1} is saved"
    if not run.can_resume_at(this.step - 1):
        try:
            save(run, this.step - 1, last=True, unfinished=True)
        except CheckpointError as error:
            saved = str(error)
    if isinstance(problem, SpikeStep):
        run.output.reporter.report("spike", f"step {this.step}: {problem}", told=False, stops=True)
        return spike_error(this, problem, computation.store, checkpoints.out_dir, saved)
    suspects = this.sample_ids
    if problem.micro_batch is not None:
        rank, index = problem.micro_batch
        suspects = rank_share(computation, this, rank).sample_ids[index]
    return non_finite_error(
        this,
        problem,
        suspects,
        computation.state,
        computation.model,
        computation.store,
        checkpoints.out_dir,
        saved,
    )


def _watch_norm(run: Run, this: Step, row: StepRow) -> None:
    """Say it if this step's gradient norm is an outlier, and remember the norm for the steps to come."""
    reporter, ratio = run.output.reporter, run.spikes.ratio(row.grad_norm)
    try:
        if row.skipped:
            why = "spike" if ratio is not None else "loss_scale_overflow"
            reporter.report("update_skipped", f"step {this.step}: update skipped", told=False, why=why)
        if ratio is not None:
            row.spike = ratio
            text = spike_message(this, run.spikes, row, run.computation.store, run.checkpoints.out_dir)
            reporter.report("spike", text, grad_norm=row.grad_norm, ratio=ratio, skipped=bool(row.skipped))
    finally:
        run.spikes.remember(row.grad_norm)


def _evaluate(run: Run, store: Dataset, row: StepRow) -> bool:
    """Add the evaluation to `row`; true if it is the best so far."""
    computation, reporter = run.computation, run.output.reporter
    reporter.evaluating(row.step)
    state = computation.state
    result, of_sources = evaluate_sources(
        state.model,
        store,
        state.precision,
        token_budget=computation.token_budget,
        world=state.world,
        execution=state.execution,
    )
    row.eval_loss = result.loss
    row.eval_sources = {name: one.loss for name, one in of_sources.items()} or None
    row.eval_perplexity = result.perplexity
    row.eval_bits_per_byte = result.bits_per_byte
    best = run.best_eval_loss is None or result.loss < run.best_eval_loss
    run.evals_without_best = 0 if best else run.evals_without_best + 1
    if best:
        run.best_eval_loss = result.loss
        reporter.report("best", f"step {row.step}: the lowest evaluation loss so far", told=False, loss=result.loss)
    return best
