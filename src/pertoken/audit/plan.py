"""The steps of a run and what they take, computed from lengths and configuration: nothing is loaded or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.share import share_of
from pertoken.data.store.dataset import Dataset
from pertoken.errors import RecipeError
from pertoken.model.attention import AttentionLayout
from pertoken.model.decoder import CausalLM
from pertoken.model.operations import padding_of
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.runs.assemble import count_steps, set_up_computation
from pertoken.runs.computation import samples_of
from pertoken.runs.data import RunData
from pertoken.runs.model import prepare_model
from pertoken.runs.warm_up import first_samples, seconds_per_token, warm_up_ddp
from pertoken.tracking.listener import Listener
from pertoken.tracking.reporter import Reporter
from pertoken.training.fits import methods_bytes
from pertoken.training.memory import machine_bytes, training_bytes
from pertoken.training.parallel import World
from pertoken.training.precision import Precision, resolve_device

__all__ = ["Estimate", "Plan", "estimate", "plan"]

_STEPS = 20  # whose padding is looked at
_MOST_TIMED = 150_000_000  # parameters: of larger models, making them takes longer than an answer should


@dataclass(frozen=True)
class Plan:
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    epochs: float
    micro_batches: float  # of a step, on average over the first 20
    padding_share: float | None  # of their operations; None where the architecture is not our decoder's


@dataclass(frozen=True)
class Estimate:
    parameters: int
    memory_bytes: dict[str, int]  # weights, gradients, optimizer, activations
    memory_total_bytes: int
    memory_available_bytes: int | None
    memory_by_method: dict[str, int]  # all of it, were the same model trained so (`training.methods`)
    seconds: float | None  # all steps, as two passes with random weights took on this machine; None: not timed
    how: str


def plan(recipe: Recipe, store: Dataset, config: ResolvedModelConfig | None) -> Plan:
    """Raises RecipeError for what `train` would refuse."""
    train, total = recipe.train, count_steps(recipe, len(store))
    per_epoch = steps_per_epoch(len(store), train.batch_size)
    micro_batches, padding, operations = [], 0.0, 0.0
    for number in range(1, min(total, _STEPS) + 1):
        step = step_at(number, num_samples=len(store), batch_size=train.batch_size, seed=train.seed)
        share = share_of(store, step.sample_ids, token_budget=train.micro_batch_tokens)
        micro_batches.append(len(share.micro_batches))
        for micro_batch in share.micro_batches if config is not None else ():
            assert config is not None
            layout = AttentionLayout.of(micro_batch.lengths, micro_batch.input_ids.device)
            of_padding, of_all = padding_of(
                config, micro_batch, rows=0, pairs=layout.pairs, padding_pairs=layout.padding_pairs
            )
            padding, operations = padding + float(of_padding), operations + float(of_all)
    return Plan(
        batch_size=train.batch_size,
        steps_per_epoch=per_epoch,
        total_steps=total,
        epochs=total / per_epoch,
        micro_batches=float(np.mean(micro_batches)),
        padding_share=padding / operations if operations else None,
    )


def estimate(recipe: Recipe, data: RunData, config: ResolvedModelConfig | None, steps: Plan) -> Estimate | None:
    """None where the number of parameters is not known from a configuration."""
    if config is None:
        return None
    memory = training_bytes(recipe, config)
    return Estimate(
        parameters=config.num_parameters,
        memory_bytes=memory,
        memory_total_bytes=sum(memory.values()),
        memory_available_bytes=machine_bytes(),
        memory_by_method=methods_bytes(recipe, config),
        seconds=_seconds(recipe, data, config, steps),
        how="memory of one process, computed and not measured, its activations to about a third",
    )


def _seconds(recipe: Recipe, data: RunData, config: ResolvedModelConfig, steps: Plan) -> float | None:
    """Of all steps on this machine, by a forward and backward pass of the first samples through random weights."""
    if config.num_parameters > _MOST_TIMED or recipe.train.dtype == "float16":
        return None
    try:
        precision = Precision(recipe.train.dtype, resolve_device(recipe.train.device))
    except RecipeError:  # that device is elsewhere
        return None
    model = CausalLM(config, dtype=precision.parameter_dtype).to(precision.device)
    choice = prepare_model(model, recipe, None, precision, steps.total_steps, Listener())
    computation = set_up_computation(
        *(recipe, data, model, None, steps.total_steps, precision, World(), Reporter(())), choice=choice
    )
    micro_batch = first_samples(computation.state, data.train, samples_of(computation, 1).sample_ids)
    if not warm_up_ddp(computation.state, micro_batch):
        return None
    seconds = seconds_per_token(computation.state, micro_batch) * float(data.train.lengths.sum()) * steps.epochs
    return None if math.isnan(seconds) else seconds
