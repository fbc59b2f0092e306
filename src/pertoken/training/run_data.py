"""From a recipe to its tokenizer and its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.config import Recipe
from pertoken.data.store import Store, build_store
from pertoken.data.tokenizer import end_of_turn_id, open_tokenizer
from pertoken.errors import RecipeError
from pertoken.training.checkpoint import resolve_model_folder
from pertoken.training.metrics import Listener
from pertoken.training.parallel import World

__all__ = ["RunData", "load_data", "prepare"]


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


def prepare(recipe: Recipe, listener: Listener | None = None) -> tuple[Store, Store | None]:
    """Make the token store(s) of a recipe, or open them: (train, eval)."""
    data = load_data(recipe, listener or Listener(), World())
    return data.train, data.eval


def load_data(recipe: Recipe, listener: Listener, world: World) -> RunData:
    data = recipe.data
    source = data.tokenizer or recipe.init_from
    assert source is not None, "the recipe requires one"
    folder = Path(source)
    if data.tokenizer is None or (folder / "checkpoints").is_dir():
        folder = resolve_model_folder(folder)
    tokenizer = open_tokenizer(folder, add_tokens=data.add_tokens, chat_template=data.chat_template)
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
