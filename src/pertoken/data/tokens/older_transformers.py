"""Where transformers 4 and 5 have different words for tokenizers: special tokens, and the class that is tokenizer.json.

Version 4 is told what a file of version 5 means; version 5 reads the files of both.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

__all__ = ["add_special_tokens", "other_class_expected", "read_by_version_4"]

_GENERIC_IN_5 = "TokenizersBackend"


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add special tokens to those that a tokenizer has."""
    kind = "extra" if _accepts(tokenizer.add_special_tokens, "replace_extra_special_tokens") else "additional"
    replace: dict[str, Any] = {f"replace_{kind}_special_tokens": False}
    tokenizer.add_special_tokens({f"{kind}_special_tokens": list(tokens)}, **replace)


def read_by_version_4(path: Path) -> dict[str, Any] | None:
    """What `PreTrainedTokenizerFast.from_pretrained` needs beside a folder that version 5 has written, to read it as
    version 5 does; None where it needs nothing, or where this is version 5.

    Raises OSError and ValueError for a tokenizer_config.json that cannot be read.
    """
    import transformers

    file = path / "tokenizer_config.json"
    if hasattr(transformers, _GENERIC_IN_5) or not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    extra = config.get("extra_special_tokens")
    if config.get("tokenizer_class") != _GENERIC_IN_5 and not isinstance(extra, list):
        return None
    # In version 4 `extra_special_tokens` is what the tokens of a model are called, by name.
    return {"extra_special_tokens": {}, "additional_special_tokens": extra} if isinstance(extra, list) else {}


@contextmanager
def other_class_expected() -> Iterator[None]:
    """Without version 4's warning that a folder names another class than the one that opens it."""

    def is_news(record: LogRecord) -> bool:
        return "is not the same type as the class this function is called from" not in record.getMessage()

    logger = getLogger("transformers.tokenization_utils_base")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _accepts(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
