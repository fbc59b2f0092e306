"""Somewhere else the rows go: TensorBoard, Weights & Biases. A new one is a class, and a line in `open_trackers`."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pertoken.errors import CheckpointError, RecipeError
from pertoken.recipe.schema import LogConfig
from pertoken.text import reason
from pertoken.tracking.rows import StepRow
from pertoken.tracking.run_files import claim

__all__ = ["Tracker", "check_trackers", "open_trackers"]


class Tracker(Protocol):
    """Somewhere else the rows go."""

    run_id: str | None
    made: Sequence[Path]  # files, or folders with all in them

    def log(self, row: StepRow) -> None: ...

    def close(self) -> None: ...


def check_trackers(log: LogConfig) -> None:
    """Raises RecipeError for a tracker that is not installed, or that would ask for a key."""
    for name in log.trackers:
        try:
            if name == "wandb":
                import wandb

                # wandb reads the environment once a process.
                modes = {os.environ.get("WANDB_MODE"), wandb.setup().settings.mode}
                if not modes & {"offline", "dryrun", "disabled"} and not _has_key(wandb):
                    raise RecipeError(
                        'log.trackers: "wandb" has no API key; run `wandb login`, set WANDB_MODE=offline, or take it '
                        "out of the list"
                    )
            else:
                import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise _not_installed(name) from None


def _has_key(wandb: Any) -> bool:
    """Whether wandb knows who runs this, without asking and without the network."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))


def _not_installed(name: str) -> RecipeError:
    return RecipeError(f'log.trackers: "{name}" is not installed; pip install {name}, or take it out of the list')


def open_trackers(
    log: LogConfig, out_dir: Path, *, recipe: dict[str, Any], run_ids: dict[str, str], last_step: int
) -> dict[str, Tracker]:
    """The trackers of `log.trackers` by name; `run_ids` continues earlier runs. RecipeError where one is missing."""
    kinds: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    trackers: dict[str, Tracker] = {}
    for name in log.trackers:
        try:
            trackers[name] = kinds[name](log, out_dir, recipe, run_ids.get(name), last_step)
        except ImportError:
            raise _not_installed(name) from None
        try:
            claim(out_dir, trackers[name].made)
        except OSError as error:
            raise CheckpointError(f"out_dir={out_dir}: cannot be written ({error.strerror}); choose another") from None
    return trackers


def _numbers(row: StepRow) -> dict[str, float]:
    skip = ("step", "positions", "skipped")
    values = row.to_json()
    return {k: v for k, v in values.items() if k not in skip and isinstance(v, int | float) and math.isfinite(v)}


class _TensorBoard:
    run_id: str | None = None

    def __init__(
        self, log: LogConfig, out_dir: Path, recipe: dict[str, Any], run_id: str | None, last_step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out_dir / "tensorboard"
        before = set(folder.glob("*"))
        purge = last_step + 1 if last_step else None  # what an interrupted run logged after its last checkpoint
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self.made: Sequence[Path] = sorted(set(folder.glob("*")) - before)

    def log(self, row: StepRow) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(
        self, log: LogConfig, out_dir: Path, recipe: dict[str, Any], run_id: str | None, last_step: int
    ) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=log.project,
                name=out_dir.name,
                dir=str(out_dir),
                config=recipe,
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
        self._run.log(_numbers(row), step=row.step)

    def close(self) -> None:
        self._run.finish()
