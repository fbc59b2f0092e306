"""From a recipe to a run: everything that happens before the first step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pertoken import __version__
from pertoken.checkpoints.read import Checkpoint
from pertoken.data.batch.order import steps_per_epoch
from pertoken.data.tokens.tokenizer import forced_tokenizer
from pertoken.errors import CheckpointError, RecipeError
from pertoken.families import saved_as
from pertoken.files import FolderLock
from pertoken.kernels.memory import forget_blocks
from pertoken.recipe.schema import Recipe
from pertoken.runs.assemble import (
    count_steps,
    open_output,
    run_from,
    set_up_computation,
    summary_of,
    verified_probe,
)
from pertoken.runs.computation import Computation
from pertoken.runs.data import RunData, load_data
from pertoken.runs.files import EVENTS
from pertoken.runs.folder import changed_data, earlier_run, keep_others_out, make_room, refuse_changes
from pertoken.runs.loop import fit
from pertoken.runs.model import build_model, prepare_model
from pertoken.runs.needs import memory_needs
from pertoken.runs.policy import Stop, count_evaluations, is_out_of_patience
from pertoken.runs.run import Run
from pertoken.runs.signals import StopRequest, stop_on_signals
from pertoken.text import one_line
from pertoken.tracking.ledger import Ledger
from pertoken.tracking.listener import Listener
from pertoken.tracking.reporter import Reporter
from pertoken.tracking.trackers import check_trackers
from pertoken.training.memory import check_size
from pertoken.training.optimizers import optimizer_kind
from pertoken.training.parallel import World, join_world
from pertoken.training.precision import Precision, resolve_device

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is."""

    out_dir: Path
    checkpoint: Path  # the last one
    step: int
    best_eval_loss: float | None


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    verify_data: bool = False,
    listener: Listener | Sequence[Listener] | None = None,
) -> TrainResult:
    """Train as `recipe` says, into `recipe.out_dir`, which no other process may train into meanwhile.

    `resume` continues from the newest valid checkpoint (with nothing saved it starts fresh), and refuses where data,
    or the loss of the checkpoint's probe, are no longer what they were, unless `force`; `overwrite` deletes an earlier
    run there; an `out_dir` in use without either raises CheckpointError. `verify_data` reads all data and every byte of
    the token store again.

    Every process that torchrun starts calls it alike; rank 0 writes, and it alone tells `listener` what happens, or
    each of several. One that fails is told no more, harms none of the others, and ends the run after its step.

    SIGINT, SIGTERM and SIGHUP end it with Interrupted, once the step is done and saved; before the first step, at once.
    Any other exception that ends it, the listener's own too, is raised after the last whole step was saved, with a note
    (`__notes__`) that says so, or why it could not be.
    """
    if resume and overwrite:
        raise RecipeError("resume=True and overwrite=True: give one of the two")
    if force and not resume:
        raise RecipeError("force=True: continues in spite of what resume=True finds changed; give both")
    with stop_on_signals() as stop, join_world(recipe.train.device) as world, FolderLock() as lock:
        listeners = [listener] if isinstance(listener, Listener) else list(listener or ())
        reporter = Reporter(listeners if world.is_main else (), keeps_events=world.is_main)
        try:
            result = _train(
                recipe,
                world,
                reporter,
                lock,
                stop,
                resume=resume,
                overwrite=overwrite,
                force=force,
                verify_data=verify_data,
            )
        except BaseException as error:
            reporter.defer_problems()
            text = one_line(str(error)) or type(error).__name__
            reporter.report("end", text, told=False, error=type(error).__name__)
            raise
        finally:
            reporter.close()
        return result


def _train(
    recipe: Recipe,
    world: World,
    reporter: Reporter,
    lock: FolderLock,
    stop: StopRequest,
    *,
    resume: bool,
    overwrite: bool,
    force: bool,
    verify_data: bool,
) -> TrainResult:
    out_dir, started_s = Path(recipe.out_dir), time.monotonic()
    for remark in recipe.remarks:
        reporter.message(remark)
    device = resolve_device(recipe.train.device, world.local_rank if world.size > 1 else None)
    world.on_main(lambda: _check_early(recipe))
    world.on_main(lambda: keep_others_out(lock, out_dir))
    folder = world.on_main(lambda: earlier_run(out_dir, resume=resume, overwrite=overwrite, listener=reporter))
    checkpoint = Checkpoint(folder) if folder is not None else None
    start_step = checkpoint.step if checkpoint is not None else 0
    if checkpoint is not None:
        refuse_changes(recipe, checkpoint)
        _say_where_it_continues(checkpoint, reporter)
    ledger = Ledger() if checkpoint is None else Ledger.load(checkpoint.folder, start_step)
    data = load_data(
        recipe,
        reporter,
        world,
        verify_data=verify_data,
        commits=checkpoint.state.hub if checkpoint is not None else {},
        with_weights=checkpoint is None,
    )
    if checkpoint is not None:
        _refuse_other_data(data, checkpoint, force=force, listener=reporter)
    precision = Precision(recipe.train.dtype, device)
    if precision.is_emulated():
        reporter.message('this processor emulates bfloat16; train.dtype="float32" is faster here')

    total_steps = count_steps(recipe, len(data.train))
    weights = data.init_from if checkpoint is None or recipe.adapter.kind != "none" else str(checkpoint.folder)
    if (needs := memory_needs(recipe, weights, len(data.tokenizer), device)) is not None:
        reporter.needs(needs)
    model = build_model(recipe, data, checkpoint, precision, reporter)
    choice = prepare_model(model, recipe, checkpoint, precision, total_steps, reporter)
    family = saved_as(str(model.setting("family")), use_moe=model.facts.has_experts)
    if (unlike := forced_tokenizer(family, data.tokenizer)) is not None:
        reporter.message(unlike)
    # Only now, with recipe, data and model known to be good on every rank, is anything in out_dir touched.
    for line in world.on_main(lambda: make_room(out_dir, recipe, lock, resume=resume, overwrite=overwrite)):
        reporter.message(line)
    reporter.keep_events(out_dir / EVENTS)
    computation = set_up_computation(
        recipe, data, model, checkpoint, total_steps, precision, world, reporter, choice=choice
    )
    probe = verified_probe(computation, checkpoint, compiled=choice.compiled, force=force)
    summary = summary_of(computation, data, engine_note=choice.note, start_step=start_step)
    output = open_output(recipe, checkpoint, ledger, world, reporter)
    run = run_from(computation, data, checkpoint, output, probe, summary, compiled=choice.compiled, started_s=started_s)
    try:
        _say_what_starts(run, data.commits)
        stop.start_training()
        step = fit(run, stop)
    finally:
        output.close()
        forget_blocks()
    reporter.report(
        "end", f"ended after step {step} of {total_steps}", told=False, error=None, why=_why_ended(run, step)
    )
    assert run.checkpoints.last_folder is not None, "a finished run has a checkpoint"
    return TrainResult(out_dir, run.checkpoints.last_folder, step, run.best_eval_loss)


def _say_where_it_continues(checkpoint: Checkpoint, reporter: Reporter) -> None:
    reporter.step, name = checkpoint.step, checkpoint.folder.name
    reporter.report("resume", f"continues after step {checkpoint.step}", told=False, checkpoint=name)
    for remark in checkpoint.remarks:
        reporter.message(remark)


def _why_ended(run: Run, step: int) -> Stop:
    if step >= run.computation.total_steps:
        return "done"
    patience = run.computation.recipe.train.early_stopping
    return "early" if is_out_of_patience(patience, run.evals_without_best) else "time"


def _say_what_cannot_happen(computation: Computation) -> None:
    if not computation.recipe.checkpoint.save_optimizer:
        computation.reporter.message(
            "checkpoint.save_optimizer=false: a run that is killed cannot be resumed; one that a signal, "
            "train.max_minutes or an error stops is saved with its optimizer, and can be"
        )
    train, total = computation.recipe.train, computation.total_steps
    per_epoch = steps_per_epoch(len(computation.store), train.batch_size)
    evaluations = count_evaluations(total, train.eval_interval, steps_per_epoch=per_epoch)
    if train.early_stopping is not None and evaluations <= train.early_stopping + 1:
        when, remedy = "each epoch", "set train.eval_interval"
        if train.eval_interval is not None:
            when, remedy = f"every {train.eval_interval} steps", "lower train.eval_interval"
        computation.reporter.message(
            f"train.early_stopping={train.early_stopping}: cannot end this run early, which evaluates {evaluations} "
            f"time{'' if evaluations == 1 else 's'} (after {when}, and at the end); {remedy}"
        )


def _say_what_starts(run: Run, commits: dict[str, str]) -> None:
    computation, reporter, summary = run.computation, run.output.reporter, run.summary
    _say_what_cannot_happen(computation)
    reporter.report(
        "start",
        f"training starts after step {run.start_step}, for {computation.total_steps} steps in all",
        told=False,
        total_steps=computation.total_steps,
        ranks=summary.world_size,
        device=summary.device,
        dtype=summary.dtype,
        pertoken=__version__,
        torch=torch.__version__,
        **({"hub": commits} if commits else {}),
    )
    reporter.started(summary)


def _check_early(recipe: Recipe) -> None:
    """What can be refused before the data is read. Raises RecipeError."""
    if recipe.init_from is None:
        check_size(recipe, vocab_size=2)
    check_trackers(recipe.log)
    optimizer_kind(recipe.train.optimizer).check_installed()


def _refuse_other_data(data: RunData, checkpoint: Checkpoint, *, force: bool, listener: Listener) -> None:
    what = changed_data(checkpoint, data.accepted_fingerprints, data.files)
    if what is not None and not force:
        raise CheckpointError(
            f"{what}; restore it, start a new run from it with init_from, or continue with force=True"
        )
    if what is not None:
        listener.message(f"force=True: going on, though {what}")
