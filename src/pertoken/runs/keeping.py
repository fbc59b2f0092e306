"""What of a run is kept: its checkpoints as the loop asks for them, and the last whole step when an error ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pertoken.checkpoints.write import Outcome, Saver, take_snapshot
from pertoken.errors import CheckpointError
from pertoken.text import reason
from pertoken.training.parallel import World

if TYPE_CHECKING:
    from pertoken.runs.loop import Run

__all__ = ["close_files", "keep_last_step", "note_save_result", "save"]


def save(run: Run, step: int, *, is_best: bool = False, last: bool = False) -> None:
    """Save the state after `step`: begin to, in the background, and wait for it if it is the `last`.

    Raises CheckpointError where the last fails.
    """
    note_save_result(run, run.saver.wait())
    background = run.recipe.checkpoint.async_save and not last
    run_ids = {name: tracker.run_id for name, tracker in run.trackers.items() if tracker.run_id}
    state = {
        **run.checkpoint_meta,
        "scaler": run.state.scaler.state_dict(),
        "grad_norms": run.spikes.norms,
        "micro_batch_tokens": run.token_budget,
        "best_eval_loss": run.best_eval_loss,
        "tracker_run_ids": run_ids,
        "probe": run.probe.measure(run.state),
    }
    try:
        run.world.on_main(lambda: run.metrics.sync() if run.metrics is not None else None)
        snapshot = take_snapshot(
            run.out_dir,
            step=step,
            model=run.model,
            tokenizer=run.tokenizer,
            eos_token_id=run.eos_token_id,
            optimizer=run.state.optimizer,
            state=state,
            world=run.world,
            copy=background,
            ledger=None if run.metrics is None else run.metrics.ledger.tensors(),
        )
    except CheckpointError as problem:
        outcome: Outcome | None = Outcome(step, run.out_dir, problem)
    else:
        run.saver.start(snapshot, is_best=is_best, background=background)
        outcome = None if background else run.saver.wait()
    if last and outcome is not None and outcome.problem is not None:
        raise outcome.problem
    note_save_result(run, outcome)


def note_save_result(run: Run, outcome: Outcome | None) -> None:
    """Take note of a save that is over."""
    if outcome is None:
        return
    if outcome.problem is not None:
        run.listener.message(f"{outcome.problem}; training goes on, and the checkpoint before this one is kept")
        return
    run.last_saved, run.last_checkpoint = outcome.step, outcome.folder
    run.listener.saved(outcome.folder)
    if outcome.remark is not None:
        run.listener.message(outcome.remark)


def keep_last_step(run: Run) -> str:
    """After an error on this rank, perhaps on this one alone: save the last whole step if that needs no other rank.

    What became of it, in words for whoever sees the error. Raises nothing.
    """
    try:
        return _keep_last_step(run)
    except Exception as problem:
        return f"step {run.whole_step} could not be saved ({type(problem).__name__}: {reason(problem)}); {_newest(run)}"


def _keep_last_step(run: Run) -> str:
    run.saver.join()
    if run.world.size > 1 and run.recipe.train.parallel == "fsdp":
        return (
            'no rank has all weights with train.parallel="fsdp", so no more was saved; '
            "--resume continues from the newest checkpoint"
        )
    if not run.world.is_main:
        return "rank 0 saves the last whole step, if it still can"
    note_save_result(run, run.saver.finish_alone())
    if run.state.changed:
        return f"step {run.whole_step + 1} was in the middle of its update, so nothing was saved; {_newest(run)}"
    if run.last_saved != run.whole_step:
        if run.whole_step == 0:
            return "no step was made, so there is nothing to save"
        # Every rank has all of the weights and of the optimizer, and what is called here asks no other for anything.
        alone, keep_last = World(), run.recipe.checkpoint.keep_last
        state = replace(run.state, model=run.model, world=alone)
        save(replace(run, world=alone, state=state, saver=Saver(alone, keep_last=keep_last)), run.whole_step, last=True)
    return f"step {run.whole_step} is saved; go on with --resume"


def _newest(run: Run) -> str:
    return "nothing is saved yet" if run.last_saved is None else f"the last checkpoint is of step {run.last_saved}"


def close_files(run: Run) -> None:
    """The metrics file and the trackers. What a tracker has against it costs nothing any more."""
    if run.metrics is not None:
        run.metrics.close()
    for name, tracker in run.trackers.items():
        try:
            tracker.close()
        except Exception as error:
            run.listener.message(f"log.trackers: {name} did not close ({error})")
