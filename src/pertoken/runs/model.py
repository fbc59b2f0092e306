"""From a recipe to the model that it trains: a checkpoint's, another model to start from, or random weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from pertoken.checkpoints.read import Checkpoint, load_model, resolve_model_folder
from pertoken.engines.choice import Choice
from pertoken.engines.choose import choose_engine
from pertoken.errors import RecipeError
from pertoken.folders.files import count_weights, weight_files
from pertoken.folders.open import resize_embeddings
from pertoken.model.decoder import CausalLM
from pertoken.model.protocol import LanguageModel
from pertoken.objective.choose import objective_of
from pertoken.objective.fused_heads import require_head
from pertoken.objective.row_terms import refuse_row_terms
from pertoken.recipe.model import MOE_KEYS
from pertoken.recipe.schema import Recipe
from pertoken.runs.data import RunData
from pertoken.tracking.listener import Listener
from pertoken.training.memory import check_parameters, check_size, out_of_memory
from pertoken.training.precision import Precision

__all__ = ["build_model", "prepare_model"]

_BALANCE_LOSS = {"aux_loss": "kind", "aux_loss_coef": "coefficient"}


def build_model(recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision) -> LanguageModel:
    """From the checkpoint, from `init_from`, or from random weights; checked against data and recipe."""
    try:
        return _build_model(recipe, data, checkpoint, precision)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RecipeError("[model]: out of memory while it was built; free memory, or make it smaller") from None


def _build_model(recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision) -> LanguageModel:
    train, dtype = recipe.train, precision.parameter_dtype
    model: LanguageModel
    if checkpoint is not None:
        model = load_model(checkpoint.folder, dtype=dtype)
        _set_balance_loss(model, recipe)
    elif recipe.init_from is None:
        check_size(recipe, len(data.tokenizer), precision.device)
        model = CausalLM(recipe.model.resolve(len(data.tokenizer)), seed=train.seed, dtype=dtype)
    else:
        assert data.init_from is not None
        model = _load_initial(recipe, data.init_from, len(data.tokenizer), precision)
    if recipe.data.max_seq_len > model.facts.max_position_embeddings:
        raise RecipeError(
            f"data.max_seq_len={recipe.data.max_seq_len}: the model has "
            f"max_position_embeddings={model.facts.max_position_embeddings}; lower data.max_seq_len"
        )
    for store in (data.train, data.eval):
        if store is not None:
            store.check_vocab(model.facts.vocab_size)
    return model.to(precision.device)


def prepare_model(
    model: LanguageModel,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    precision: Precision,
    total_steps: int,
    listener: Listener,
) -> Choice:
    """What runs `model`: engine, loss and activation checkpointing as the recipe says. Raises RecipeError."""
    train = recipe.train
    if train.activation_checkpointing and not model.can_checkpoint_activations:
        raise RecipeError(
            f"train.activation_checkpointing=true: {model.facts.family} does not offer it; set it to false"
        )
    choice = choose_engine(
        model,
        train.engine,
        dtype=precision.dtype,
        device=precision.device,
        total_steps=total_steps,
        before=None if checkpoint is None else checkpoint.state.compiled,
    )
    execution = replace(choice.execution, activation_checkpointing=train.activation_checkpointing)
    if train.loss_impl != "auto":
        require_head(train.loss_impl, precision.device.type, getattr(torch, precision.dtype))
        refuse_row_terms(train.loss_impl, objective_of(train).row_terms)
        execution = replace(execution, loss_impl=train.loss_impl)
    if choice.remark is not None:
        listener.message(choice.remark)
    return replace(choice, execution=execution)


def _load_initial(recipe: Recipe, path: str, num_tokens: int, precision: Precision) -> LanguageModel:
    """The model to fine-tune, with room for the tokenizer's new tokens."""
    folder, init_from = resolve_model_folder(path), recipe.init_from
    if folder.is_dir():
        _, numbers = count_weights(weight_files(folder))
        check_parameters(f"init_from={init_from}", numbers, recipe, precision.device)
    model = load_model(folder, dtype=precision.parameter_dtype)
    for key in sorted(recipe.model.model_fields_set - {"vocab_size"}):
        asked, has = getattr(recipe.model, key), model.setting(key)
        if asked is not None and key in MOE_KEYS and not model.facts.has_experts:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has no experts; leave the key out")
        if asked is not None and asked != has and key not in _BALANCE_LOSS:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has {has}; leave the key out")
    _set_balance_loss(model, recipe)
    if num_tokens > model.facts.vocab_size:
        resize_embeddings(model, num_tokens)
    return model


def _set_balance_loss(model: LanguageModel, recipe: Recipe) -> None:
    """Part of the objective, not of the architecture: the recipe's, or where it says nothing the loaded model's own."""
    balance_loss = model.facts.balance_loss
    if balance_loss is not None:
        asked = {
            ours: value for key, ours in _BALANCE_LOSS.items() if (value := getattr(recipe.model, key)) is not None
        }
        model.set_balance_loss(replace(balance_loss, **asked))
