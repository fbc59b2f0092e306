"""`trainer_state.json`: what a checkpoint knows besides weights, optimizer and rows. Its types, and its versions."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from pertoken.errors import CheckpointError, RecipeError
from pertoken.recipe.old_keys import without_old_keys
from pertoken.text import one_line, reason, shown

__all__ = ["GONE_KEYS", "STATE_VERSION", "ProbeLoss", "TrainerState", "read_state", "refuse_newer"]

STATE_VERSION = 3
"""1: states without a number, whose recipes may have the keys of `recipe/old_keys.py` and of `GONE_KEYS`.

2: states that do not count the evaluations without a better loss; no run of theirs could stop early.
"""

GONE_KEYS: dict[str, str] = {}
"""Recipe keys that earlier versions had and nothing replaces: dotted key -> what a resume says of it."""


@dataclass(frozen=True)
class ProbeLoss:
    """The loss of the run's probe, one short sample, under the saved weights."""

    sample_id: int
    num_tokens: float  # supervised
    loss_sum: float  # nats


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """A run after `step`. Fields stand in the order of the file's keys.

    What has a default was not kept by some earlier version, and a resume does without it.
    """

    step: Annotated[int, Field(ge=0)]  # the last one done
    recipe: dict[str, Any]  # nested, with this version's keys
    data: dict[str, str | None]  # fingerprints: "train", "eval"
    data_files: dict[str, dict[str, str] | None] = field(default_factory=dict)  # the same: file name -> SHA-256
    hub: dict[str, str] = field(default_factory=dict)  # of each name of the hub in the recipe the commit
    compiled: bool | None = None  # whether code was generated for the machine
    environment: dict[str, Any] | None = None  # what the last bits depend on; compared as a whole
    versions: dict[str, str] = field(default_factory=dict)  # of torch and Python, for whoever reads the file
    scaler: dict[str, Any]  # the loss scaler's own state; empty where it is off
    grad_norms: list[float] = field(default_factory=list)  # of the last steps, oldest first
    micro_batch_tokens: int  # the budget, lower than the recipe's where memory ran out
    best_eval_loss: float | None = None
    evals_without_best: Annotated[int, Field(ge=0)] = 0  # in a row, up to the last one
    tracker_run_ids: dict[str, str] = field(default_factory=dict)
    probe: ProbeLoss | None = None

    def to_json(self) -> str:
        """The file's content, in the newest version."""
        return json.dumps({"format_version": STATE_VERSION, **asdict(self)}, indent=1)


def read_state(text: str, where: Path) -> tuple[TrainerState, tuple[str, ...]]:
    """The state in the content of a file, of this or an earlier version, and what to say of keys that are no more.

    Raises CheckpointError, with one line that names file, field and value, where it is no such state, or a newer
    version's.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a trainer state of pertoken's ({reason(error)})") from None
    version = values.pop("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{where}: format_version={shown(version)}: must be a whole number from 1")
    refuse_newer(where, version, STATE_VERSION)
    remarks: tuple[str, ...] = ()
    if version < STATE_VERSION and isinstance(values.get("recipe"), dict):
        values["recipe"], remarks = migrate_recipe(values["recipe"], where)
    try:
        return _adapter().validate_json(json.dumps(values), strict=True), remarks
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_explained(error)}; restore the file") from None


def refuse_newer(where: Path, version: int, known: int) -> None:
    """Raises CheckpointError for a file of a version that this one does not know."""
    if version > known:
        raise CheckpointError(
            f"{where}: format_version={version}: written by a newer version of pertoken, this one reads up to {known}; "
            "nothing was changed. Update pertoken"
        )


def migrate_recipe(recipe: dict[str, Any], where: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The recipe of an earlier version with today's keys, and a line for each key that nothing replaces.

    Keys that only have another name now need no line. Raises CheckpointError where one has a value that it never had.
    """
    try:
        renamed, _ = without_old_keys(recipe)
    except RecipeError as error:
        raise CheckpointError(f"{where}: recipe: {one_line(str(error))}") from None
    recipe, remarks = copy.deepcopy(renamed), []
    for key, what in GONE_KEYS.items():
        if (found := _take(recipe, key)) is not None:
            remarks.append(f"{where}: {key}={shown(found[0])} of an earlier version: {what}")
    return recipe, tuple(remarks)


def _take(recipe: dict[str, Any], key: str) -> tuple[Any] | None:
    """Remove a dotted key: its value, in a tuple since that may be None; None where it is not there."""
    *sections, leaf = key.split(".")
    inner: Any = recipe
    for section in sections:
        inner = inner.get(section) if isinstance(inner, dict) else None
    return (inner.pop(leaf),) if isinstance(inner, dict) and leaf in inner else None


@cache
def _adapter() -> TypeAdapter[TrainerState]:
    return TypeAdapter(TrainerState)


def _explained(error: ValidationError) -> str:
    """The first problem: field, value, what is wrong."""
    problem = error.errors()[0]
    field_name = one_line(".".join(str(part) for part in problem["loc"]))
    if problem["type"] == "missing":
        return f"{field_name}: missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field_name}: no such field"
    return f"{field_name}={shown(problem['input'])}: {reason(ValueError(problem['msg']))}"
