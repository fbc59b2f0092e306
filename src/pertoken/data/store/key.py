"""The name of a store: a hash over everything that decides its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pertoken.data.store.columns import SCHEMA
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import special_ids
from pertoken.recipe.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StoreKey"]

_VERSION = 2  # of how samples are made: raise it when the same data would give others
_FORMAT = 3  # of the folder: raise it when it is written otherwise; the samples, and their fingerprint, stay the same


@dataclass(frozen=True)
class StoreKey:
    """What decides a store, beside the contents of its files."""

    settings: dict[str, Any]
    tokenizer: list[Any]
    files: list[str]  # their names

    @classmethod
    def of(
        cls,
        files: Sequence[Path],
        data: DataConfig,
        *,
        stage: Literal["sft", "pretrain"],
        tokenizer: PreTrainedTokenizerBase,
        encoder: Encoder,
    ) -> StoreKey:
        return cls(_settings(stage, data), _tokenizer_identity(tokenizer, encoder), [str(file) for file in files])

    def fingerprint(self, contents: list[str]) -> str:
        return _hash(_VERSION, self.settings, contents, self.tokenizer)

    def name(self, contents: list[str]) -> str:
        """The folder's. The files' names decide it too, for `file:line` must be right."""
        return _hash(_FORMAT, str(SCHEMA), self.fingerprint(contents), self.files)

    def meta(self, contents: list[str]) -> dict[str, Any]:
        named = {"fingerprint": self.fingerprint(contents), "files": self.files, "settings": self.settings}
        return {**named, "contents": contents}


def _settings(stage: str, data: DataConfig) -> dict[str, Any]:
    """Everything in the recipe that decides the samples."""
    names = ("format", "text_key", "prompt_key", "completion_key", "template_kwargs", "max_seq_len")
    values = data.model_dump(mode="json", include={*names, "overlong", "on_bad_row"})
    return {**values, "stage": stage, "tail": data.eval_fraction if data.eval_split == "tail" else 0.0}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> list[Any]:
    named = [tokenizer.special_tokens_map, sorted(special_ids(tokenizer))]
    return [encoder.to_str(), *named, tokenizer.chat_template]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
