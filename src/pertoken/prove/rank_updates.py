"""What several processes do with the two updates of `update.py`: the plan as files, and the steps themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from pertoken.checkpoints.read import Checkpoint, load_model, load_optimizer
from pertoken.checkpoints.saver import save_checkpoint
from pertoken.checkpoints.state import TrainerState
from pertoken.model.protocol import LanguageModel
from pertoken.objective.choose import objective_of
from pertoken.prove.case import FLOAT64, Case, balance_loss_of, set_balance_loss
from pertoken.prove.plain_update import Expected
from pertoken.prove.report import Result
from pertoken.prove.samples import InMemory
from pertoken.prove.update import Planned, judge_updates, named, plan_updates, updates_of, with_settings
from pertoken.recipe.schema import Recipe
from pertoken.training.optimizers import Optimizer, build_optimizer
from pertoken.training.parallel import World, parallelize
from pertoken.training.step import TrainState

__all__ = ["update_of_ranks", "write_plan"]

_PLAN = "plan.json"


def write_plan(folder: Path, case: Case) -> None:
    """Both steps into `folder`, for `update_of_ranks`."""
    planned = plan_updates(case, clipped=True)
    for number, step in enumerate(planned):
        changes = {name: one.change.contiguous() for name, one in step.changes.items()}
        scales = {name: one.scale.float().contiguous() for name, one in step.changes.items()}
        save_file(changes, folder / f"changes-{number}.safetensors")
        save_file(scales, folder / f"scales-{number}.safetensors")
    plan = {
        "recipe": case.recipe.model_dump(mode="json", exclude_none=True),
        "total_steps": case.total_steps,
        "steps": [asdict(replace(step, changes={})) for step in planned],
    }
    (folder / _PLAN).write_text(json.dumps(plan))


def _planned(folder: Path, steps: list[dict[str, object]], *, whole: bool) -> list[Planned]:
    planned = []
    for number, values in enumerate(steps):
        changes: dict[str, Expected] = {}
        if whole:
            scales = load_file(folder / f"scales-{number}.safetensors")
            of_all = load_file(folder / f"changes-{number}.safetensors")
            changes = {name: Expected(change, scales[name]) for name, change in of_all.items()}
        planned.append(Planned(**{**values, "changes": changes}))  # type: ignore[arg-type]
    return planned


def update_of_ranks(
    name: str, how: Literal["ddp", "fsdp"], world: World, model: LanguageModel, samples: InMemory, folder: Path
) -> Result | None:
    """Both steps by all ranks of `world`. Sharded ones are saved and read back in between. None but on rank 0."""
    plan = json.loads((folder / _PLAN).read_text())
    recipe = Recipe.parse(plan["recipe"])
    balance_loss, scratch = balance_loss_of(model), folder / name.replace(" ", "-")

    def state_of(model: LanguageModel) -> tuple[TrainState, Optimizer]:
        wrapped = parallelize(model, how, world, device=FLOAT64.device, layers=model.layers)
        optimizer = build_optimizer(model, with_settings(recipe, dtype="float64").train)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(wrapped, optimizer, scaler, FLOAT64, world, objective=objective_of(recipe.train))
        return state, optimizer

    def resumed(model: LanguageModel, state: TrainState) -> tuple[LanguageModel, TrainState]:
        saved = save_checkpoint(
            scratch,
            model=model,
            tokenizer=None,
            eos_token_id=0,
            optimizer=state.optimizer,
            state=TrainerState(step=1, recipe={}, data={}, scaler={}, micro_batch_tokens=0),
            world=world,
        )
        again = load_model(saved, dtype=torch.float64)
        set_balance_loss(again, balance_loss)
        its_state, its_optimizer = state_of(again)
        load_optimizer(Checkpoint(saved), again, its_optimizer)
        return again, its_state

    if world.is_main:
        scratch.mkdir()
    world.barrier()
    planned = _planned(folder, plan["steps"], whole=world.is_main)
    taken = updates_of(
        recipe,
        planned,
        samples,
        model,
        state_of(model)[0],
        total_steps=plan["total_steps"],
        token_budget=int(samples.lengths.max()),
        between=resumed if how == "fsdp" else lambda model, state: (model, state),
    )
    if not world.is_main:
        return None
    between = "; saved and read back between the two" if how == "fsdp" else ""
    return judge_updates(name, taken, planned, f"{named(recipe.train)}, two steps{between}")
