"""Text -> tokens, and which of them the assistant said.

A conversation is rendered once and encoded once, as one string. Which characters are the assistant's is known from the
rendering (`rendered_chat`), which tokens lie among them from where each token lies in the text (`encode.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pertoken.data.batch.sample import Sample
from pertoken.data.chat.template import end_of_turn_id, render
from pertoken.data.formats import Conversation
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "chat_sample", "rendered_chat"]

_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


@cache
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


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
        self.bos: str | None = tokenizer.special_tokens_map.get("bos_token")
        self.end_of_turn: str = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer, template_kwargs))

    def has_marks(self, tools: list[dict[str, Any]] | None) -> bool:
        """Whether the template itself says what is generated."""
        return _MARK.search(self._tokenizer.get_chat_template(tools=tools)) is not None

    def unnamed_keys(self, chat: Conversation) -> tuple[str, ...]:
        """The keys of messages, and `tools`, whose names are nowhere in the template: it makes nothing of them."""
        template, found = self._tokenizer.get_chat_template(tools=chat.tools), set[str]()
        words = _words(template)
        for message in chat.messages:
            if not message.keys() <= words:
                found |= message.keys() - words
        if chat.tools and "tools" not in words:
            found.add("tools")
        return tuple(sorted(key for key in found if key.isidentifier() or key not in template)) if found else ()

    def text(self, chat: Conversation, upto: int | None = None, *, prompt: bool = False) -> str:
        """The rendering of the first `upto` messages, with `prompt` up to where the assistant would continue."""
        return self.marked(chat, upto, mark=False, prompt=prompt).text

    def marked(
        self, chat: Conversation, upto: int | None = None, *, mark: bool = True, prompt: bool = False
    ) -> TextWithSpans:
        """The same with the spans that the template marks as generated. Raises ValueError where it fails."""
        text, spans = render(
            self._tokenizer,
            chat.messages[:upto],
            tools=chat.tools,
            template_kwargs=self._template_kwargs,
            add_generation_prompt=prompt,
            mark=mark,
        )
        return TextWithSpans(text, spans)


def rendered_chat(chat: Conversation, template: ChatTemplate) -> TextWithSpans:
    """The conversation as text, with the spans that the assistant said.

    The template's own generation marks are taken as they are. Without them a span starts where the text stops being
    what the model is given at that turn, and ends with the turn's end token.
    Raises ValueError, saying why and what to do, where the template fails or rewrites earlier turns.
    """
    if template.has_marks(chat.tools):
        marked = template.marked(chat)
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if all(chat.weight(i) == 1 for i in turns):
            return marked
        ends = [len(template.marked(chat, i + 1).spans) for i in turns]
        starts = [0, *ends[:-1]]
        weights = [chat.weight(turn) for turn, a, b in zip(turns, starts, ends, strict=True) for _ in range(a, b)]
        return _learned(marked.text, marked.spans, weights)
    text = template.text(chat)
    turns = [i for i in range(len(chat.messages)) if chat.weight(i)]
    return _learned(text, [_span(chat, i, text, template) for i in turns], [chat.weight(i) for i in turns])


def _learned(text: str, spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> TextWithSpans:
    """Without the spans of weight 0."""
    learned = [(span, weight) for span, weight in zip(spans, weights, strict=True) if weight]
    ones = all(weight == 1 for _, weight in learned)
    return TextWithSpans(text, [span for span, _ in learned], None if ones else [weight for _, weight in learned])


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
        # The prompt may continue differently from the turn (an empty thinking block, say), but not from what precedes.
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


def chat_sample(chat: Conversation, template: ChatTemplate, encoder: Encoder) -> Sample:
    """One conversation as a sample. Raises ValueError as `rendered_chat` does."""
    (encoded,) = encoder.encode([rendered_chat(chat, template)])
    return encoded.sample()
