"""What the tests of a GPU share. They are marked `gpu`, are skipped without one, and run by `make gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _leaves_the_memory_free() -> Iterator[None]:
    """Several processes test on one GPU."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
