"""What a run records and tells: the metrics file, trackers, gradient statistics, and the listener a caller can pass."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from pertoken.checkpoints.ledger import Ledger, lines_of, mend, parsed, ranges
from pertoken.errors import CheckpointError, RecipeError
from pertoken.files import free_name, write_whole
from pertoken.recipe.schema import LogConfig
from pertoken.runs.files import claim
from pertoken.runs.summary import Summary
from pertoken.text import reason
from pertoken.training.norms import sum_of_squares
from pertoken.training.parallel import whole

__all__ = [
    "GradStats",
    "Listener",
    "MetricsFile",
    "Row",
    "Tracker",
    "check_trackers",
    "gradient_stats",
    "open_trackers",
    "routing_of",
]

Row = dict[str, Any]
"""One step: step epoch loss loss_sum num_tokens aux_loss grad_norm lr samples tokens micro_batches padding_share step_s
tokens_per_s positions, and where they apply eval_loss eval_perplexity eval_bits_per_byte skipped loss_scale expert_load
expert_max_share max_expert_share spike z_loss. `rebuilt` and `lost` mark rows that a resume found missing."""


@dataclass(frozen=True)
class GradStats:
    """Of one parameter's gradient; all None where the backward pass did not reach it."""

    name: str
    mean: float | None
    std: float | None
    norm: float | None


class Listener:
    """Told what happens; does nothing. Subclass what you want to hear (the command line prints)."""

    def preparing(self, done_bytes: int, total_bytes: int) -> None: ...

    def started(self, summary: Summary) -> None: ...

    def stepped(self, row: Row, summary: Summary) -> None: ...

    def evaluating(self, step: int) -> None: ...

    def saved(self, folder: Path) -> None: ...

    def gradients(self, stats: Sequence[GradStats]) -> None: ...

    def message(self, text: str) -> None: ...


def gradient_stats(model: nn.Module) -> list[GradStats]:
    """Mean, standard deviation and L2 norm of every trainable parameter's gradient, as it stands now."""
    stats = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            stats.append(GradStats(name, None, None, None))
        else:
            grad = whole(parameter.grad).double()
            stats.append(
                GradStats(name, float(grad.mean()), float(grad.std(correction=0)), float(sum_of_squares(grad).sqrt()))
            )
    return stats


def routing_of(sums: dict[str, tuple[np.ndarray, float]]) -> Row:
    """A mixture's part of the row, from a step's (sum, count) metrics; nothing for a dense model.

    `aux_loss` is the balance loss before its coefficient, summed over layers (their number when all is balanced).
    `expert_load` is each expert's share of the routed tokens, averaged over layers; `expert_max_share` its largest
    share in any layer, and `max_expert_share` the largest of all.
    """
    row: Row = {}
    if "aux_loss" in sums:
        aux_sum, num_input_tokens = sums["aux_loss"]
        row["aux_loss"] = float(aux_sum) / num_input_tokens
    if "expert_load" in sums:
        load_LE, choices = sums["expert_load"]
        share_LE = load_LE / choices
        row["expert_load"] = [round(float(x), 5) for x in share_LE.mean(0)]
        row["expert_max_share"] = [round(float(x), 5) for x in share_LE.max(0)]
        row["max_expert_share"] = float(share_LE.max())
    return row


class MetricsFile:
    """`metrics.jsonl`: a row per step, in order, none torn and none twice. Row N is line N."""

    def __init__(self, path: Path, *, last_step: int, ledger: Ledger | None = None) -> None:
        """Open for appending after `last_step`: whatever follows its row is dropped.

        `ledger` knows the rows up to `last_step`. Rows that are not as the run wrote them are rebuilt from it, what it
        does not know is marked `"lost": true`, the file as it was is kept aside, and `remark` says so.
        Raises CheckpointError where the file cannot be written.
        """
        self._path = path
        self._waiting: list[bytes] = []  # rows that could not be written yet
        self.ledger = Ledger() if ledger is None else ledger
        self.remark: str | None = None
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path}: not a plain file; move it away")
            end = self._end_of_row(last_step)
            if end is None:
                end = self._mend(last_step)
            path.touch()
            self._size = end
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(self._size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def _end_of_row(self, last_step: int) -> int | None:
        """In bytes; None where not every row up to it is as the run wrote it."""
        lines, known = lines_of(self._path), len(self.ledger)
        end = self.ledger.bytes_of(lines)
        for step in range(known + 1, last_step + 1):  # saved by a version that kept no ledger
            line = next(lines, b"")
            row = parsed(line)
            if end is None or row is None or row["step"] != step or line != line.strip() + b"\n":
                return None
            self.ledger.add(row, line)
            end += len(line)
        return end

    def _mend(self, last_step: int) -> int:
        """Write the file anew. Returns its size."""
        mended = mend(self._path, self.ledger, last_step)
        aside = _kept_aside(self._path)
        content = b"".join(mended.lines)
        write_whole(self._path, content)
        said = [f"{self._path}: not as the run wrote it"]
        if mended.rebuilt:
            said.append(f"rows of steps {ranges(mended.rebuilt)} rebuilt from the checkpoint, without timings")
        if mended.lost:
            said.append(f"rows of steps {ranges(mended.lost)} are lost")
        if not mended.rebuilt and not mended.lost:
            said.append("every row was there and is back on its line")
        if aside is not None:
            claim(self._path.parent, [aside])
            said.append(f"the file as it was is {aside.name}")
        self.remark = "; ".join(said)
        return len(content)

    def write(self, row: Row) -> OSError | None:
        """Add a row. Where the disk does not take it, it is kept and written with the next one; the error is returned
        for the first of them."""
        waited = bool(self._waiting)
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(clean, allow_nan=False).encode()
        self.ledger.add(clean, line)
        self._waiting.append(line + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            return None if waited else error
        return None

    def _write_waiting(self) -> None:
        content, done = b"".join(self._waiting), 0
        try:
            self._file.seek(self._size)
            while done < len(content):
                done += self._file.write(content[done:])
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)  # no torn row, should the process end here
            raise
        self._size += len(content)
        self._waiting.clear()

    def sync(self) -> None:
        """Make every row so far survive a power cut. Raises CheckpointError where one is not even written."""
        try:
            self._write_waiting()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: could not be written ({error}); without its rows a checkpoint could not be "
                "resumed. Free space"
            ) from None

    def close(self) -> None:
        with suppress(OSError):
            self._write_waiting()
        self._file.close()


def _kept_aside(path: Path) -> Path | None:
    """The content of `path` under a new name beside it; None where there is none. `path` stays until it is replaced."""
    if not path.exists() or not path.stat().st_size:
        return None
    aside = free_name(path, "damaged")
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    return aside


class Tracker(Protocol):
    """Somewhere else the rows go."""

    run_id: str | None
    made: Sequence[Path]  # files, or folders with all in them

    def log(self, row: Row) -> None: ...

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


def _numbers(row: Row) -> dict[str, float]:
    skip = ("step", "positions", "skipped")
    return {k: v for k, v in row.items() if k not in skip and isinstance(v, int | float) and math.isfinite(v)}


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

    def log(self, row: Row) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

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

    def log(self, row: Row) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
