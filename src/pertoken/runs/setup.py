"""From a recipe to a run: everything that happens before the first step."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pertoken.checkpoints.ledger import Ledger
from pertoken.checkpoints.read import (
    Checkpoint,
    load_optimizer,
)
from pertoken.checkpoints.write import Saver
from pertoken.data.batch.order import steps_per_epoch
from pertoken.errors import CheckpointError, RecipeError
from pertoken.files import FolderLock
from pertoken.kernels.memory import forget_blocks
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.objective.choose import objective_of
from pertoken.recipe.schema import Recipe
from pertoken.runs.data import RunData, load_data
from pertoken.runs.folder import changed_data, earlier_run, keep_others_out, make_room, refuse_changes
from pertoken.runs.keeping import close_files
from pertoken.runs.loop import Run, fit
from pertoken.runs.model import build_model, prepare_model
from pertoken.runs.probe import Probe, environment, verify
from pertoken.runs.signals import StopRequest, stop_on_signals
from pertoken.runs.spikes import Spikes
from pertoken.runs.summary import summarize
from pertoken.tracking.metrics import Listener, MetricsFile, check_trackers, open_trackers
from pertoken.training.memory import check_size
from pertoken.training.optim import build_optimizer
from pertoken.training.parallel import World, join_world, parallelize
from pertoken.training.precision import Precision, resolve_device
from pertoken.training.step import TrainState

__all__ = ["TrainResult", "rebuild", "train"]


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
    listener: Listener | None = None,
) -> TrainResult:
    """Train as `recipe` says, into `recipe.out_dir`, which no other process may train into meanwhile.

    `resume` continues from the newest valid checkpoint (with nothing saved it starts fresh), and refuses where data,
    or the loss of the checkpoint's probe, are no longer what they were, unless `force`; `overwrite` deletes an earlier
    run there; an `out_dir` in use without either raises CheckpointError. `verify_data` reads all data and every byte of
    the token store again.

    Every process that torchrun starts calls it alike; rank 0 writes, and it alone tells `listener` what happens.

    SIGINT, SIGTERM and SIGHUP end it with Interrupted, once the step is done and saved; before the first step, at once.
    Any other exception that ends it, the listener's own too, is raised after the last whole step was saved, with a note
    (`__notes__`) that says so, or why it could not be.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite: give one of the two")
    if force and not resume:
        raise RecipeError("--force: goes on in spite of what --resume finds changed; give both")
    with stop_on_signals() as stop, join_world(recipe.train.device) as world, FolderLock() as lock:
        heard = listener if listener is not None and world.is_main else Listener()
        return _train(
            recipe, world, heard, lock, stop, resume=resume, overwrite=overwrite, force=force, verify_data=verify_data
        )


def _train(
    recipe: Recipe,
    world: World,
    listener: Listener,
    lock: FolderLock,
    stop: StopRequest,
    *,
    resume: bool,
    overwrite: bool,
    force: bool,
    verify_data: bool,
) -> TrainResult:
    out_dir, started_s = Path(recipe.out_dir), time.monotonic()
    device = resolve_device(recipe.train.device, world.local_rank if world.size > 1 else None)
    world.on_main(lambda: _check_early(recipe))
    world.on_main(lambda: keep_others_out(lock, out_dir))
    folder = world.on_main(lambda: earlier_run(out_dir, resume=resume, overwrite=overwrite, listener=listener))
    checkpoint = Checkpoint(folder) if folder is not None else None
    if checkpoint is not None:
        refuse_changes(recipe, checkpoint)
    data = load_data(recipe, listener, world, verify_data=verify_data)
    if checkpoint is not None:
        _refuse_other_data(data, checkpoint, force=force, listener=listener)
    precision = Precision(recipe.train.dtype, device)
    if precision.is_emulated():
        listener.message('this processor emulates bfloat16; train.dtype="float32" is faster here')

    total_steps = _total_steps(recipe, len(data.train))
    model = build_model(recipe, data, checkpoint, precision)
    compiled = prepare_model(model, recipe, checkpoint, precision, total_steps, listener)
    # Only now, with recipe, data and model known to be good on every rank, is anything in out_dir touched.
    for line in world.on_main(lambda: make_room(out_dir, recipe, lock, resume=resume, overwrite=overwrite)):
        listener.message(line)
    run = _assemble(
        recipe,
        data,
        model,
        checkpoint,
        total_steps,
        precision,
        world,
        listener,
        compiled=compiled,
        force=force,
        started_s=started_s,
    )
    try:
        listener.started(run.summary)
        stop.start_training()
        step = fit(run, stop)
    finally:
        close_files(run)
        forget_blocks()
    assert run.last_checkpoint is not None, "a finished run has a checkpoint"
    return TrainResult(out_dir, run.last_checkpoint, step, run.best_eval_loss)


def _check_early(recipe: Recipe) -> None:
    """What can be refused before the data is read. Raises RecipeError."""
    if recipe.init_from is None:
        check_size(recipe, vocab_size=2)
    check_trackers(recipe.log)


def rebuild(recipe: Recipe, checkpoint: Checkpoint | None, known: Checkpoint | None, listener: Listener) -> Run:
    """The run as it stood at `checkpoint` (None: before its first step), on this one process, with nothing written.

    `known`, any checkpoint of the run, says which data it is about and whether code was generated.
    Raises what `train` raises for data, model or checkpoint.
    """
    world, precision = World(), Precision(recipe.train.dtype, resolve_device(recipe.train.device))
    data = load_data(recipe, listener, world)
    if known is not None and (what := changed_data(known, data.fingerprints, data.files)) is not None:
        raise CheckpointError(f"{what}; restore it: these samples are not those of the run")
    total_steps = _total_steps(recipe, len(data.train))
    model = build_model(recipe, data, checkpoint, precision)
    compiled = prepare_model(model, recipe, known, precision, total_steps, listener)
    return _assemble(
        recipe,
        data,
        model,
        checkpoint,
        total_steps,
        precision,
        world,
        listener,
        compiled=compiled,
        force=True,  # what a changed loss comes from is to be seen, not refused
        writes=False,
    )


def _refuse_other_data(data: RunData, checkpoint: Checkpoint, *, force: bool, listener: Listener) -> None:
    what = changed_data(checkpoint, data.fingerprints, data.files)
    if what is not None and not force:
        raise CheckpointError(f"{what}; restore it, start a new run from it with init_from, or go on with --force")
    if what is not None:
        listener.message(f"--force: going on, though {what}")


def _total_steps(recipe: Recipe, num_samples: int) -> int:
    train = recipe.train
    total = train.max_steps or train.epochs * steps_per_epoch(num_samples, train.batch_size)
    if train.warmup_steps >= total and train.warmup_steps > 0:
        raise RecipeError(f"train.warmup_steps={train.warmup_steps}: the run has only {total} steps; warm up for fewer")
    return total


def _assemble(
    recipe: Recipe,
    data: RunData,
    model: CausalLM,
    checkpoint: Checkpoint | None,
    total_steps: int,
    precision: Precision,
    world: World,
    listener: Listener,
    *,
    compiled: bool,
    force: bool = False,
    started_s: float = 0.0,
    writes: bool = True,
) -> Run:
    """Optimizer, scaler and files (if it `writes`) around the model, as they stood at the checkpoint or the start."""
    train, out_dir = recipe.train, Path(recipe.out_dir)
    wrapped = parallelize(
        model,
        train.parallel,
        world,
        device=precision.device,
        layers=model.layers,
        # Between processes of a CPU it saves nothing.
        low=precision.low_dtype if precision.device.type == "cuda" else None,
        wide=model.wide_modules if isinstance(model, CausalLM) else None,
    )
    optimizer = build_optimizer(model, train)
    scaler = precision.new_scaler()
    token_budget = train.micro_batch_tokens
    saved: dict[str, Any] = {}
    if checkpoint is not None:
        saved = checkpoint.state
        load_optimizer(checkpoint, model, optimizer)
        scaler.load_state_dict(saved["scaler"])
        if Recipe.parse(saved["recipe"]).train.micro_batch_tokens == train.micro_batch_tokens:
            token_budget = saved["micro_batch_tokens"]  # smaller, where memory ran out before
    start_step = checkpoint.step if checkpoint is not None else 0
    kernels = Kernels(getattr(torch, train.dtype)) if compiled and precision.device.type == "cpu" else None
    state = TrainState(wrapped, optimizer, scaler, precision, world, objective_of(train), kernels)
    probe, here = Probe(data.train, train.seed), environment(precision, ranks=world.size, compiled=compiled)
    if "probe" in saved:
        same = here == saved.get("environment")
        now = probe.measure(state)
        remark = verify(saved["probe"], now, same=same, dtype=train.dtype, where=probe.where, force=force)
        if remark is not None:
            listener.message(remark)
    summary = summarize(
        recipe,
        data.train,
        data.eval,
        data.tokenizer,
        model,
        state,
        token_budget=token_budget,
        start_step=start_step,
        total_steps=total_steps,
    )
    trackers, metrics = None, None
    if writes:
        trackers = world.on_main_alone(
            lambda: open_trackers(
                recipe.log,
                out_dir,
                recipe=recipe.flat(),
                run_ids=saved.get("tracker_run_ids", {}),
                last_step=start_step,
            )
        )
        ledger = Ledger() if checkpoint is None else Ledger.load(checkpoint.folder, start_step)
        metrics = world.on_main_alone(
            lambda: MetricsFile(out_dir / "metrics.jsonl", last_step=start_step, ledger=ledger)
        )
        if metrics is not None and metrics.remark is not None:
            listener.message(metrics.remark)
    return Run(
        recipe=recipe,
        out_dir=out_dir,
        model=model,
        state=state,
        world=world,
        tokenizer=data.tokenizer,
        eos_token_id=data.eos_token_id,
        train_store=data.train,
        eval_store=data.eval,
        start_step=start_step,
        total_steps=total_steps,
        token_budget=token_budget,
        best_eval_loss=saved.get("best_eval_loss"),
        last_saved=start_step if checkpoint is not None else None,
        last_checkpoint=checkpoint.folder if checkpoint is not None else None,
        saver=Saver(world, keep_last=recipe.checkpoint.keep_last),
        probe=probe,
        spikes=Spikes(train.on_spike, train.spike_factor, saved.get("grad_norms", ())),
        checkpoint_meta={
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "data": data.fingerprints,
            "data_files": data.files,
            "compiled": compiled,
            "environment": here,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        },
        metrics=metrics,
        trackers=trackers or {},
        summary=summary,
        listener=listener,
        started_s=started_s,
    )
