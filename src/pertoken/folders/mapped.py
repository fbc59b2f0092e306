"""Weights that lie in files until they are asked for, so that a model is never in memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.files import plain_file
from pertoken.text import reason

__all__ = ["MappedWeights"]

_REOPENED_AFTER = 2**24  # bytes that were read: so many of a file's pages count as this process's memory


class MappedWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files by name. Each access maps a tensor anew; it is read where it is used.

    Pages of a mapped file count as memory of the process while it is open, so a file is opened again now and then. Of a
    name in several files the last one counts. Raises ModelError for files that cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, tuple[ExitStack, Any]] = {}
        self._read = 0  # bytes, since files were opened
        for file in files:
            self._file_of |= dict.fromkeys(self._opened(file).keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        if self._read > _REOPENED_AFTER:
            self.close()
        try:
            tensor: Tensor = self._opened(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from None
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def close(self) -> None:
        """Unmap the files, but for what tensors still lie in. They are opened again where need be."""
        for stack, _ in self._open.values():
            stack.close()
        self._open, self._read = {}, 0

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            stack = ExitStack()
            try:
                self._open[file] = (stack, stack.enter_context(safe_open(plain_file(file), framework="pt")))
            except (OSError, SafetensorError) as error:
                raise _unreadable(file, error) from None
        return self._open[file][1]


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file}: cannot be read ({reason(error)}); copy or download it again")
