"""The parts of a run, as they are at its start or were at a checkpoint."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pertoken.checkpoints.read import Checkpoint, load_optimizer
from pertoken.checkpoints.saver import Saver
from pertoken.checkpoints.state import TrainerState
from pertoken.data.batch.order import steps_per_epoch
from pertoken.engines.choice import Choice
from pertoken.engines.cuda_graphs import Graphs, graphs_for, why_no_graphs
from pertoken.errors import CheckpointError, RecipeError
from pertoken.model.protocol import LanguageModel
from pertoken.objective.choose import objective_of
from pertoken.recipe.schema import Recipe
from pertoken.runs.computation import Computation, samples_of
from pertoken.runs.data import RunData, load_data
from pertoken.runs.files import METRICS
from pertoken.runs.folder import changed_data
from pertoken.runs.model import build_model, prepare_model
from pertoken.runs.output import Output
from pertoken.runs.probe import Probe, environment, verify
from pertoken.runs.run import Checkpoints, Run
from pertoken.runs.spikes import Spikes
from pertoken.runs.summary import summarize
from pertoken.runs.warm_up import first_samples, seconds_per_token, warm_up_ddp
from pertoken.tracking.ledger import Ledger
from pertoken.tracking.metrics_file import MetricsFile
from pertoken.tracking.reporter import Reporter
from pertoken.tracking.summary import Summary
from pertoken.tracking.trackers import open_trackers
from pertoken.training.optimizers import build_optimizer
from pertoken.training.parallel import World, parallelize
from pertoken.training.precision import Precision, resolve_device
from pertoken.training.schedule import count_total_steps
from pertoken.training.step import TrainState

__all__ = [
    "Rebuilt",
    "count_steps",
    "open_output",
    "rebuild",
    "run_from",
    "set_up_computation",
    "summary_of",
    "verified_probe",
]

# Parameters times tokens of a micro-batch: beyond that a GPU computes for longer than the host launches.
_WORTH_A_GRAPH = 8e12


def count_steps(recipe: Recipe, num_samples: int) -> int:
    """Of the whole run. Raises RecipeError where it has no step after its warm-up."""
    train = recipe.train
    total = train.max_steps or count_total_steps(train.epochs, steps_per_epoch(num_samples, train.batch_size))
    if train.warmup_steps >= total and train.warmup_steps > 0:
        raise RecipeError(f"train.warmup_steps={train.warmup_steps}: the run has only {total} steps; warm up for fewer")
    return total


def set_up_computation(
    recipe: Recipe,
    data: RunData,
    model: LanguageModel,
    checkpoint: Checkpoint | None,
    total_steps: int,
    precision: Precision,
    world: World,
    reporter: Reporter,
    *,
    choice: Choice,
) -> Computation:
    """Optimizer and scaler around the model, as they stood at the checkpoint or the start."""
    train = recipe.train
    wrapped = parallelize(
        model,
        train.parallel,
        world,
        device=precision.device,
        layers=model.layers,
        # Between processes of a CPU it saves nothing.
        low=precision.low_dtype if precision.device.type == "cuda" else None,
        wide=model.wide_modules,
    )
    optimizer = build_optimizer(model, train)
    scaler = precision.new_scaler()
    token_budget = train.micro_batch_tokens
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer)
        scaler.load_state_dict(checkpoint.state.scaler)
        if checkpoint.recipe.train.micro_batch_tokens == train.micro_batch_tokens:
            token_budget = checkpoint.state.micro_batch_tokens  # smaller, where memory ran out before
    kernels = choice.kernels(precision.dtype, precision.device)
    state = TrainState(
        wrapped,
        optimizer,
        scaler,
        precision,
        world,
        objective=objective_of(train),
        kernels=kernels,
        execution=choice.execution,
        graphs=_graphs(recipe, model, precision, world, choice),
    )
    return Computation(recipe, model, state, data.train, total_steps, token_budget, reporter)


def _graphs(recipe: Recipe, model: LanguageModel, precision: Precision, world: World, choice: Choice) -> Graphs | None:
    """What plays the passes again, where `train.cuda_graphs` and the model's size ask for it. Raises RecipeError."""
    train = recipe.train
    if train.cuda_graphs is False:
        return None
    why = why_no_graphs(model, precision.dtype, precision.device, choice.execution, ranks=world.size)
    if why is not None:
        if train.cuda_graphs:
            raise RecipeError(f"train.cuda_graphs=true: {why}; leave the key out")
        return None
    if train.cuda_graphs is None and model.num_active_parameters * train.micro_batch_tokens > _WORTH_A_GRAPH:
        return None
    return graphs_for(model, objective_of(train), precision.device, choice.execution, precision.autocast)


def verified_probe(computation: Computation, checkpoint: Checkpoint | None, *, compiled: bool, force: bool) -> Probe:
    """The run's probe, whose loss is still what the checkpoint says. Raises CheckpointError."""
    state, train = computation.state, computation.recipe.train
    probe = Probe(computation.store, train.seed)
    if checkpoint is not None and checkpoint.state.probe is not None:
        here = environment(state.precision, ranks=state.world.size, compiled=compiled)
        same = here == checkpoint.state.environment
        now = probe.measure(state)
        remark = verify(checkpoint.state.probe, now, same=same, dtype=train.dtype, where=probe.where, force=force)
        if remark is not None:
            computation.reporter.message(remark)
    return probe


def summary_of(computation: Computation, data: RunData, *, engine_note: str, start_step: int) -> Summary:
    """What is about to be trained, and how long it will take. Every rank calls it, since passes are made."""
    state, store = computation.state, computation.store
    micro_batch = first_samples(state, store, samples_of(computation, start_step + 1).sample_ids)
    fits = warm_up_ddp(state, micro_batch)
    return summarize(
        computation.recipe,
        store,
        data.eval,
        data.tokenizer,
        computation.model,
        state,
        engine_note=engine_note if state.graphs is None else f"{engine_note}; passes recorded as CUDA graphs",
        token_budget=computation.token_budget,
        start_step=start_step,
        total_steps=computation.total_steps,
        seconds_per_token=seconds_per_token(state, micro_batch) if fits else math.nan,
    )


def open_output(
    recipe: Recipe, checkpoint: Checkpoint | None, ledger: Ledger, world: World, reporter: Reporter
) -> Output:
    """Rows and trackers, on rank 0, open after the checkpoint's step."""
    out_dir, start_step = Path(recipe.out_dir), checkpoint.step if checkpoint is not None else 0
    run_ids = checkpoint.state.tracker_run_ids if checkpoint is not None else {}
    trackers = world.on_main_alone(
        lambda: open_trackers(recipe.log, out_dir, recipe=recipe.flat(), run_ids=run_ids, last_step=start_step)
    )
    metrics = world.on_main_alone(lambda: MetricsFile(out_dir / METRICS, last_step=start_step, ledger=ledger))
    if metrics is not None and metrics.remark is not None:
        reporter.message(metrics.remark)
    return Output(reporter, metrics, trackers or {})


def run_from(
    computation: Computation,
    data: RunData,
    checkpoint: Checkpoint | None,
    output: Output,
    probe: Probe,
    summary: Summary,
    *,
    compiled: bool,
    started_s: float,
) -> Run:
    recipe, state = computation.recipe, computation.state
    saved = checkpoint.state if checkpoint is not None else None
    start_step = saved.step if saved is not None else 0
    at_start = TrainerState(
        step=start_step,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        data=data.fingerprints,
        data_files=data.files,
        hub=data.commits,
        compiled=compiled,
        environment=environment(state.precision, ranks=state.world.size, compiled=compiled),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        scaler=state.scaler.state_dict(),
        micro_batch_tokens=computation.token_budget,
    )
    checkpoints = Checkpoints(
        out_dir=Path(recipe.out_dir),
        tokenizer=data.tokenizer,
        eos_token_id=data.eos_token_id,
        saver=Saver(state.world, keep_last=recipe.checkpoint.keep_last),
        probe=probe,
        at_start=at_start,
        last_saved=saved.step if saved is not None else None,
        last_folder=checkpoint.folder if checkpoint is not None else None,
    )
    return Run(
        computation=computation,
        checkpoints=checkpoints,
        output=output,
        spikes=Spikes(recipe.train.on_spike, recipe.train.spike_factor, saved.grad_norms if saved is not None else ()),
        eval_store=data.eval,
        summary=summary,
        start_step=start_step,
        best_eval_loss=saved.best_eval_loss if saved is not None else None,
        evals_without_best=saved.evals_without_best if saved is not None else 0,
        started_s=started_s,
        whole_step=start_step,
    )


@dataclass(frozen=True)
class Rebuilt:
    """A run as it stood after `start_step`, to compute steps of it again."""

    computation: Computation
    tokenizer: Any
    summary: Summary
    start_step: int


def rebuild(recipe: Recipe, checkpoint: Checkpoint | None, known: Checkpoint | None, reporter: Reporter) -> Rebuilt:
    """The run as it stood at `checkpoint` (None: before its first step), on this one process, with nothing written.

    `known`, any checkpoint of the run, says which data it is about and whether code was generated.
    Raises what `train` raises for data, model or checkpoint.
    """
    world, precision = World(), Precision(recipe.train.dtype, resolve_device(recipe.train.device))
    commits = known.state.hub if known is not None else {}
    data = load_data(recipe, reporter, world, commits=commits, with_weights=checkpoint is None)
    if known is not None and (what := changed_data(known, data.accepted_fingerprints, data.files)) is not None:
        raise CheckpointError(f"{what}; restore it: these samples are not those of the run")
    total_steps = count_steps(recipe, len(data.train))
    model = build_model(recipe, data, checkpoint, precision, reporter)
    choice = prepare_model(model, recipe, known, precision, total_steps, reporter)
    computation = set_up_computation(
        recipe, data, model, checkpoint, total_steps, precision, world, reporter, choice=choice
    )
    # What a changed loss comes from is to be seen, not refused.
    verified_probe(computation, checkpoint, compiled=choice.compiled, force=True)
    start_step = checkpoint.step if checkpoint is not None else 0
    summary = summary_of(computation, data, engine_note=choice.note, start_step=start_step)
    return Rebuilt(computation, data.tokenizer, summary, start_step)
