"""Real chat templates: each conversation is trained exactly as it will be asked, or refused with what would be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import (
    DOCUMENT,
    KINDS,
    check,
    outcomes,
    table,
    template_files,
)

FILES = template_files()
needs_trl = pytest.mark.skipif(not FILES, reason="the package trl, which brings the templates, is not installed")


@needs_trl
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_conversation_is_exact_or_refused_with_what_would_be_lost(file: Path) -> None:
    tokenizer, found = outcomes(file)
    for kind, chat in KINDS.items():
        try:
            check(tokenizer, chat, file.stem, found[kind])
        except AssertionError as error:
            raise AssertionError(f"{file.stem}, {kind}: {error}") from error


@needs_trl
def test_the_table_of_templates_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(), "run python tests/chat_templates.py"
