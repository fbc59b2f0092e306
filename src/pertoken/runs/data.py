"""From a recipe to its tokenizer and its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pertoken.checkpoints.read import resolve_model_folder, tokenizer_folder
from pertoken.data.chat.template import end_of_turn_id
from pertoken.data.store.build import build_store, open_store
from pertoken.data.store.dataset import Dataset
from pertoken.data.store.folder import Check
from pertoken.data.store.mixture import Mixture, keep_apart, refuse_shared_files
from pertoken.data.store.store import Part, Store
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.errors import DataError, RecipeError
from pertoken.recipe.data import DataConfig
from pertoken.recipe.schema import Recipe
from pertoken.runs.hub import HubNames
from pertoken.tracking.listener import Listener
from pertoken.training.parallel import World

__all__ = ["RunData", "load_data", "prepare"]


@dataclass(frozen=True)
class RunData:
    tokenizer: Any
    eos_token_id: int
    train: Dataset
    eval: Dataset | None
    init_from: str | None = None  # the recipe's, as a path
    commits: dict[str, str] = field(default_factory=dict)  # of each name of the hub

    @property
    def fingerprints(self) -> dict[str, str | None]:
        return {"train": self.train.fingerprint, "eval": self.eval.fingerprint if self.eval else None}

    @property
    def accepted_fingerprints(self) -> dict[str, tuple[str | None, ...]]:
        """What a checkpoint that was trained on these data may hold; (None,) where there is no evaluation data."""
        stores = {"train": self.train, "eval": self.eval}
        return {part: store.fingerprints if store else (None,) for part, store in stores.items()}

    @property
    def files(self) -> dict[str, dict[str, str] | None]:
        """SHA-256 of each file by its name."""
        return {"train": self.train.checksums, "eval": self.eval.checksums if self.eval else None}


def prepare(
    recipe: Recipe, listener: Listener | None = None, *, verify_data: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Make the token store(s) of a recipe, or open them: (train, eval).

    `verify_data`: read all data and every byte of the stores again, trusting nothing that is remembered of them.
    """
    data = load_data(recipe, listener or Listener(), World(), verify_data=verify_data, with_weights=False)
    return data.train, data.eval


def load_data(
    recipe: Recipe,
    listener: Listener,
    world: World,
    *,
    verify_data: bool = False,
    commits: Mapping[str, str] = MappingProxyType({}),
    with_weights: bool = True,
) -> RunData:
    """Tokenizer and samples, the same on every rank. Each machine's data are read by one rank of it at most.

    What the recipe names on the hub is downloaded first: at `commits` those that the run has used before, and weights
    to start from only `with_weights`, or where an adapter's checkpoints have none of their own.
    """
    data, waiting = recipe.data, world.patient()
    with_weights = with_weights or recipe.adapter.kind != "none"
    hub = HubNames(listener, waiting, dict(commits))
    init_from = recipe.init_from
    if init_from is not None and with_weights:
        init_from = hub.model(init_from, "init_from")
    elif init_from is not None and data.tokenizer is None:
        init_from = hub.tokenizer(init_from, "init_from")
    source = init_from if data.tokenizer is None else hub.tokenizer(data.tokenizer, "data.tokenizer")
    assert source is not None, "the recipe requires one"
    if data.sources:
        paths = [hub.data(source.path, "data.sources") for source in data.sources]
    else:
        paths = [hub.data(data.path, "data.path")]
    eval_paths = hub.data(data.eval_path, "data.eval_path")
    folder = Path(source)
    if data.tokenizer is None or (folder / "checkpoints").is_dir():
        folder = tokenizer_folder(resolve_model_folder(folder))
    tokenizer = open_tokenizer(folder, add_tokens=data.add_tokens, chat_template=data.chat_template)
    if recipe.stage == "sft":
        eos_token_id = end_of_turn_id(
            tokenizer, data.template_kwargs, day=data.template_date, end_of_turn=data.end_of_turn
        )
    elif tokenizer.eos_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no eos_token, which ends every document; give it one")
    else:
        eos_token_id = tokenizer.eos_token_id

    def build(paths: tuple[str, ...], key: str, settings: DataConfig) -> Store:
        def here() -> Store:
            return build_store(
                paths,
                stage=recipe.stage,
                tokenizer=tokenizer,
                data=settings,
                paths_key=key,
                verify_data=verify_data,
                on_progress=listener.preparing,
                on_message=listener.message,
            )

        return _once_a_machine(here, data, listener, waiting, "full" if verify_data else "sample")

    train_parts, eval_parts = [], []
    for (name, settings, choice), source_paths in zip(_sources(data), paths, strict=True):
        train_store = build(source_paths, "data.path" if not name else "data.sources", settings)
        if choice:
            train_store = train_store.subset(**choice)
        if settings.eval_fraction:
            train_store, eval_store = train_store.split(settings.eval_fraction, settings.eval_split)
            eval_parts.append(Part(name, eval_store))
        repeat = next((source.repeat for source in data.sources if source.name == name), 1)
        train_parts.append(Part(name, train_store, repeat))
    world.on_main(lambda: refuse_shared_files(train_parts))
    if eval_paths:
        eval_parts = [Part("", build(eval_paths, "data.eval_path", data))]
    else:
        train_parts = world.together(lambda: keep_apart(train_parts, eval_parts, data.eval_split))
    eval_data = _together(eval_parts) if eval_parts else None
    return RunData(tokenizer, eos_token_id, _together(train_parts), eval_data, init_from, hub.commits)


def _sources(data: DataConfig) -> list[tuple[str, DataConfig, dict[str, Any]]]:
    """(name, settings, how many of its rows are chosen) of each source; of `data.path` alone one without a name."""
    if not data.sources:
        return [("", data, {})]
    found = []
    for source in data.sources:
        choice = {"max_rows": source.max_rows, "fraction": source.fraction}
        found.append((source.name, data.of_source(source), {k: v for k, v in choice.items() if v is not None}))
    return found


def _together(parts: list[Part]) -> Dataset:
    """One store is a dataset by itself."""
    return parts[0].store if len(parts) == 1 and not parts[0].name else Mixture(parts)


def _once_a_machine(
    build: Callable[[], Store], data: DataConfig, listener: Listener, world: World, check: Check
) -> Store:
    """Rank 0's store on every rank: opened where the disk is shared, else built by the first rank of each machine.

    That rank also checks a store that is there already, since its disk need not be the one that rank 0 has checked.
    """
    mine: Store | None = None

    def first() -> tuple[str, str]:
        nonlocal mine
        mine = build()
        return mine.name, mine.fingerprint

    name, fingerprint = world.on_main(first)

    def elsewhere() -> None:
        nonlocal mine
        if is_missing:
            mine = build()
            if mine.fingerprint != fingerprint:
                raise DataError(f"data.path: rank {world.rank} finds other data or another tokenizer there than rank 0")

    def opened() -> Store:
        store = mine if mine is not None else open_store(name, fingerprint, data)
        if store is None:
            where = f"data.store: rank {world.rank} does not find what the first rank of its machine has built"
            raise DataError(f"{where}; name a folder that all processes of a machine see")
        return store

    is_first = world.local_rank == 0
    mine = mine if mine is not None or not is_first else open_store(name, fingerprint, data, check)
    is_missing = mine is None and is_first
    missing = world.gather(is_missing).count(True)
    if missing:
        listener.message(f"data.store is not shared: {missing} of the other machines make one of their own")
        world.together(elsewhere)
    return world.together(opened)
