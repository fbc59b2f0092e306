"""What a tracker is: somewhere else the rows go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pertoken.recipe.schema import LogConfig
from pertoken.tracking.rows import StepRow

__all__ = ["Opening", "Tracker", "TrackerKind", "finite_figures"]


class Tracker(Protocol):
    """Somewhere else the rows go. What it raises costs no training: it gets no more rows, and the user is told."""

    run_id: str | None  # by which a resume continues the same run; None where nothing is needed
    made: Sequence[Path]  # files, or folders with all in them

    def log(self, row: StepRow) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with."""

    log: LogConfig
    out_dir: Path
    recipe: dict[str, Any]  # dotted key -> value
    run_id: str | None  # of the run that is resumed
    last_step: int  # of the checkpoint that is resumed; later rows are logged again. 0: a new run


@dataclass(frozen=True)
class TrackerKind:
    """One kind of tracker. Both functions raise ImportError where its package is not installed."""

    name: str  # as in `log.trackers`
    check: Callable[[], None]  # before anything is touched; raises RecipeError where it could not start
    open: Callable[[Opening], Tracker]  # raises PertokenError


def finite_figures(row: StepRow) -> dict[str, float]:
    """The row's numbers that a curve can be drawn of."""
    skip = ("step", "positions", "skipped")
    values = row.to_json()
    values |= {f"eval/{name}/loss": loss for name, loss in (row.eval_sources or {}).items()}
    return {k: v for k, v in values.items() if k not in skip and isinstance(v, int | float) and math.isfinite(v)}
