"""Somewhere else the rows go. A tracker is one file of this package and one line of `TRACKERS` in `recipe/homes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pertoken.errors import CheckpointError, RecipeError
from pertoken.recipe.homes import TRACKERS, at_home
from pertoken.recipe.schema import LogConfig
from pertoken.tracking.run_files import claim
from pertoken.tracking.trackers.tracker import Opening, Tracker, TrackerKind

__all__ = ["Tracker", "check_trackers", "open_trackers"]


def check_trackers(log: LogConfig) -> None:
    """Raises RecipeError for a tracker that is not installed, or that would ask for a key."""
    for name in log.trackers:
        try:
            _kind(name).check()
        except ImportError:
            raise _not_installed(name) from None


def open_trackers(
    log: LogConfig, out_dir: Path, *, recipe: dict[str, Any], run_ids: dict[str, str], last_step: int
) -> dict[str, Tracker]:
    """The trackers of `log.trackers` by name; `run_ids` continues earlier runs. RecipeError where one is missing."""
    trackers: dict[str, Tracker] = {}
    for name in log.trackers:
        try:
            trackers[name] = _kind(name).open(Opening(log, out_dir, recipe, run_ids.get(name), last_step))
        except ImportError:
            raise _not_installed(name) from None
        try:
            claim(out_dir, trackers[name].made)
        except OSError as error:
            raise CheckpointError(f"out_dir={out_dir}: cannot be written ({error.strerror}); choose another") from None
    return trackers


def _kind(name: str) -> TrackerKind:
    kind: TrackerKind = at_home(TRACKERS[name])
    return kind


def _not_installed(name: str) -> RecipeError:
    return RecipeError(f'log.trackers: "{name}" is not installed; pip install {name}, or take it out of the list')
