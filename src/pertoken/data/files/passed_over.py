"""What a folder or a glob gives, sorted into data and what is passed over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pertoken.data.files.kinds import SUFFIXES, inner_name, kind_of
from pertoken.data.files.other_files import next_step
from pertoken.data.files.splits import is_about_data, left_in_saved_folders
from pertoken.errors import DataError
from pertoken.text import names

__all__ = ["PassedOver", "sort_out"]

_SUFFIXES = (*SUFFIXES, ".ndjson")
_OF_A_RUN = ("metrics.jsonl", "checkpoints", "tensorboard", "wandb")  # beside its recipe.toml
_OF_A_STORE = ("store.json", "samples.arrow")
_HASHES = "hashes.json"  # beside the stores
_OF_A_MODEL = {  # .json files that are no data
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
}


@dataclass
class PassedOver:
    """Files found, by what becomes of them."""

    data: list[Path] = field(default_factory=list)
    ours: set[Path] = field(default_factory=set)  # hidden, or written by pertoken
    others: list[Path] = field(default_factory=list)  # no data, by their kind

    def told(self, root: Path) -> str:
        """What is passed over, named as seen from `root`; "" for nothing."""

        def shown(files: Iterable[Path]) -> str:
            return names(str(file.relative_to(root)) for file in files)

        parts = []
        if self.ours:
            parts.append(f"{len(self.ours)} hidden or written by pertoken: {shown(self.ours)}")
        if self.others:
            steps = sorted({step for file in self.others if (step := next_step(file))})
            more = f" ({'; '.join(steps)})" if steps else ""
            parts.append(f"{len(self.others)} of kinds that are no data: {shown(self.others)}{more}")
        return f"files passed over, {'; '.join(parts)}" if parts else ""


def sort_out(candidates: Sequence[Path], root: Path | None, *, names_kind: bool = False) -> PassedOver:
    """`root` is the folder that was named; with `names_kind` the suffix was, so that every file is taken.

    Files of other suffixes are data where their content is rows, of whatever name.
    """
    files = [file for file in candidates if file.is_file()]
    known = [file for file in files if names_kind or inner_name(file).suffix.lower() in _SUFFIXES]
    known = [file for file in known if not is_about_data(file) and (names_kind or file.name not in _OF_A_MODEL)]
    ours, left, taken = _written_by_us(files, root), left_in_saved_folders(known), set(known)
    found = PassedOver()
    for file in files:
        if file in ours:
            found.ours |= {file} & taken
        elif is_about_data(file):
            continue
        elif (file not in taken and (file.name in _OF_A_MODEL or not _is_of_rows(file))) or file in left:
            found.others.append(file)
        else:
            found.data.append(file)
    return found


def _is_of_rows(file: Path) -> bool:
    """A file of another name. Text of any other name is a README, a licence, a program: no data unless it is named."""
    try:
        return kind_of(file).format != "text"
    except (DataError, OSError):
        return False


def _written_by_us(files: Iterable[Path], root: Path | None) -> set[Path]:
    """Those that a run or a build wrote; also, below `root`, the hidden ones."""

    @cache
    def is_run(folder: Path) -> bool:
        return (folder / "recipe.toml").is_file() and any((folder / name).exists() for name in _OF_A_RUN[:2])

    @cache
    def is_store(folder: Path) -> bool:
        return all((folder / name).is_file() for name in _OF_A_STORE)

    def is_ours(file: Path) -> bool:
        parts = file.relative_to(root).parts if root is not None else ()
        if any(part.startswith(".") for part in parts):
            return True
        if file.name == _HASHES and any(map(is_store, file.parent.iterdir())):
            return True
        steps = zip([file, *file.parents], file.parents, strict=False)
        return any((step.name in _OF_A_RUN and is_run(folder)) or is_store(folder) for step, folder in steps)

    return {file for file in files if is_ours(file)}
