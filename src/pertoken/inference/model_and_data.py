"""A trained model, and samples of other data made as its own training made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pertoken.checkpoints.read import has_tokenizer, load_model, recipe_of, resolve_model_folder, tokenizer_folder
from pertoken.data.files.find import find_files
from pertoken.data.files.records import Record, read_records
from pertoken.data.formats import formats_that_give
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.schema import Recipe, apply_override

__all__ = ["model_and_data"]

_KEY = "data.eval_path"  # what the data are for


def _data_recipe(folder: Path, path: str, overrides: Sequence[str], *, longest: int) -> Recipe:
    """A recipe that makes samples of the data at `path` as the model in `folder` was trained on them.

    A pertoken checkpoint brings its own settings; any other folder gets the defaults, at most 2,048 tokens a sample and
    the stage that the first row suggests. `overrides` come last. Evaluation has no split and never drops what is long.
    """
    values: dict[str, Any] = {"out_dir": "unused", "init_from": None}
    data: dict[str, Any] = {"max_seq_len": min(longest, 2048), "overlong": "truncate"}
    if saved := recipe_of(folder):
        data = {
            k: v for k, v in saved["data"].items() if k not in ("sources", "eval_path", "eval_fraction", "eval_split")
        }
    values["data"] = data | {"path": path, "tokenizer": data.get("tokenizer")}
    if has_tokenizer(folder):  # the tokenizer as it was saved with the model, added tokens and template included
        values["data"] |= {"tokenizer": str(tokenizer_folder(folder)), "add_tokens": [], "chat_template": None}
    for override in overrides:
        apply_override(values, override)
    values.setdefault("stage", _stage_of(values["data"]))
    if values["stage"] == "pretrain" and values["data"].get("format") in formats_that_give("conversation"):
        values["data"]["format"] = "auto"
    return Recipe.parse(values)


def _stage_of(data: dict[str, Any]) -> str:
    """`pretrain` for raw text, `sft` for conversations, by the first row."""
    path, text_key = data["path"], data.get("text_key", "text")
    for file in find_files((path,), key=_KEY):
        for record in read_records(file):
            if isinstance(record, Record):
                row = record.value
                text = isinstance(row.get(text_key), str) if isinstance(row, dict) else not isinstance(row, list)
                return "pretrain" if text else "sft"
    return "sft"


def model_and_data(
    model: str,
    data: str,
    overrides: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    on_message: Callable[[str], None] = lambda text: None,
) -> tuple[LanguageModel, Store, Any]:
    """The model at `model`, the samples that its own training would make of `data`, and its tokenizer.

    `overrides` are recipe keys, for what a model folder alone does not tell. Of a dataset's splits those are taken that
    are not for training. `on_message` is told what is passed over. Raises ModelError, DataError, RecipeError.
    """
    loaded = load_model(model, dtype=dtype)
    recipe = _data_recipe(resolve_model_folder(model), data, overrides, longest=loaded.facts.max_position_embeddings)
    settings = recipe.data
    assert settings.tokenizer is not None, "Recipe requires one"
    tokenizer = open_tokenizer(settings.tokenizer, add_tokens=settings.add_tokens, chat_template=settings.chat_template)
    store = build_store(
        settings.path, stage=recipe.stage, tokenizer=tokenizer, data=settings, paths_key=_KEY, on_message=on_message
    )
    store.check_vocab(loaded.facts.vocab_size)
    return loaded, store, tokenizer
