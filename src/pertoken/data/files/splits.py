"""Which split of a dataset a file is, told by its name; and the folders that `datasets` saves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from pertoken.data.files.kinds import inner_name
from pertoken.errors import DataError

__all__ = ["Split", "is_about_data", "left_in_saved_folders", "split_of"]

Split = Literal["train", "held_out"]

_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_STATE = "state.json"  # of what `Dataset.save_to_disk` writes
_ABOUT_DATA = (_STATE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def split_of(file: PurePath) -> Split | None:
    """By the first or the last word of its name, or of one of the folders in its path: train-00000-of-00002.parquet,
    gsm8k_test.jsonl, validation/a.txt. None where no split is named."""
    stem = inner_name(Path(file.name)).stem
    found = {_split(name) for name in (*file.parent.parts, _SHARD.sub("", stem))}
    return "held_out" if "held_out" in found else "train" if "train" in found else None


def _split(name: str) -> Split | None:
    words = [word.rstrip("0123456789") for word in re.split(r"[-_. ]+", name.lower())]
    words = [word for word in words if word]
    for word in (words[0], words[-1]) if words else ():
        if word in _TRAIN or word in _HELD_OUT:
            return "train" if word in _TRAIN else "held_out"
    return None


def is_about_data(file: Path) -> bool:
    """Whether `datasets` writes it beside the data."""
    return file.name in _ABOUT_DATA


def left_in_saved_folders(files: Sequence[Path]) -> set[Path]:
    """The .arrow files in folders of `save_to_disk` that are none of the dataset: what `map` and `filter` left there.

    Raises DataError where a file of the dataset is missing, or its list cannot be read.
    """
    left: set[Path] = set()
    for folder in sorted({file.parent for file in files if file.suffix == ".arrow"}):
        if not (folder / _STATE).is_file():
            continue
        listed = _listed(folder / _STATE)
        there = {file for file in files if file.parent == folder and file.suffix == ".arrow"}
        if missing := sorted(set(listed) - {file.name for file in there}):
            raise DataError(f"{folder}: {missing[0]} is missing, which {_STATE} lists; save the dataset again")
        left |= {file for file in there if file.name not in listed}
    return left


def _listed(state: Path) -> list[str]:
    try:
        values: Any = json.loads(state.read_text(encoding="utf-8"))
        return [str(file["filename"]) for file in values["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{state}: not what save_to_disk writes; name the .arrow files themselves") from None
