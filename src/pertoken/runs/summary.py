"""What is said before the first step: counts, an example, and how long it may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.share import Share, share_of
from pertoken.data.store.dataset import Dataset
from pertoken.data.view import supervised_pieces
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.schema import Recipe
from pertoken.tracking.summary import Summary
from pertoken.training.step import TrainState

__all__ = ["summarize"]


def summarize(
    recipe: Recipe,
    store: Dataset,
    eval_store: Dataset | None,
    tokenizer: Any,
    model: LanguageModel,
    state: TrainState,
    *,
    engine_note: str,
    token_budget: int,
    start_step: int,
    total_steps: int,
    seconds_per_token: float,
) -> Summary:
    """Of a run that is about to take step `start_step + 1`. NaN seconds: nobody knows how long it will take."""
    train = recipe.train
    first = step_at(start_step + 1, num_samples=len(store), batch_size=train.batch_size, seed=train.seed)
    share = share_of(
        store, first.sample_ids, token_budget=token_budget, rank=state.world.rank, world_size=state.world.size
    )
    epochs = total_steps / steps_per_epoch(len(store), train.batch_size)
    tokens_left = float(store.lengths.sum()) * epochs * max(0.0, 1 - start_step / total_steps)
    example = int(first.sample_ids[0])
    return Summary(
        stage=recipe.stage,
        out_dir=Path(recipe.out_dir),
        device=str(state.precision.device),
        dtype=state.precision.dtype,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        family=model.facts.family,
        engine=state.execution.engine.name,
        engine_note=engine_note,
        num_samples=len(store),
        num_eval_samples=len(eval_store) if eval_store is not None else 0,
        num_tokens=store.count(),
        total_tokens=int(store.lengths.sum()),
        data_notes=tuple(_data_notes(recipe, store, eval_store)),
        batch_size=train.batch_size,
        micro_batches=len(share.micro_batches),
        padding_share=_padding_share(model, share, state),
        world_size=state.world.size,
        epochs=train.epochs
        if train.max_steps is None
        else -(-total_steps // steps_per_epoch(len(store), train.batch_size)),
        start_step=start_step,
        total_steps=total_steps,
        expected_s=tokens_left * seconds_per_token / state.world.size,
        example_source=store.where(example),
        example=tuple(supervised_pieces(store[example], tokenizer)),
    )


def _data_notes(recipe: Recipe, store: Dataset, eval_store: Dataset | None) -> list[str]:
    """What became of the rows of training and evaluation data, and whether any harm was done."""
    notes, harmed = store.notes(), store.num_harmed
    if eval_store is not None and recipe.data.eval_path:
        notes += [f"evaluation data: {note}" for note in eval_store.notes()]
        harmed += eval_store.num_harmed
    if harmed:
        times = "time" if harmed == 1 else "times"
        notes.append(
            f"{harmed:,} {times} a sample is lost or trained otherwise than its row says; `pertoken audit` shows where"
        )
    return notes


def _padding_share(model: LanguageModel, share: Share, state: TrainState) -> float:
    device, execution = state.precision.device, state.execution
    with state.precision.autocast():  # attention's form depends on what it would be given
        counts = [model.padding(micro_batch.to(device), execution) for micro_batch in share.micro_batches]
    operations = sum(float(of_all) for _, of_all in counts)
    return sum(float(on_padding) for on_padding, _ in counts) / operations if operations else 0.0
