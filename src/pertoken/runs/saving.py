"""What of a run is kept: its checkpoints as the loop asks for them, and the last whole step when an error ends it."""

from __future__ import annotations

from dataclasses import replace

from pertoken.checkpoints.saver import Outcome, Saver
from pertoken.checkpoints.snapshot import take_snapshot
from pertoken.checkpoints.state import TrainerState
from pertoken.errors import CheckpointError
from pertoken.runs.run import Run
from pertoken.text import reason
from pertoken.training.parallel import World

__all__ = ["keep_last_step", "note_save_result", "save"]


def save(run: Run, step: int, *, is_best: bool = False, last: bool = False, unfinished: bool = False) -> None:
    """Save the state after `step`: begin to, in the background, and wait for it if it is the `last`.

    An `unfinished` run is always saved with its optimizer, so that it can be resumed. Raises CheckpointError where the
    last fails.
    """
    computation, checkpoints, output = run.computation, run.checkpoints, run.output
    note_save_result(run, checkpoints.saver.wait())
    background = computation.recipe.checkpoint.async_save and not last
    state = _state_after(run, step)
    world = computation.state.world
    try:
        world.on_main(output.sync)
        snapshot = take_snapshot(
            checkpoints.out_dir,
            model=computation.model,
            tokenizer=checkpoints.tokenizer,
            eos_token_id=checkpoints.eos_token_id,
            optimizer=computation.state.optimizer,
            state=state,
            world=world,
            copy=background,
            ledger=None if output.metrics is None else output.metrics.ledger.tensors(),
            with_optimizer=computation.recipe.checkpoint.save_optimizer or unfinished,
        )
    except CheckpointError as problem:
        outcome: Outcome | None = Outcome(step, checkpoints.out_dir, problem)
    else:
        checkpoints.saver.start(snapshot, is_best=is_best, background=background)
        outcome = None if background else checkpoints.saver.wait()
    if last and outcome is not None and outcome.problem is not None:
        output.reporter.report("save_failed", str(outcome.problem), told=False, checkpoint_step=step)
        raise outcome.problem
    note_save_result(run, outcome)


def _state_after(run: Run, step: int) -> TrainerState:
    """What the checkpoint knows besides weights, optimizer and rows. All ranks call it: the probe is a forward pass."""
    return replace(
        run.checkpoints.at_start,
        step=step,
        scaler=run.computation.state.scaler.state_dict(),
        grad_norms=run.spikes.norms,
        micro_batch_tokens=run.computation.token_budget,
        best_eval_loss=run.best_eval_loss,
        evals_without_best=run.evals_without_best,
        tracker_run_ids=run.output.tracker_run_ids,
        probe=run.checkpoints.probe.measure(run.computation.state),
    )


def note_save_result(run: Run, outcome: Outcome | None) -> None:
    """Take note of a save that is over."""
    if outcome is None:
        return
    reporter = run.output.reporter
    if outcome.problem is not None:
        what = f"{outcome.problem}; training continues, and the checkpoint before this one is kept"
        reporter.report("save_failed", what, checkpoint_step=outcome.step)
        return
    run.checkpoints.last_saved, run.checkpoints.last_folder = outcome.step, outcome.folder
    reporter.report("saved", f"step {outcome.step} is saved", told=False, folder=outcome.folder.name)
    reporter.saved(outcome.folder)
    if outcome.remark is not None:
        reporter.message(outcome.remark)


def keep_last_step(run: Run) -> str:
    """After an error on this rank, perhaps on this one alone: save the last whole step if that needs no other rank.

    What became of it, in words for whoever sees the error. Raises nothing.
    """
    try:
        return _keep_last_step(run)
    except Exception as problem:
        return f"step {run.whole_step} could not be saved ({type(problem).__name__}: {reason(problem)}); {_newest(run)}"


def _keep_last_step(run: Run) -> str:
    computation, checkpoints = run.computation, run.checkpoints
    world = computation.state.world
    checkpoints.saver.join()
    if world.size > 1 and computation.recipe.train.parallel == "fsdp":
        return 'no rank has all weights with train.parallel="fsdp", so no more was saved; ' + (
            "resume=True continues from the newest checkpoint"
            if computation.recipe.checkpoint.save_optimizer
            else "the newest checkpoint has no optimizer, and is a model to start a new run from"
        )
    if not world.is_main:
        return "rank 0 saves the last whole step, if it still can"
    note_save_result(run, checkpoints.saver.finish_alone())
    if computation.state.changed:
        return f"step {run.whole_step + 1} was in the middle of its update, so nothing was saved; {_newest(run)}"
    if not run.can_resume_at(run.whole_step):
        if run.whole_step == 0:
            return "no step was made, so there is nothing to save"
        # Every rank has all of the weights and of the optimizer, and what is called here asks no other for anything.
        alone = World()
        state = replace(computation.state, model=computation.model, world=alone)
        saver = Saver(alone, keep_last=computation.recipe.checkpoint.keep_last)
        by_itself = replace(
            run, computation=replace(computation, state=state), checkpoints=replace(checkpoints, saver=saver)
        )
        save(by_itself, run.whole_step, last=True, unfinished=True)
    return f"step {run.whole_step} is saved; continue with resume=True"


def _newest(run: Run) -> str:
    last = run.checkpoints.last_saved
    return "nothing is saved yet" if last is None else f"the last checkpoint is of step {last}"
