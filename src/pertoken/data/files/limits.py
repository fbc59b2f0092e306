"""How much of a file is held in memory."""

from __future__ import annotations

__all__ = ["BLOCK_BYTES", "LONG_BYTES", "MAX_LINE_BYTES"]

MAX_LINE_BYTES = 64 << 20  # of a row, whatever the file: what is longer would only fill the memory
LONG_BYTES = 32 << 20  # of a text that is read in blocks
BLOCK_BYTES = 1 << 20  # that are read at a time
