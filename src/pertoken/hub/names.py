"""Names of the hub, told from paths.

Qwen/Qwen3-0.6B   Qwen/Qwen3-0.6B@main   hf://Qwen/Qwen3-0.6B@main                    a model or its tokenizer
hf://datasets/openai/gsm8k   hf://datasets/openai/gsm8k@main/main/train-*.parquet     data: all of it, or a part
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pertoken.text import shown

__all__ = ["HubName", "check_hub_name", "data_name", "model_name"]

_PREFIX, _DATA_PREFIX = "hf://", "hf://datasets/"
_REPO = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"
_BARE = re.compile(rf"({_REPO})(?:@(.+))?")
_FULL = re.compile(rf"hf://(datasets/|models/)?({_REPO})(?:@(refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/(.*))?")
_NO_OWNERS = ("datasets", "models", "spaces", "kernels", "buckets")  # what begins other names of the hub
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".gguf", ".json", ".jsonl", ".jinja", ".csv", ".txt", ".toml")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, at a revision, and of its files those that are meant."""

    text: str  # as the user wrote it
    kind: Literal["model", "dataset"]
    repo: str  # owner/name
    revision: str | None = None  # a branch, a tag or a commit; None: the newest commit of the main branch
    inside: str = ""  # a file, a folder or a glob; "": everything

    @property
    def source(self) -> str:
        """Repository and revision, whatever is meant of its files."""
        prefix = _DATA_PREFIX if self.kind == "dataset" else ""
        return prefix + self.repo + (f"@{self.revision}" if self.revision else "")


def model_name(text: str) -> HubName | None:
    """What `text` means on the hub, None where it is a path: one that exists, or that no model could be named by.

    Raises ValueError where it begins like a name of the hub and is none of a model's.
    """
    if text.startswith(_PREFIX):
        name = _full(text)
        if name.kind != "model" or name.inside:
            raise ValueError("no name of a model; write owner/name or owner/name@revision")
        return name
    found = _BARE.fullmatch(text)
    if found is None or text.endswith(_FILES) or os.path.lexists(Path(text).expanduser()):
        return None
    return HubName(text, "model", found[1], found[2])


def data_name(text: str) -> HubName | None:
    """What `text` means on the hub, None where it is a path. Raises ValueError where it begins like a name of the hub
    and is none of data, and where it is no path but the name of a repository."""
    if text.startswith(_PREFIX):
        name = _full(text)
        if name.kind != "dataset":
            raise ValueError("no name of data; write hf://datasets/owner/name, with a revision as name@revision")
        return name
    if _BARE.fullmatch(text) and not text.endswith(_FILES) and not os.path.lexists(Path(text).expanduser()):
        raise ValueError(f"no such file or folder; correct it, or write {_DATA_PREFIX}{text} for data of the hub")
    return None


def check_hub_name(text: str) -> str:
    """`text`. Raises ValueError where it begins like a name of the hub and is none."""
    if text.startswith(_PREFIX):
        _full(text)
    return text


def _full(text: str) -> HubName:
    found = _FULL.fullmatch(text)
    if found is None or found[2].partition("/")[0] in _NO_OWNERS:
        raise ValueError(
            f"{shown(text)} is no name of the hub; write hf://datasets/owner/name for data, or owner/name for a model"
        )
    kind: Literal["model", "dataset"] = "dataset" if found[1] == "datasets/" else "model"
    return HubName(text, kind, found[2], found[3] and unquote(found[3]), (found[4] or "").strip("/"))
