"""The name of a store: a hash over everything that decides its contents.

All settings of the recipe's [data] are part of it but those of `DO_NOT_DECIDE`. A setting that nobody thought of is
therefore part of it, and costs a store that is made again; it never serves samples that were made otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from pertoken.data.formats import formats_that_give
from pertoken.data.store.columns import SCHEMA
from pertoken.data.store.folder import FORMAT_VERSION
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import bos_of, special_ids
from pertoken.data.tokens.trained import CHATML
from pertoken.recipe.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DO_NOT_DECIDE", "READ_OTHERWISE_BEFORE", "StoreKey"]

_VERSION = 4  # of how samples are made: raise it when the same data and settings, defaults too, would give others

DO_NOT_DECIDE = {  # the settings that do not decide the samples, and why
    "path": "the contents of the files are part of the key",
    "sources": "each makes a store of its own",
    "eval_path": "makes a store of its own",
    "eval_fraction": "chooses among the samples; where it cuts documents, it is part of the key as `tail`",
    "eval_split": "as eval_fraction",
    "tokenizer": "what is in it is part of the key",
    "add_tokens": "part of the tokenizer",
    "chat_template": "part of the tokenizer",
    "store": "where the samples are, not what they are",
    "workers": "any number of processes makes the same samples",
}

# By which the folders of format version 4 were named.
_SCHEMA_V4 = pa.schema(
    [
        pa.field(field.name, pa.int64()) if field.name in ("num_tokens", "num_bytes") else field
        for field in SCHEMA
        if field.name != "weights"
    ]
)

# The findings of rows of which versions before 4 made other samples.
READ_OTHERWISE_BEFORE = ("typed_as_text", "typed_as_special", "ends_with_eos", "weighted", "calls", "crlf")

# Fingerprints of before version 3, which named the settings that decide, instead of those that do not.
_V2_SETTINGS = {"format", "text_key", "prompt_key", "completion_key", "template_kwargs", "max_seq_len"}
_V2_SETTINGS |= {"overlong", "on_bad_row"}
_V2_FORMATS = ["messages", "conversations", "prompt_completion"]


@dataclass(frozen=True)
class StoreKey:
    """What decides a store, beside the contents of its files."""

    settings: dict[str, Any]
    settings_v2: dict[str, Any] | None  # None: version 2 had no such samples
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
        identity, names = _tokenizer_identity(tokenizer, encoder), [str(file) for file in files]
        settings, bos = _settings(stage, data), bos_of(tokenizer) if stage == "pretrain" else None
        if bos is not None:
            return cls({**settings, "bos": bos}, None, identity, names)
        settings_v2 = _settings_v2(stage, data) if _made_as_before(stage, data, tokenizer) else None
        return cls(settings, settings_v2, identity, names)

    def fingerprint(self, contents: list[str]) -> str:
        """Of the samples: what a run and its resume must agree on. `contents` are the files' SHA-256."""
        return _hash(_VERSION, self.settings, contents, self.tokenizer)

    def fingerprint_v3(self, contents: list[str]) -> str | None:
        """That of the version before, which added no BOS to documents, took every control token for what it is, and
        found the turns of templates other than ours in another way."""
        if {"bos", "special_in_text"} & self.settings.keys() or self.settings_v2 is None:
            return None
        return _hash(3, self.settings, contents, self.tokenizer)

    def fingerprint_v2(self, contents: list[str]) -> str | None:
        """The fingerprint that checkpoints of before `format_version` 1 hold, so that they can be resumed.

        It goes when checkpoints without a `format_version` are no longer read.
        """
        return None if self.settings_v2 is None else _hash(2, self.settings_v2, contents, self.tokenizer)

    def name(self, contents: list[str]) -> str:
        """The folder's. The files' names decide it too, for `file:line` must be right."""
        return _hash(FORMAT_VERSION, str(SCHEMA), self.fingerprint(contents), self.files)

    def earlier_name(self, contents: list[str]) -> str | None:
        """The folder's that the version before this one would have made."""
        fingerprint = self.fingerprint_v3(contents)
        return None if fingerprint is None else _hash(4, str(_SCHEMA_V4), fingerprint, self.files)

    def meta(self, contents: list[str], *, changed: bool) -> dict[str, Any]:
        """What store.json keeps: of the fingerprints first this version's, then what earlier ones would have said.

        `changed`: whether there are rows of which earlier versions made other samples.
        """
        earlier = [] if changed else [self.fingerprint_v3(contents), self.fingerprint_v2(contents)]
        return {
            "fingerprints": [self.fingerprint(contents), *(known for known in earlier if known is not None)],
            "files": self.files,
            "settings": self.settings,
            "contents": contents,
        }


def _settings(stage: str, data: DataConfig) -> dict[str, Any]:
    """Everything in the recipe that decides the samples.

    Settings at their defaults are left out, so that a new one does not change the key of the samples of before it.
    """
    values = data.model_dump(mode="json", exclude=set(DO_NOT_DECIDE), exclude_defaults=True)
    values |= {"stage": stage, "tail": data.eval_fraction if data.eval_split == "tail" else 0.0}
    if _skips_unknown_formats(data):
        values["formats"] = formats_that_give("text" if stage == "pretrain" else "conversation")
    return values


def _made_as_before(stage: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the samples are certainly those of before version 4, which found turns in another way."""
    return stage == "pretrain" or (tokenizer.chat_template == CHATML and data.end_of_turn is None)


def _skips_unknown_formats(data: DataConfig) -> bool:
    """Then a new format reads rows that were bad before; otherwise there are none in a store."""
    return data.format == "auto" and data.on_bad_row == "skip"


def _settings_v2(stage: str, data: DataConfig) -> dict[str, Any] | None:
    """As version 2 wrote them. None where a setting that it did not have says anything."""
    if data.model_dump(exclude={*DO_NOT_DECIDE, *_V2_SETTINGS}, exclude_defaults=True):
        return None
    if stage == "sft" and _skips_unknown_formats(data) and formats_that_give("conversation") != _V2_FORMATS:
        return None
    values = data.model_dump(mode="json", include=_V2_SETTINGS)
    return {**values, "stage": stage, "tail": data.eval_fraction if data.eval_split == "tail" else 0.0}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> list[Any]:
    named = [tokenizer.special_tokens_map, sorted(special_ids(tokenizer))]
    return [encoder.to_str(), *named, tokenizer.chat_template]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
