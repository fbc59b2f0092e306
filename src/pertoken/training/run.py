"""From a recipe to a run: everything that happens before the first step."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pertoken.config import Recipe
from pertoken.data.order import steps_per_epoch
from pertoken.data.store import Store, build_store
from pertoken.data.tokenizer import end_of_turn_id, load_tokenizer
from pertoken.errors import CheckpointError, RecipeError
from pertoken.files import FolderLock
from pertoken.fused_heads import require_head
from pertoken.kernels.memory import forget_blocks
from pertoken.model.folder import resize_embeddings
from pertoken.model.transformer import CausalLM
from pertoken.model_config import MOE_KEYS
from pertoken.training.checkpoint import (
    Checkpoint,
    load_model,
    load_optimizer,
    resolve_model_folder,
)
from pertoken.training.compilation import compile_model
from pertoken.training.loop import Run, fit
from pertoken.training.metrics import Listener, MetricsFile, open_trackers
from pertoken.training.optim import build_optimizer
from pertoken.training.parallel import World, join_world, parallelise
from pertoken.training.precision import Precision, resolve_device
from pertoken.training.probe import Probe, environment, verify
from pertoken.training.run_folder import changed_data, earlier_run, keep_others_out, make_room, refuse_changes
from pertoken.training.saving import Saver
from pertoken.training.signals import stop_on_signals
from pertoken.training.step import TrainState
from pertoken.training.summary import summarise

__all__ = ["RunData", "TrainResult", "build_model", "load_data", "prepare", "train"]

_BALANCE_LOSS = ("aux_loss", "aux_loss_coef")


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is."""

    out_dir: Path
    checkpoint: Path  # the last one
    step: int
    best_eval_loss: float | None


@dataclass(frozen=True)
class RunData:
    tokenizer: Any
    eos_token_id: int
    train: Store
    eval: Store | None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        return {"train": self.train.fingerprint, "eval": self.eval.fingerprint if self.eval else None}

    @property
    def files(self) -> dict[str, dict[str, str] | None]:
        """SHA-256 of each file by its name."""
        return {"train": self.train.checksums, "eval": self.eval.checksums if self.eval else None}


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    listener: Listener | None = None,
) -> TrainResult:
    """Train as `recipe` says, into `recipe.out_dir`, which no other process may train into meanwhile.

    `resume` continues from the newest valid checkpoint (with nothing saved it starts fresh), and refuses where data,
    or the loss of the checkpoint's probe, are no longer what they were, unless `force`; `overwrite` deletes an earlier
    run there; an `out_dir` in use without either raises CheckpointError.

    Every process that torchrun starts calls it alike; rank 0 writes, and it alone tells `listener` what happens.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite: give one of the two")
    if force and not resume:
        raise RecipeError("--force: goes on in spite of what --resume finds changed; give both")
    with join_world(recipe.train.device) as world, FolderLock() as lock:
        heard = listener if listener is not None and world.is_main else Listener()
        return _train(recipe, world, heard, lock, resume=resume, overwrite=overwrite, force=force)


def _train(
    recipe: Recipe, world: World, listener: Listener, lock: FolderLock, *, resume: bool, overwrite: bool, force: bool
) -> TrainResult:
    out_dir, started_s = Path(recipe.out_dir), time.monotonic()
    device = resolve_device(recipe.train.device, world.local_rank if world.size > 1 else None)
    world.on_main(lambda: keep_others_out(lock, out_dir))
    folder = world.on_main(lambda: earlier_run(out_dir, resume=resume, overwrite=overwrite, listener=listener))
    checkpoint = Checkpoint(folder) if folder is not None else None
    if checkpoint is not None:
        refuse_changes(recipe, checkpoint)
    data = load_data(recipe, listener, world)
    if checkpoint is not None:
        _refuse_other_data(data, checkpoint, force=force, listener=listener)
    precision = Precision(recipe.train.dtype, device)
    if precision.is_emulated():
        listener.message('this processor emulates bfloat16; train.dtype="float32" is faster here')

    total_steps = _total_steps(recipe, len(data.train))
    model = build_model(recipe, data, checkpoint, precision)
    compiled = _prepare_model(model, recipe, checkpoint, precision, total_steps, listener)
    # Only now, with recipe, data and model known to be good on every rank, is anything in out_dir touched.
    world.on_main(lambda: make_room(out_dir, recipe, lock, resume=resume, overwrite=overwrite))
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
        with stop_on_signals(echo_s=5.0 if world.size > 1 else 0.0) as stop:
            step = fit(run, stop)
    finally:
        if run.metrics is not None:
            run.metrics.close()
        for tracker in run.trackers.values():
            tracker.close()
        forget_blocks()
    assert run.last_checkpoint is not None, "a finished run has a checkpoint"
    return TrainResult(out_dir, run.last_checkpoint, step, run.best_eval_loss)


def prepare(recipe: Recipe, listener: Listener | None = None) -> tuple[Store, Store | None]:
    """Make the token store(s) of a recipe, or open them: (train, eval)."""
    data = load_data(recipe, listener or Listener(), World())
    return data.train, data.eval


def _refuse_other_data(data: RunData, checkpoint: Checkpoint, *, force: bool, listener: Listener) -> None:
    what = changed_data(checkpoint, data.fingerprints, data.files)
    if what is not None and not force:
        raise CheckpointError(f"{what}; restore it, start a new run from it with init_from, or go on with --force")
    if what is not None:
        listener.message(f"--force: going on, though {what}")


def load_data(recipe: Recipe, listener: Listener, world: World) -> RunData:
    data = recipe.data
    source = data.tokenizer or recipe.init_from
    assert source is not None, "the recipe requires one"
    folder = Path(source)
    if data.tokenizer is None or (folder / "checkpoints").is_dir():
        folder = resolve_model_folder(folder)
    tokenizer = load_tokenizer(folder, add_tokens=data.add_tokens, chat_template=data.chat_template)
    if recipe.stage == "sft":
        eos_token_id = end_of_turn_id(tokenizer, data.template_kwargs)
    elif tokenizer.eos_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no eos_token, which ends every document; give it one")
    else:
        eos_token_id = tokenizer.eos_token_id

    def build(paths: tuple[str, ...]) -> Store:
        def once() -> Store:
            return build_store(
                paths, stage=recipe.stage, tokenizer=tokenizer, data=data, on_progress=listener.preparing
            )

        world.on_main(lambda: once() and None)  # the others find it in the cache
        return once()

    train_store, eval_store = build(data.path), None
    if data.eval_path:
        eval_store = build(data.eval_path)
    elif data.eval_fraction:
        train_store, eval_store = train_store.split(data.eval_fraction, data.eval_split)
    return RunData(tokenizer, eos_token_id, train_store, eval_store)


def _total_steps(recipe: Recipe, num_samples: int) -> int:
    train = recipe.train
    total = train.max_steps or train.epochs * steps_per_epoch(num_samples, train.batch_size)
    if train.warmup_steps >= total and train.warmup_steps > 0:
        raise RecipeError(f"train.warmup_steps={train.warmup_steps}: the run has only {total} steps; warm up for fewer")
    return total


def build_model(recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision) -> CausalLM:
    """From the checkpoint, from `init_from`, or from random weights; checked against data and recipe."""
    train, dtype = recipe.train, precision.parameter_dtype
    if checkpoint is not None:
        model = load_model(checkpoint.folder, dtype=dtype)
        _set_balance_loss(model, recipe)
    elif recipe.init_from is None:
        model = CausalLM(recipe.model.resolve(len(data.tokenizer)), seed=train.seed, dtype=dtype)
    else:
        model = _load_initial(recipe, recipe.init_from, len(data.tokenizer), dtype)
    if recipe.data.max_seq_len > model.config.max_position_embeddings:
        raise RecipeError(
            f"data.max_seq_len={recipe.data.max_seq_len}: the model has "
            f"max_position_embeddings={model.config.max_position_embeddings}; lower data.max_seq_len"
        )
    for store in (data.train, data.eval):
        if store is not None:
            store.check_vocab(model.config.vocab_size)
    return model.to(precision.device)


def _prepare_model(
    model: CausalLM,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    precision: Precision,
    total_steps: int,
    listener: Listener,
) -> bool:
    """For training; whether code was generated for this machine."""
    train = recipe.train
    model.activation_checkpointing = train.activation_checkpointing
    if train.loss_impl != "auto":
        require_head(train.loss_impl, precision.device.type, getattr(torch, precision.dtype))
        model.loss_impl = train.loss_impl
    before = None if checkpoint is None else checkpoint.state.get("compiled")
    compiled, remark = compile_model(model, train.compile, precision, total_steps=total_steps, before=before)
    if remark is not None:
        listener.message(remark)
    return compiled


def _load_initial(recipe: Recipe, init_from: str, num_tokens: int, dtype: torch.dtype) -> CausalLM:
    """The model to fine-tune, with room for the tokenizer's new tokens."""
    model = load_model(init_from, dtype=dtype)
    for key in sorted(recipe.model.model_fields_set - {"vocab_size"}):
        asked, has = getattr(recipe.model, key), getattr(model.config, key, None)
        if asked is not None and key in MOE_KEYS and not model.config.use_moe:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has no experts; leave the key out")
        if asked is not None and asked != has and key not in _BALANCE_LOSS:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has {has}; leave the key out")
    _set_balance_loss(model, recipe)
    if num_tokens > model.config.vocab_size:
        resize_embeddings(model, num_tokens)
    return model


def _set_balance_loss(model: CausalLM, recipe: Recipe) -> None:
    """Part of the objective, not of the architecture: the recipe's, or where it says nothing the loaded model's own."""
    if not model.config.use_moe:
        return
    asked = {key: value for key in _BALANCE_LOSS if (value := getattr(recipe.model, key)) is not None}
    model.config = model.config.model_copy(update=asked)


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
) -> Run:
    """Optimiser, scaler and files around the model, as they stood at the checkpoint or at the start."""
    train, out_dir = recipe.train, Path(recipe.out_dir)
    wrapped = parallelise(
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
    state = TrainState(wrapped, optimizer, scaler, precision, world)
    probe, here = Probe(data.train, train.seed), environment(precision, ranks=world.size, compiled=compiled)
    if "probe" in saved:
        same = here == saved.get("environment")
        now = probe.measure(state)
        remark = verify(saved["probe"], now, same=same, dtype=train.dtype, where=probe.where, force=force)
        if remark is not None:
            listener.message(remark)
    summary = summarise(
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
    trackers = world.on_main_alone(
        lambda: open_trackers(
            recipe.log,
            out_dir,
            recipe=recipe.flat(),
            run_ids=saved.get("tracker_run_ids", {}),
            last_step=start_step,
        )
    )
    metrics = world.on_main_alone(lambda: MetricsFile(out_dir / "metrics.jsonl", last_step=start_step))
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
        carried={
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
