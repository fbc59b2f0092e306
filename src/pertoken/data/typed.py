"""Control tokens typed in rows: what `data.special_in_text` makes of them, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pertoken.data.chat.typed_specials import mark_typed, typed_in, unmark
from pertoken.data.files.long_text import LongText
from pertoken.data.findings import Findings
from pertoken.data.formats import Conversation
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.encode import Encoded, Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import bos_of
from pertoken.recipe.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TypedTokens", "unknown_counted"]


@dataclass(frozen=True)
class TypedTokens:
    """The control tokens of a tokenizer and what is to be made of those that rows have. Can be pickled."""

    control: ControlTokens
    policy: Literal["text", "special", "error"]
    bos: str | None  # that documents begin with
    eos: str | None  # that they end with
    template: str  # the source of the chat template; empty where there is none

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> TypedTokens:
        def name(token_id: int | None) -> str | None:
            return None if token_id is None else str(tokenizer.convert_ids_to_tokens(token_id))

        control, bos = ControlTokens.of(tokenizer, data.add_tokens), name(bos_of(tokenizer))
        template = str(tokenizer.chat_template or "")
        return cls(control, data.special_in_text, bos, name(tokenizer.eos_token_id), template)

    def mark(self, chat: Conversation, findings: Findings, file: int, line: int) -> tuple[Conversation, str]:
        """What to render, and the mark in it that `unmark` takes out again; "" for none.

        Raises ValueError for a conversation that the policy refuses.
        """
        typed = typed_in(chat, self.control)
        if not typed:
            return chat, ""
        self._judge(typed[0], len(typed), findings, file, line)
        return mark_typed(chat, self.control) if self.policy == "text" else (chat, "")

    def unmark(self, text: TextWithSpans, mark: str) -> TextWithSpans:
        """The rendering of what `mark` gave. Raises ValueError where it cannot be told what the template wrote."""
        return unmark(text, mark, self.control) if mark else text

    def document(self, text: str | LongText, findings: Findings, file: int, line: int) -> str | LongText:
        """A document without the BOS and the EOS that it has already, since every one is given them.

        Raises ValueError for one that the policy refuses, DataError where the file of a LongText has changed.
        """
        found = self.control.look_through(text)
        if not found.count:
            return text
        begins = found.begins == self.bos and len(text) > len(found.begins)
        ends = found.ends == self.eos and len(text) > len(found.ends) + begins * len(found.begins)
        if ends:
            findings.add("ends_with_eos", file, line)
        if typed := found.count - begins - ends:
            self._judge(found.first, typed, findings, file, line)
            if self.policy == "text" and (begins or (found.begins and found.begins in self.template)):
                findings.add("rendered_document", file, line)
        start, stop = begins * len(found.begins), len(text) - ends * len(found.ends)
        return text.part(start, stop) if isinstance(text, LongText) else text[start:stop]

    @property
    def as_text(self) -> ControlTokens | None:
        """Those that are plain text wherever a document has them."""
        return self.control if self.policy == "text" else None

    def _judge(self, first: str, count: int, findings: Findings, file: int, line: int) -> None:
        if self.policy == "error":
            raise ValueError(
                f"the control token {first} is typed in it; remove it, or set data.special_in_text "
                '("text": as plain text, "special": as the token)'
            )
        findings.add(f"typed_as_{self.policy}", file, line, count)


def unknown_counted(
    pieces: Iterator[Encoded], encoder: Encoder, text: TextWithSpans | None, findings: Findings, file: int, line: int
) -> Iterator[Encoded]:
    """The pieces of a text, and a finding behind the last of them where characters of it have no token.

    Where the unknown token is written in `text`, it stands for itself.
    """
    assert encoder.unknown_id is not None
    found = 0
    for piece in pieces:
        found += int(np.count_nonzero(piece.tokens == encoder.unknown_id))
        yield piece
    if found and text is not None:
        name = encoder.token(encoder.unknown_id)
        found -= text.text.count(name) - sum(text.text[start:end] == name for start, end in text.typed)
    if found > 0:
        findings.add("unknown_rows", file, line)
        findings.add("unknown_tokens", file, line, found)
