"""Text -> tokens, and which of them the assistant said.

A conversation is rendered once and encoded once, as one string. Which characters are the assistant's is known from the
rendering (`rendered_chat`), which tokens lie among them from the tokenizer's offsets (`Encoder`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.data.batch import Sample
from pertoken.data.formats import Conversation
from pertoken.data.tokenizer import end_of_turn_id, render, special_ids
from pertoken.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Encoded", "Encoder", "Marked", "chat_sample", "rendered_chat"]

_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class Marked:
    """A text and the spans [start, end) of its characters that are learned, in order and apart."""

    text: str
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A text's n tokens. `supervised` and `num_bytes` are about the token itself, as a label."""

    tokens: np.ndarray  # [n] int32
    supervised: np.ndarray  # [n] bool
    num_bytes: np.ndarray  # [n] int64, UTF-8 bytes of text that the token adds; 0 for a special token

    def sample(self) -> Sample:
        """Inputs and labels. The first token is nobody's label, so its being supervised is lost. Needs n >= 2."""
        return Sample(self.tokens, self.supervised[1:])


class ChatTemplate:
    """A tokenizer's chat template with its arguments, ready to find what the assistant says.

    Raises RecipeError where the tokenizer has no template or the template cannot render the simplest conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        if tokenizer.chat_template is None:
            raise RecipeError(
                'data.chat_template: the tokenizer has none; set it, for example to "chatml" with '
                'data.add_tokens=["<|im_start|>", "<|im_end|>"]'
            )
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self.end_of_turn: str = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer, template_kwargs))

    def has_marks(self, tools: list[dict[str, Any]] | None) -> bool:
        """Whether the template itself says what is generated."""
        return _MARK.search(self._tokenizer.get_chat_template(tools=tools)) is not None

    def text(self, chat: Conversation, upto: int | None = None, *, prompt: bool = False) -> str:
        """The rendering of the first `upto` messages, with `prompt` up to where the assistant would go on."""
        return self.marked(chat, upto, mark=False, prompt=prompt).text

    def marked(self, chat: Conversation, upto: int | None = None, *, mark: bool = True, prompt: bool = False) -> Marked:
        """The same with the spans that the template marks as generated. Raises ValueError where it fails."""
        text, spans = render(
            self._tokenizer,
            chat.messages[:upto],
            tools=chat.tools,
            template_kwargs=self._template_kwargs,
            add_generation_prompt=prompt,
            mark=mark,
        )
        return Marked(text, spans)


def rendered_chat(chat: Conversation, template: ChatTemplate) -> Marked:
    """The conversation as text, with the spans that the assistant said.

    The template's own generation marks are taken as they are. Without them a span starts where the text stops being
    what the model is given at that turn, and ends with the turn's end token.
    Raises ValueError, saying why and what to do, where the template fails or rewrites earlier turns.
    """
    if template.has_marks(chat.tools):
        marked = template.marked(chat)
        given = len(template.marked(chat, chat.num_context).spans) if _has_assistant(chat) else 0
        return Marked(marked.text, marked.spans[given:])
    text = template.text(chat)
    turns = range(chat.num_context, len(chat.messages))
    spans = [_span(chat, i, text, template) for i in turns if chat.messages[i]["role"] == "assistant"]
    return Marked(text, spans)


def _has_assistant(chat: Conversation) -> bool:
    return any(message["role"] == "assistant" for message in chat.messages[: chat.num_context])


def _span(chat: Conversation, turn: int, text: str, template: ChatTemplate) -> tuple[int, int]:
    """The characters of `text` that the assistant says in message `turn`."""
    try:
        given = template.text(chat, turn, prompt=True)
    except ValueError as error:
        if turn:
            raise
        raise ValueError(f"starts with an assistant turn, and {error}, or put a user turn before it") from None
    start = _common(given, text)
    if start < len(given):
        # The prompt may go on differently than the turn (an empty thinking block, say), but what is before must agree.
        before = template.text(chat, turn) if turn else ""
        if start < len(before) or not text.startswith(before):
            raise _rewrites(turn)
    up_to_here = text if turn == len(chat.messages) - 1 else template.text(chat, turn + 1)
    end = up_to_here.rfind(template.end_of_turn, start)
    if end < 0:
        raise ValueError(
            f"the chat template does not end message {turn} with {template.end_of_turn}, so no reply would learn to "
            'end; set data.chat_template to one that does, for example "chatml"'
        )
    end += len(template.end_of_turn)
    if not text.startswith(up_to_here[:end]):
        raise _rewrites(turn)
    return start, end


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rewrites(turn: int) -> ValueError:
    return ValueError(
        f"the chat template renders message {turn} or what is before it differently once later messages follow (some "
        "drop earlier reasoning), so what the assistant said cannot be told; set data.chat_template to one with "
        '{% generation %} marks, for example "chatml", or split the conversation into rows'
    )


class Encoder:
    """A tokenizer's encoding alone: nothing is added, cut or padded, and offsets are exact."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # A byte-level post-processor trims spaces off the offsets; a token would seem not to reach over a span's start.
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = np.array(sorted(special_ids(tokenizer)), dtype=np.int32)

    def to_str(self) -> str:
        """Everything that decides the encoding."""
        return str(self._backend.to_str())

    def encode(self, texts: Sequence[Marked], *, append: int | None = None) -> Iterable[Encoded]:
        """The tokens of each text, in order. `append` is put, supervised, behind each text's own tokens."""
        encodings = self._backend.encode_batch([marked.text for marked in texts], add_special_tokens=False)
        tail = [] if append is None else [append]
        for marked, encoding in zip(texts, encodings, strict=True):
            tokens = np.array(encoding.ids + tail, dtype=np.int32)
            offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
            supervised = np.ones(len(tokens), dtype=np.bool_)
            num_bytes = np.zeros(len(tokens), dtype=np.int64)
            supervised[: len(offsets)] = _inside(offsets, marked.spans)
            num_bytes[: len(offsets)] = _new_bytes(offsets, marked.text)
            num_bytes[np.isin(tokens, self._special)] = 0
            yield Encoded(tokens, supervised, num_bytes)


def chat_sample(chat: Conversation, template: ChatTemplate, encoder: Encoder) -> Sample:
    """One conversation as a sample. Raises ValueError as `rendered_chat` does."""
    (encoded,) = encoder.encode([rendered_chat(chat, template)])
    return encoded.sample()


def _inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n] bool: which tokens lie in one of the spans. A token that reaches over an edge of a span does not."""
    if not spans:
        return np.zeros(len(offsets), dtype=np.bool_)
    starts, ends = np.array(spans, dtype=np.int64).T
    span = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside: np.ndarray = (span >= 0) & (offsets[:, 1] <= ends[span])
    return inside


def _new_bytes(offsets: np.ndarray, text: str) -> np.ndarray:
    """[n] int64: UTF-8 bytes of the characters that a token covers and no token before it does.

    The tokens of one character cut into pieces all have that character's offsets; the first of them takes its bytes.
    """
    covered = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))  # [n + 1] characters covered before token i
    start = np.clip(offsets[:, 0], covered[:-1], covered[1:])
    before = _bytes_before(text)
    new_bytes: np.ndarray = before[covered[1:]] - before[start]
    return new_bytes


def _bytes_before(text: str) -> np.ndarray:
    """[len(text) + 1] int64: UTF-8 bytes of the characters before each position."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
