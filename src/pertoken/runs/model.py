"""From a recipe to the model that it trains: a checkpoint's, another model to start from, or random weights."""

from __future__ import annotations

import torch

from pertoken.checkpoints.read import Checkpoint, load_model, resolve_model_folder
from pertoken.engines.choose import compile_model
from pertoken.errors import RecipeError
from pertoken.folders.files import count_weights, weight_files
from pertoken.folders.open import resize_embeddings
from pertoken.model.decoder import CausalLM
from pertoken.objective.choose import objective_of
from pertoken.objective.fused_heads import require_head
from pertoken.objective.row_terms import refuse_row_terms
from pertoken.recipe.model import MOE_KEYS
from pertoken.recipe.schema import Recipe
from pertoken.runs.data import RunData
from pertoken.tracking.metrics import Listener
from pertoken.training.memory import check_parameters, check_size, out_of_memory
from pertoken.training.precision import Precision

__all__ = ["build_model", "prepare_model"]

_BALANCE_LOSS = ("aux_loss", "aux_loss_coef")


def build_model(recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision) -> CausalLM:
    """From the checkpoint, from `init_from`, or from random weights; checked against data and recipe."""
    try:
        return _build_model(recipe, data, checkpoint, precision)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RecipeError("[model]: out of memory while it was built; free memory, or make it smaller") from None


def _build_model(recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision) -> CausalLM:
    train, dtype = recipe.train, precision.parameter_dtype
    if checkpoint is not None:
        model = load_model(checkpoint.folder, dtype=dtype)
        _set_balance_loss(model, recipe)
    elif recipe.init_from is None:
        check_size(recipe, len(data.tokenizer), precision.device)
        model = CausalLM(recipe.model.resolve(len(data.tokenizer)), seed=train.seed, dtype=dtype)
    else:
        model = _load_initial(recipe, recipe.init_from, len(data.tokenizer), precision)
    if recipe.data.max_seq_len > model.config.max_position_embeddings:
        raise RecipeError(
            f"data.max_seq_len={recipe.data.max_seq_len}: the model has "
            f"max_position_embeddings={model.config.max_position_embeddings}; lower data.max_seq_len"
        )
    for store in (data.train, data.eval):
        if store is not None:
            store.check_vocab(model.config.vocab_size)
    return model.to(precision.device)


def prepare_model(
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
        refuse_row_terms(train.loss_impl, objective_of(train).row_terms)
        model.loss_impl = train.loss_impl
    before = None if checkpoint is None else checkpoint.state.get("compiled")
    compiled, remark = compile_model(model, train.compile, precision, total_steps=total_steps, before=before)
    if remark is not None:
        listener.message(remark)
    return compiled


def _load_initial(recipe: Recipe, init_from: str, num_tokens: int, precision: Precision) -> CausalLM:
    """The model to fine-tune, with room for the tokenizer's new tokens."""
    folder = resolve_model_folder(init_from)
    if folder.is_dir():
        _, numbers = count_weights(weight_files(folder))
        check_parameters(f"init_from={init_from}", numbers, recipe, precision.device)
    model = load_model(folder, dtype=precision.parameter_dtype)
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
