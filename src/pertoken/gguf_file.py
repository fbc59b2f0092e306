"""GGUF, the file format of llama.cpp: what stands before the weights, checked against the file's length.

The package `gguf` has a reader, which takes seconds and hundreds of MB for a vocabulary of 262,144 tokens, and trusts
the lengths that a file gives. This one reads the same (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.errors import ModelError
from pertoken.files import plain_file
from pertoken.text import names, reason, shown

__all__ = ["GgufFile", "GgufTensor", "is_gguf", "read_gguf"]

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where `general.alignment` says nothing
_MOST_DIMS = 4  # ggml's GGML_MAX_DIMS
# How a value of each type is packed; two types have no fixed length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in its file, and as what."""

    name: str
    shape: tuple[int, ...]  # as torch has it: a matrix is [out, in]
    kind: int  # a number of ggml's enum of quantizations
    offset: int  # of its first byte in the file


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a file, and a record of each of its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    num_bytes: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name for what the model is. Raises ModelError."""
        return str(self.require("general.architecture", str))

    def require(self, key: str, kind: type) -> Any:
        """The value of a key, which must be of this type. Raises ModelError."""
        value = self.get(key, kind)
        if value is None:
            raise ModelError(f"{self.path}: {key}: missing; convert the model again")
        return value

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The same; `default` where the file has no such key."""
        value = self.metadata.get(key, default)
        if isinstance(value, int) and kind is float:
            value = float(value)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ModelError(f"{self.path}: {key}={shown(value)}: must be {_WORDS[kind]}; convert the model again")
        return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return path.suffix.lower() == ".gguf"


def read_gguf(path: str | Path) -> GgufFile:
    """Everything in front of the weights. Raises ModelError for a file that is none, or that ends too early."""
    path = Path(path)
    try:
        with plain_file(path).open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: not a GGUF file; name one that llama.cpp opens")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a GGUF file") from None
    except struct.error:
        raise ModelError(f"{path}: ends before its weights begin; copy or download it again") from None
    except (ValueError, OverflowError) as error:  # text that is not UTF-8 is a ValueError too
        raise ModelError(f"{path}: damaged ({reason(error)}); copy or download it again") from None


class _Reader:
    """A place in the file that moves on. Raises struct.error at its end and ValueError for what no file has."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 4

    def read(self) -> GgufFile:
        version = self.scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "of a big-endian machine" if swapped in _VERSIONS else f"of version {version}"
            raise ModelError(f"{self.path}: a GGUF file {what}; convert the model again (version 3, little-endian)")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        found = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={shown(alignment)}: must be a power of two")
        start = -(-self.at // alignment) * alignment
        tensors = {t.name: GgufTensor(t.name, t.shape, t.kind, start + t.offset) for t in found}
        if len(tensors) != len(found):
            twice = [name for name, count in Counter(t.name for t in found).items() if count > 1]
            raise ValueError(f"more than one tensor is named {names(twice)}")
        return GgufFile(self.path, metadata, tensors, len(self.content))

    def tensor(self) -> GgufTensor:
        """Its record; the offset is still that from the first weight."""
        name, num_dims = self.string(), self.scalar("I")
        if num_dims > _MOST_DIMS:
            raise ValueError(f"{num_dims} dimensions of a tensor, where there are {_MOST_DIMS} at most")
        fastest_first = [self.scalar("Q") for _ in range(num_dims)]
        return GgufTensor(name, tuple(reversed(fastest_first)), self.scalar("I"), self.scalar("Q"))

    def scalar(self, packed: str) -> Any:
        (value,) = struct.unpack_from(f"<{packed}", self.content, self.at)
        self.at += struct.calcsize(f"<{packed}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.content):
            raise struct.error("a text longer than the file")
        return self.content[start : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_scalar(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.content):
            raise struct.error("a list longer than the file")
        if kind in (_STRING, _ARRAY):
            if kind == _ARRAY:
                raise ValueError("a list of lists, which no model needs")
            return [self.string() for _ in range(count)]
        packed = f"<{count}{_scalar(kind)}"
        values = struct.unpack_from(packed, self.content, self.at)
        self.at += struct.calcsize(packed)
        return list(values)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}, which GGUF has not")
    return _SCALARS[kind]
