"""From a recipe to the model that it trains: a checkpoint's, another model to start from, or random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pertoken.checkpoints.read import Checkpoint, base_of, load_model, resolve_model_folder
from pertoken.engines.choice import Choice
from pertoken.engines.choose import choose_engine
from pertoken.errors import CheckpointError, ModelError, RecipeError
from pertoken.folders.adapters import adapt, adapted_modules, checksums, merge, targeted_modules
from pertoken.folders.files import count_weights, weight_files
from pertoken.folders.gguf import count_gguf
from pertoken.folders.open import load_adapter, resize_embeddings
from pertoken.gguf_file import is_gguf
from pertoken.hub.fetch import name_of
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import Base, keep_frozen_in
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


def build_model(
    recipe: Recipe,
    data: RunData,
    checkpoint: Checkpoint | None,
    precision: Precision,
    listener: Listener | None = None,
) -> LanguageModel:
    """From the checkpoint, from `init_from`, or from random weights; checked against data and recipe."""
    try:
        return _build_model(recipe, data, checkpoint, precision, listener or Listener())
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RecipeError("[model]: out of memory while it was built; free memory, or make it smaller") from None


def _build_model(
    recipe: Recipe, data: RunData, checkpoint: Checkpoint | None, precision: Precision, listener: Listener
) -> LanguageModel:
    train, dtype = recipe.train, precision.parameter_dtype
    model: LanguageModel
    if checkpoint is not None:
        model = _load_checkpoint(checkpoint, recipe, data, precision)
        _set_balance_loss(model, recipe)
    elif recipe.init_from is None:
        check_size(recipe, len(data.tokenizer), precision.device)
        model = CausalLM(recipe.model.resolve(len(data.tokenizer)), seed=train.seed, dtype=dtype)
    else:
        assert data.init_from is not None
        model = _load_initial(recipe, data, precision, listener)
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
    """What runs `model`: engine, loss and activation checkpointing as the recipe says. Raises RecipeError.

    Frozen matrices are put into `model.frozen_dtype`."""
    train = recipe.train
    if recipe.model.frozen_dtype == "bfloat16":
        keep_frozen_in(torch.bfloat16, model.layers)
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


def _frozen_dtype(recipe: Recipe, precision: Precision) -> torch.dtype | None:
    """What the blocks' matrices are loaded in, where the run keeps them in less than its parameters."""
    return torch.bfloat16 if recipe.model.frozen_dtype == precision.dtype == "bfloat16" else None


def _load_checkpoint(checkpoint: Checkpoint, recipe: Recipe, data: RunData, precision: Precision) -> LanguageModel:
    """An adapter's base is where it was, or where `init_from` says now; whether it is still the same is checked."""
    dtype = precision.parameter_dtype
    if recipe.adapter.kind == "none":
        return load_model(checkpoint.folder, dtype=dtype)
    base = None
    assert data.init_from is not None
    try:
        if recipe.init_from != checkpoint.recipe.init_from or data.init_from != recipe.init_from:  # of the hub
            base = base_of(resolve_model_folder(data.init_from))
        return load_adapter(checkpoint.folder, dtype=dtype, blocks_dtype=_frozen_dtype(recipe, precision), base=base)
    except ModelError as error:
        raise CheckpointError(f"{error}; or say with init_from where the base is now") from None


def _load_initial(recipe: Recipe, data: RunData, precision: Precision, listener: Listener) -> LanguageModel:
    """The model to fine-tune, with room for the tokenizer's new tokens, or with the adapter to train."""
    path, init_from, num_tokens = data.init_from, recipe.init_from, len(data.tokenizer)
    assert path is not None
    folder = resolve_model_folder(path)
    if folder.suffix != ".pth":
        numbers = count_gguf(folder) if is_gguf(folder) else count_weights(weight_files(base_of(folder)))[1]
        check_parameters(f"init_from={init_from}", numbers, recipe, precision.device)
    model = load_model(
        folder,
        dtype=precision.parameter_dtype,
        blocks_dtype=_frozen_dtype(recipe, precision),
        for_adapter=recipe.adapter.kind != "none",
    )
    for key in sorted(recipe.model.model_fields_set - {"vocab_size", "frozen_dtype"}):
        asked, has = getattr(recipe.model, key), model.setting(key)
        if asked is not None and key in MOE_KEYS and not model.facts.has_experts:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has no experts; leave the key out")
        if asked is not None and asked != has and key not in _BALANCE_LOSS:
            raise RecipeError(f"model.{key}={asked}: the model at {init_from} has {has}; leave the key out")
    _set_balance_loss(model, recipe)
    if recipe.adapter.kind == "none" and model.adapter is not None:
        base = model.adapter.base.name
        merge(model)
        listener.message(f"init_from={init_from}: an adapter; merged into its base {base}, and all of it is trained")
    if recipe.adapter.kind != "none":
        if num_tokens > model.facts.vocab_size:
            raise RecipeError(
                f"adapter.kind={recipe.adapter.kind!r}: the tokenizer has {num_tokens} tokens and the model "
                f"{model.facts.vocab_size}; an adapter trains no embeddings, so use the model's own tokenizer"
            )
        _adapt(model, recipe, data, folder, listener)
    elif num_tokens > model.facts.vocab_size:
        resize_embeddings(model, num_tokens)
    return model


def _adapt(model: LanguageModel, recipe: Recipe, data: RunData, folder: Path, listener: Listener) -> None:
    """A new adapter, or the one in `folder`, which must be as the recipe says."""
    asked, found = recipe.adapter, model.adapter
    if found is None:
        adapt(model, asked, _base(recipe, data, folder), seed=recipe.train.seed)
        return
    for key in ("r", "alpha", "rslora"):
        if (ours := getattr(asked, key)) != (theirs := getattr(found, key)):
            raise RecipeError(
                f"adapter.{key}={ours}: the adapter at {recipe.init_from} has {theirs}; put that, or leave [adapter] "
                "out to merge it and train all of the model"
            )
    if set(targeted_modules(model, asked)) != (there := set(adapted_modules(model))):
        last = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
        raise RecipeError(f"adapter.targets={list(asked.targets)}: the adapter at {recipe.init_from} has {last}")
    if found.dropout:
        listener.message(f"init_from={recipe.init_from}: lora_dropout={found.dropout:g}: nothing drops out here")
    base, name = base_of(folder), found.base.name
    name = str(base.resolve()) if Path(name).expanduser().exists() else name
    model.adapter = replace(found, base=Base(name, found.base.revision, checksums(base)), dropout=0.0)


def _base(recipe: Recipe, data: RunData, folder: Path) -> Base:
    """What the adapter is for, as peft opens it: a folder, or on the hub the very commit."""
    assert recipe.init_from is not None
    name = name_of(recipe.init_from, "model", "init_from")
    if name is None:
        return Base(str(folder.resolve()), files=checksums(folder))
    return Base(name.repo, data.commits[name.source], checksums(folder))


def _set_balance_loss(model: LanguageModel, recipe: Recipe) -> None:
    """Part of the objective, not of the architecture: the recipe's, or where it says nothing the loaded model's own."""
    balance_loss = model.facts.balance_loss
    if balance_loss is not None:
        asked = {
            ours: value for key, ours in _BALANCE_LOSS.items() if (value := getattr(recipe.model, key)) is not None
        }
        model.set_balance_loss(replace(balance_loss, **asked))
