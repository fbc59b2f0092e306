"""The essential figures of every step so far, kept with each checkpoint.

`metrics.jsonl` is a file that users read, copy and edit. A checkpoint therefore carries a checksum of every row and the
figures that cannot be computed from anything else, about 65 bytes a step. A resume tells by the checksums which rows
are as the run wrote them, and rebuilds the others.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pertoken.checkpoints.read import LEDGER
from pertoken.checkpoints.state import refuse_newer
from pertoken.tracking.rows import ROWS_VERSION, StepRow

__all__ = ["Ledger", "Mended", "lines_of", "mend", "parsed", "ranges"]

_MOST_LINE_BYTES = 16 * 2**20  # a row has a few hundred; what has no newline for longer is none

_COLUMNS = {  # name -> array's type code
    "check": "q",  # 64 bits of BLAKE2b of the line, without the newline
    **dict.fromkeys(("loss", "loss_sum", "grad_norm", "lr"), "d"),  # NaN: not finite, null in the row
    **dict.fromkeys(("num_tokens", "position_end"), "q"),
    **dict.fromkeys(("epoch", "samples"), "i"),
    "skipped": "b",
}
_SKIPPED = {None: -1, False: 0, True: 1}
_LOST = 2  # in `skipped`: nothing is known of the step
_EXTRAS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_sources", "spike")  # few rows have them
_UNKNOWN = ("aux_loss", "tokens", "micro_batches", "padding_share", "step_s", "tokens_per_s")  # null once rebuilt


class Ledger:
    """Figures of steps 1, 2, 3, ... of a run."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {name: array(code) for name, code in _COLUMNS.items()}
        self._extras: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._columns["check"])

    def add(self, row: StepRow | None, line: bytes) -> None:
        """The next step's row, and its line in the file. None, a row that lacks a figure, counts as lost."""
        if row is None:
            return self.add_lost()
        try:
            start, end = row.positions
            values = {name: _finite(getattr(row, name)) for name in ("loss", "loss_sum", "grad_norm", "lr")}
            values |= {"num_tokens": int(row.num_tokens), "position_end": end, "epoch": row.epoch}
            values |= {"samples": end - start, "check": _check(line), "skipped": _SKIPPED[row.skipped]}
            cells: dict[str, Any] = {name: array(code, [values[name]]) for name, code in _COLUMNS.items()}
        except (ValueError, OverflowError):  # of a file that somebody has edited
            return self.add_lost()
        for name, cell in cells.items():
            self._columns[name].extend(cell)
        in_file = row.to_json()
        extras = {key: in_file[key] for key in _EXTRAS if key in in_file}
        if row.num_tokens != int(row.num_tokens):  # of tokens that are weighted
            extras["num_tokens"] = row.num_tokens
        if extras:
            self._extras[len(self)] = extras
        return None

    def add_lost(self) -> None:
        """The next step, of which nothing is known."""
        for name, column in self._columns.items():
            column.append(_LOST if name == "skipped" else 0)

    def has(self, step: int) -> bool:
        return step <= len(self) and self._columns["skipped"][step - 1] != _LOST

    def bytes_of(self, lines: Iterator[bytes]) -> int | None:
        """Take the rows of all steps from `lines`: how long they are, None where one is not as the run wrote it."""
        end = 0
        for step, check in enumerate(self._columns["check"], start=1):
            line = next(lines, b"")
            if _check(line) != check and line != self.line_of(step):  # which is in the file since an earlier resume
                return None
            if len(line) != len(line.strip()) + 1:
                return None
            end += len(line)
        return end

    def checks(self) -> dict[int, int]:
        """Checksum -> step, of all steps that are known."""
        return {check: i for i, check in enumerate(self._columns["check"], start=1) if self.has(i)}

    def row(self, step: int) -> dict[str, Any]:
        """The row of `step` as a resume writes it: without what is not kept (timings), marked as rebuilt; as lost where
        nothing is known. In its own order of keys, by which a line that an earlier resume wrote is known again."""
        if not self.has(step):
            return {"step": step, "lost": True}
        at: dict[str, Any] = {name: column[step - 1] for name, column in self._columns.items()}
        row: dict[str, Any] = {"step": step, "epoch": at["epoch"]}
        row |= {name: at[name] if math.isfinite(at[name]) else None for name in ("loss", "loss_sum")}
        row |= {"num_tokens": at["num_tokens"]}
        row |= {name: at[name] if math.isfinite(at[name]) else None for name in ("grad_norm", "lr")}
        row |= {"samples": at["samples"], "positions": [at["position_end"] - at["samples"], at["position_end"]]}
        row |= dict.fromkeys(_UNKNOWN)
        if at["skipped"] != _SKIPPED[None]:
            row["skipped"] = bool(at["skipped"])
        return row | self._extras.get(step, {}) | {"rebuilt": True}

    def line_of(self, step: int) -> bytes:
        return json.dumps(self.row(step)).encode() + b"\n"

    def tensors(self) -> dict[str, Tensor]:
        """A copy, for a safetensors file."""
        tensors = {name: torch.from_numpy(np.array(column)) for name, column in self._columns.items()}
        extras = json.dumps(self._extras).encode()
        tensors["extras"] = torch.from_numpy(np.frombuffer(extras, dtype=np.uint8).copy())
        return tensors | {"format_version": torch.tensor(ROWS_VERSION)}

    @classmethod
    def load(cls, folder: Path, step: int) -> Ledger:
        """Of a checkpoint after `step`; empty where it has none, as those of earlier versions.

        Raises CheckpointError where a newer version of pertoken wrote it.
        """
        ledger = cls()
        try:
            tensors = load_file(folder / LEDGER)
            refuse_newer(folder / LEDGER, int(tensors.get("format_version", 1)), ROWS_VERSION)
            extras = json.loads(tensors["extras"].numpy().tobytes())
            for name, code in _COLUMNS.items():
                cells = tensors[name][:step].numpy()
                if cells.dtype != np.dtype(code) or cells.ndim != 1:
                    return cls()
                ledger._columns[name].frombytes(cells.tobytes())
            ledger._extras = {int(number): values for number, values in extras.items() if int(number) <= step}
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError):
            return cls()
        return ledger


@dataclass(frozen=True)
class Mended:
    """The rows of a file that was not as the run left it."""

    lines: list[bytes]  # of steps 1 to N
    rebuilt: list[int]  # steps whose rows come from the checkpoint
    lost: list[int]  # steps of which nothing is known


def mend(path: Path, ledger: Ledger, last_step: int) -> Mended:
    """The rows of steps 1 to `last_step`: from wherever they stand in the file, else from the ledger.

    Steps that the ledger does not reach count if a row says that it is theirs; they are added to it. Raises OSError.
    """
    steps, found = ledger.checks(), dict[int, bytes]()
    claimed: dict[int, bytes] = {}
    for line in lines_of(path):
        content = line.strip()
        step = steps.get(_check(content))
        if step is not None:
            found.setdefault(step, content + b"\n")
        elif (row := parsed(content)) is not None and len(ledger) < row["step"] <= last_step:
            claimed.setdefault(row["step"], content + b"\n")
    for step in range(len(ledger) + 1, last_step + 1):
        if step in claimed:
            found[step] = claimed[step]
            ledger.add(StepRow.from_json(json.loads(claimed[step])), claimed[step])
        else:
            ledger.add_lost()
    missing = [step for step in range(1, last_step + 1) if step not in found]
    lines = [found.get(step) or ledger.line_of(step) for step in range(1, last_step + 1)]
    return Mended(lines, [s for s in missing if ledger.has(s)], [s for s in missing if not ledger.has(s)])


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file that may be anything; none of a file that is not there. Raises OSError."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MOST_LINE_BYTES):
            yield line


def parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line, with a step from 1; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 1 else None


def ranges(steps: Iterable[int]) -> str:
    """Ascending numbers as text, "1, 3-5"; of many ranges the first eight."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in found[:8]]
    return ", ".join(texts) + (", ..." if len(found) > 8 else "")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _check(line: bytes) -> int:
    return int.from_bytes(blake2b(line.strip(), digest_size=8).digest(), "little", signed=True)
