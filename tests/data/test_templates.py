"""Real chat templates: each conversation is trained exactly as it will be asked, or refused with what would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    DOCUMENT,
    ENDS,
    KINDS,
    Outcome,
    day_stands_still,
    expected,
    outcomes,
    table,
    template_files,
)

from pertoken.data.formats import Conversation

FILES = template_files()
needs_trl = pytest.mark.skipif(not FILES, reason="the package trl, which brings the templates, is not installed")


def check(tokenizer: Any, chat: Conversation, name: str, found: Outcome) -> None:
    """Exact by the oracle, with every word there, or refused for a reason that is true."""
    end = tokenizer.convert_tokens_to_ids(ENDS[name]) if name in ENDS else None
    with day_stands_still():
        if found.cell == "(fails)":
            with pytest.raises(Exception):  # noqa: B017, PT011  a template fails in any way
                expected(tokenizer, chat, end)
            return
        exact = expected(tokenizer, chat, end)
    said = " ".join(_text(tokenizer, tokens, supervised, True) for tokens, supervised in found.samples or exact)
    asked = " ".join(_text(tokenizer, tokens, supervised, False) for tokens, supervised in found.samples or exact)
    last = max(i for i in range(len(chat.messages)) if chat.weight(i))
    learned = [message for i, message in enumerate(chat.messages) if chat.weight(i)]
    given = [message for message in chat.messages[:last] if message["role"] != "assistant"]
    all_there = all(word in said for message in learned for word in _words(message)) and all(
        word in asked for message in given for word in _words(message)
    )
    tools = [tool["function"]["name"] for tool in chat.tools or ()]
    if found.refused:
        assert found.cell in ("(changes)", "(no end)") or not all_there or not all(name in asked for name in tools)
        return
    assert all_there
    assert all(name in asked for name in tools)
    assert len(found.samples) == len(exact)
    for (tokens, supervised), (up_to_end, mask) in zip(found.samples, exact, strict=True):
        assert tokens[: len(up_to_end)] == up_to_end
        assert supervised[: len(mask)] == mask
        assert not any(supervised[len(mask) :])


def _text(tokenizer: Any, tokens: list[int], supervised: list[bool], which: bool) -> str:
    return str(tokenizer.decode([token for token, is_said in zip(tokens, supervised, strict=True) if is_said is which]))


def _words(message: dict[str, Any]) -> list[str]:
    words = f"{message['content']} {message.get('reasoning_content', '')}".split()
    return [word for word in words if "think>" not in word] + [
        call["function"]["name"] for call in message.get("tool_calls", ())
    ]


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
