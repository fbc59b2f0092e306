"""Which files of a repository are downloaded: weights as safetensors, settings, tokenizers, data.

Never code, and never a pickle, which can run code when it is read.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

from pertoken.text import names

__all__ = ["Part", "choose", "separate_folders"]

Part = Literal["model", "tokenizer", "data"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[^/]+-\d+-of-\d+\.safetensors")
_SETTINGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.json", "*.jinja"),
    "additional_chat_templates/*.jinja",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DATA = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SPLIT = re.compile(r"(train|test|valid|val|dev|eval)", re.IGNORECASE)


def choose(files: Iterable[str], part: Part, inside: str = "") -> list[str]:
    """Of a repository's files those to download, sorted. `inside` narrows data to a file, a folder or a glob.

    Raises ValueError, with the reason and the remedy, where the repository has nothing to download for `part`.
    """
    files = sorted(files)
    if part == "data":
        return _data(files, inside)
    found = [file for file in files if _is_one_of(file, _TOKENIZER)]
    if part == "tokenizer" and not found:
        raise ValueError("has no tokenizer; name another")
    found += [file for file in files if file in _SETTINGS]
    return sorted(found if part == "tokenizer" else [*found, *_weights(files)])


def separate_folders(chosen: Sequence[str], inside: str = "") -> list[str]:
    """The folders that the data lie in, if they look like several sets of data, not like the splits of one."""
    if glob.has_magic(inside):
        return []
    base = f"{inside}/" if inside else ""
    folders = {file.removeprefix(base).partition("/")[0] for file in chosen if "/" in file.removeprefix(base)}
    several = sorted(folder for folder in folders if not _SPLIT.match(folder))
    return several if len(several) > 1 else []


def _is_one_of(file: str, patterns: Sequence[str]) -> bool:
    return any(_matches(file.split("/"), pattern.split("/")) for pattern in patterns)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As a glob with `**` does it: no other sign stands for a slash."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _weights(files: Sequence[str]) -> list[str]:
    if "config.json" not in files:
        raise ValueError("has no config.json, so it is no model that transformers would open; name another")
    if _WEIGHTS in files:
        return [_WEIGHTS]
    if _INDEX in files:
        return [_INDEX, *(file for file in files if _SHARD.fullmatch(file))]
    if "adapter_config.json" in files:
        raise ValueError("is an adapter; merge it into its model (PEFT's merge_and_unload) and name that one's folder")
    pickled = [file for file in files if file.endswith(_PICKLES)]
    if pickled:
        raise ValueError(
            f"has its weights as pickles alone ({names(pickled)}), which can run code when they are read and are not "
            "downloaded; name a revision that has model.safetensors (@refs/pr/N where somebody has proposed them), or "
            "convert it with transformers"
        )
    raise ValueError(f"has no {_WEIGHTS}; name a model that has one")


def _data(files: Sequence[str], inside: str) -> list[str]:
    meant = [file for file in files if _is_inside(file, inside)]
    found = [file for file in meant if _is_data(file)]
    if found:
        return found
    known = f"{', '.join(_DATA)}, plain or compressed"
    if inside:
        there = f"holds {names(meant)}, none of it data" if meant else "is not there"
        raise ValueError(f"{inside} {there}; name a file, a folder or a glob that has {known}")
    if scripts := [file for file in files if file.endswith(".py")]:
        raise ValueError(
            f"has no data, only code that would fetch them ({names(scripts)}), which is neither downloaded nor run; "
            "name its revision @refs/convert/parquet, if the hub has made one, or another set of data"
        )
    raise ValueError(f"has no data file ({known}); name another")


def _is_inside(file: str, inside: str) -> bool:
    if glob.has_magic(inside):
        return _matches(file.split("/"), inside.split("/"))
    return not inside or file == inside or file.startswith(f"{inside}/")


def _is_data(file: str) -> bool:
    path = PurePosixPath(file)
    if any(part.startswith(".") for part in path.parts):
        return False
    suffixes = path.suffixes[:-1] if path.suffix in _COMPRESSED else path.suffixes
    return bool(suffixes) and suffixes[-1] in _DATA
