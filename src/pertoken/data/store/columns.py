"""Samples as an Arrow IPC file: written as a stream, read in place."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pertoken.data.batch.sample import Sample, as_count
from pertoken.data.samples import Row
from pertoken.data.store.sums import SummedFile

__all__ = ["SCHEMA", "Columns", "join", "write"]

# Per record batch: bounds memory while writing, and keeps the batches few.
_BATCH_TOKENS = 4_000_000
_BATCH_ROWS = 65_536

SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),  # T + 1
        "loss_mask": pa.list_(pa.uint8()),  # T, 0 or 1: a byte each, unlike bool, so that it is read without a copy
        "weights": pa.list_(pa.float32()),  # T, of a sample with other weights, which has no loss_mask; else none
        "length": pa.int32(),  # T
        "num_tokens": pa.float64(),  # supervised: the sum of the weights
        "num_bytes": pa.float64(),  # UTF-8, of the supervised text, times its weights
        "max_token_id": pa.int32(),
        "file": pa.int32(),  # index into the files of store.json
        "line": pa.int64(),
        "row_digest": pa.uint64(),
        "is_tail": pa.bool_(),
    }
)

_NOTHING = np.zeros(0, np.bool_)
_LISTS = ("tokens", "loss_mask", "weights")


class Columns:
    """The memory-mapped record batches as one table with random access."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._lists = [tuple(_list_views(batch.column(name)) for name in _LISTS) for batch in self._batches]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> np.ndarray:
        parts = [_values(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0)

    def damaged(self, sums: Mapping[str, int]) -> str | None:
        """The first column that differs from the checksums that `join` returned, or None."""
        names = _summed_columns()
        if not self._batches:
            return None
        with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as threads:  # zlib lets other threads run
            found = threads.map(lambda name: self._sum(name) == sums.get(name), names)
            return next((name for name, same in zip(names, found, strict=True) if not same), None)

    def _sum(self, name: str) -> int:
        total = 0
        for batch in self._batches:
            total = _add_to_sum(total, batch, name)
        return total

    def value(self, name: str, i: int) -> int:
        batch, row = self._find(i)
        return int(self._batches[batch].column(name)[row].as_py())

    def sample(self, i: int) -> Sample:
        """Views of the file, nothing is copied."""
        batch, row = self._find(i)
        tokens, mask, weights = (values[offsets[row] : offsets[row + 1]] for offsets, values in self._lists[batch])
        return Sample(tokens, mask.view(np.bool_) if len(mask) else weights)

    def _find(self, i: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._starts, i, side="right")) - 1
        return batch, i - int(self._starts[batch])


def _list_views(column: Any) -> tuple[np.ndarray, np.ndarray]:
    return _values(column.offsets), _values(column.values)


def write(path: Path, rows: Iterable[Row]) -> dict[str, int | float]:
    """Stream the samples into record batches. Returns the totals of a report."""
    totals: dict[str, int | float] = {"samples": 0, "tokens": 0, "num_tokens": 0}
    pending: list[Row] = []
    pending_tokens = 0
    with path.open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for row in rows:
            pending.append(row)
            pending_tokens += len(row.tokens)
            totals["samples"] += 1
            totals["tokens"] += len(row.loss_mask)
            totals["num_tokens"] += _num_tokens(row)
            if pending_tokens >= _BATCH_TOKENS or len(pending) == _BATCH_ROWS:
                writer.write_batch(_batch(pending))
                pending, pending_tokens = [], 0
        if pending:
            writer.write_batch(_batch(pending))
    return totals


def join(paths: Iterable[Path], path: Path) -> dict[str, Any]:
    """Write the record batches of several files, as they are and in order, into one.

    Returns the checksums of the file's blocks (`SummedFile.sums`) and, as "columns", those of the columns that a run
    reads as a whole: all numbers, and where the lists begin and end.
    """
    columns = dict.fromkeys(_summed_columns(), 0)
    with path.open("wb") as file:
        summed = SummedFile(file)
        with pa.ipc.new_file(pa.PythonFile(summed, mode="w"), SCHEMA) as writer:
            for part in paths:
                with pa.OSFile(str(part)) as source:  # not mapped: read once, a batch in memory at a time
                    reader = pa.ipc.open_file(source)
                    for i in range(reader.num_record_batches):
                        batch = reader.get_batch(i)
                        writer.write_batch(batch)
                        for name in columns:
                            columns[name] = _add_to_sum(columns[name], batch, name)
        file.flush()
        os.fsync(file.fileno())  # a rename that outlives a power cut must not name an empty file
    return {**summed.sums, "columns": columns}


def _summed_columns() -> list[str]:
    return [f"{name}.offsets" if name in _LISTS else name for name in SCHEMA.names]


def _add_to_sum(total: int, batch: Any, name: str) -> int:
    column = batch.column(name.removesuffix(".offsets"))
    values: Any = _values(column.offsets if "." in name else column)
    return zlib.crc32(values.view(np.uint8), total)


def _num_tokens(row: Row) -> int | float:
    mask = row.loss_mask
    return int(np.count_nonzero(mask)) if mask.dtype == np.bool_ else as_count(mask.sum(dtype=np.float64))


def _batch(rows: list[Row]) -> Any:
    columns: dict[str, list[Any]] = {
        "tokens": [row.tokens for row in rows],
        "loss_mask": [row.loss_mask if row.loss_mask.dtype == np.bool_ else _NOTHING for row in rows],
        "weights": [row.loss_mask if row.loss_mask.dtype != np.bool_ else _NOTHING for row in rows],
        "length": [len(row.loss_mask) for row in rows],
        "num_tokens": [_num_tokens(row) for row in rows],
        "num_bytes": [row.num_bytes for row in rows],
        "max_token_id": [int(row.tokens.max()) for row in rows],
        "file": [row.file for row in rows],
        "line": [row.line for row in rows],
        "row_digest": [row.digest for row in rows],
        "is_tail": [row.is_tail for row in rows],
    }
    return pa.record_batch([_array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


# Between numpy and Arrow by their buffers: `pa.array` and `to_numpy` would import pandas where it is installed.


def _array(values: Sequence[Any] | np.ndarray, type: Any) -> Any:
    """A column of numbers, of truth values or of lists of numbers."""
    if pa.types.is_list(type):
        offsets = pa.py_buffer(np.cumsum([0, *map(len, values)]).astype(np.int32))
        return pa.Array.from_buffers(
            type, len(values), [None, offsets], children=[_array(np.concatenate(values), type.value_type)]
        )
    if type == pa.bool_():  # a bit each
        data = np.packbits(np.array(values, np.bool_), bitorder="little")
    else:
        data = np.array(values, type.to_pandas_dtype())
    return pa.Array.from_buffers(type, len(values), [None, pa.py_buffer(data)])


def _values(array: Any) -> np.ndarray:
    """A column of numbers as it lies in the file; of truth values a copy, a byte each."""
    data, start, end = array.buffers()[1], array.offset, array.offset + len(array)
    if array.type == pa.bool_():
        return np.unpackbits(np.frombuffer(data, np.uint8), count=end, bitorder="little")[start:].view(np.bool_)
    dtype = array.type.to_pandas_dtype()
    return np.frombuffer(data, dtype)[start:end] if end > start else np.zeros(0, dtype)
