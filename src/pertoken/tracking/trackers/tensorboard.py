"""TensorBoard: event files in `out_dir/tensorboard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pertoken.tracking.rows import StepRow
from pertoken.tracking.trackers.tracker import Opening, Tracker, TrackerKind, finite_figures

__all__ = ["TENSORBOARD"]


class _TensorBoard:
    run_id: str | None = None

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = opening.out_dir / "tensorboard"
        before = set(folder.glob("*"))
        # What an interrupted run logged after its last checkpoint.
        purge = opening.last_step + 1 if opening.last_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self.made: Sequence[Path] = sorted(set(folder.glob("*")) - before)

    def log(self, row: StepRow) -> None:
        for name, value in finite_figures(row).items():
            self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        self._writer.close()


def _check() -> None:
    import torch.utils.tensorboard  # noqa: F401


def _open(opening: Opening) -> Tracker:
    return _TensorBoard(opening)


TENSORBOARD = TrackerKind("tensorboard", check=_check, open=_open)
