"""Memory that one step frees serves the next one."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty", "forget_blocks"]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized, on the CPU, in memory that an earlier tensor of about this size no longer uses, if there is any.

    malloc returns large blocks to the system, which clears their pages when they are next asked for: for the logits of
    a step that takes longer than computing them. Told to keep them, glibc before 2.38 cannot give the same aligned
    block out again (posix_memalign looks for a larger one), and a process comes to hold twice what it uses.
    """
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size < _SMALL or _use_count is None:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        free = [block for block in _blocks if size <= 2 * block.nbytes() <= 4 * size and _users(block) == _OURS]
        block = min((b for b in free if b.nbytes() >= size), key=torch.UntypedStorage.nbytes, default=None)
        if block is None:
            if free:  # a larger one takes the place of one that has become too small
                too_small = max(free, key=torch.UntypedStorage.nbytes)
                _blocks[:] = [b for b in _blocks if b is not too_small]
                del too_small
            free.clear()
            block = _new_block(size)
            _blocks.append(block)
        return torch.empty(0, dtype=dtype).set_(block, 0, shape)  # type: ignore[call-overload, no-any-return]


def _new_block(size: int) -> torch.UntypedStorage:
    """A mapping of its own, gone when it is given up; in large pages where the system has them."""
    step = 2 ** (size.bit_length() - 3)  # so that sizes repeat
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, -(-size // step) * step, **private)
    if size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()


def forget_blocks() -> None:
    """Give back what `empty` keeps, as soon as nobody uses it."""
    with _lock:
        _blocks.clear()


def _users(block: torch.UntypedStorage) -> int:
    return 0 if _use_count is None else _use_count(block._cdata)


# Not public, though torch's own CUDA graphs rest on it; without it, memory comes from malloc.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_SMALL, _LARGE = 2**20, 2**23
_lock = threading.Lock()
_blocks: list[torch.UntypedStorage] = []
_OURS = _users(torch.empty(1).untyped_storage())
