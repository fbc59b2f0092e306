"""Weights & Biases: a run of project `log.project`, which a resume continues."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pertoken.errors import RecipeError
from pertoken.text import reason
from pertoken.tracking.rows import StepRow
from pertoken.tracking.trackers.tracker import Opening, Tracker, TrackerKind, finite_figures

__all__ = ["WANDB"]


class _WandB:
    def __init__(self, opening: Opening) -> None:
        import wandb

        out_dir, run_id = opening.out_dir, opening.run_id
        try:
            self._run = wandb.init(
                project=opening.log.project,
                name=out_dir.name,
                dir=str(out_dir),
                config=opening.recipe,
                id=run_id,
                resume="allow" if run_id else None,
            )
        except (wandb.errors.Error, OSError) as error:  # no such key, no network
            raise RecipeError(
                f'log.trackers: "wandb" cannot start ({reason(error)}); set WANDB_MODE=offline, or take it out of the '
                "list"
            ) from None
        self.run_id: str | None = self._run.id
        folder = out_dir / "wandb" / Path(self._run.dir).parent.name
        self.made: Sequence[Path] = [folder] if folder.is_dir() else []

    def log(self, row: StepRow) -> None:
        self._run.log(finite_figures(row), step=row.step)

    def close(self) -> None:
        self._run.finish()


def _check() -> None:
    """Raises RecipeError where wandb would ask for a key."""
    import wandb

    # wandb reads the environment once a process.
    modes = {os.environ.get("WANDB_MODE"), wandb.setup().settings.mode}
    if not modes & {"offline", "dryrun", "disabled"} and not _has_key(wandb):
        raise RecipeError(
            'log.trackers: "wandb" has no API key; run `wandb login`, set WANDB_MODE=offline, or take it '
            "out of the list"
        )


def _has_key(wandb: Any) -> bool:
    """Whether wandb knows who runs this, without asking and without the network."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))


def _open(opening: Opening) -> Tracker:
    return _WandB(opening)


WANDB = TrackerKind("wandb", check=_check, open=_open)
