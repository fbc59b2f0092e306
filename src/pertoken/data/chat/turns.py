"""Where the assistant's turns stand in a rendering, and which of them share a sample.

A turn is trained as it will be asked: what comes before it is what the template gives with `add_generation_prompt`
at that turn, and supervised is what follows, up to the last token that ends the turn. Many templates render a turn
differently once others follow it (they drop its reasoning), so a turn may need a sample of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pertoken.data.chat.template import PROBE, token_at_end, without_ends
from pertoken.data.formats import Conversation

__all__ = ["Renders", "Turn", "find_turns", "share_samples"]


class Renders(Protocol):
    """What is asked of a chat template."""

    special: tuple[str, ...]  # the texts of the special tokens
    appended_end: str | None  # data.end_of_turn

    def text(self, chat: Conversation, upto: int | None = None, *, prompt: bool = False) -> str: ...

    def shared_tokens(self, a: str, b: str) -> int: ...


@dataclass(frozen=True)
class Turn:
    """One supervised turn: `text[start:end]`, in the rendering of the conversation up to and with it."""

    message: int
    text: str
    start: int
    end: int

    @property
    def said(self) -> str:
        return self.text[self.start : self.end]

    @property
    def context_and_turn(self) -> str:
        return self.text[: self.end]

    def is_within(self, other: Turn) -> bool:
        """Whether a sample of the other turn's text teaches this one too, in the same context."""
        return self.end <= other.end and other.text.startswith(self.context_and_turn)


def find_turns(chat: Conversation, template: Renders) -> list[Turn]:
    """The supervised turns, in order.

    Raises ValueError, saying why and what to do, where the template fails, does not end a turn, or changes what is
    before a turn when the turn is there.
    """
    return [_find(chat, i, template) for i in range(len(chat.messages)) if chat.weight(i)]


def share_samples(turns: list[Turn]) -> list[list[Turn]]:
    """The turns of each sample; its last one's text is the sample's. As few samples as there can be."""
    longest = [turn for i, turn in enumerate(turns) if not any(turn.is_within(later) for later in turns[i + 1 :])]
    shared: list[list[Turn]] = [[] for _ in longest]
    for turn in turns:
        shared[next(i for i, last in enumerate(longest) if turn is last or turn.is_within(last))].append(turn)
    return shared


def _find(chat: Conversation, i: int, template: Renders) -> Turn:
    full = template.text(chat, i + 1)
    prompt, kept = _prompt(chat, i, full, template)
    start = len(prompt)
    if not full.startswith(prompt):
        # The prompt may continue differently from the turn (an open thinking block, say), but not from what is before.
        if kept is None:
            kept = without_ends(template.text(chat, i), template.special)
        start = template.shared_tokens(prompt, full)
        if start < len(kept) or not full.startswith(kept):
            raise ValueError(
                f"the chat template renders what is before message {i} differently once that message follows, so what "
                "the model will be asked is not what it would be trained on; correct it or set another "
                "data.chat_template"
            )
    full = _with_end(chat, i, full, template)
    end = len(full.rstrip())
    if token_at_end(full[:end], template.special) is None or end <= start:
        raise ValueError(
            f"the chat template does not end message {i} with a special token, so no reply would learn to end; name "
            'the token that ends a turn with data.end_of_turn, or set another data.chat_template, for example "chatml"'
        )
    return Turn(i, full, start, end)


def _with_end(chat: Conversation, i: int, full: str, template: Renders) -> str:
    """With `data.end_of_turn` behind the turn, or the special token that the template itself writes next."""
    if template.appended_end is None or full.rstrip().endswith(template.appended_end):
        return full
    following = chat.messages[i + 1 : i + 2]
    if following and following[0]["role"] != "assistant":
        more = template.text(chat, i + 2)
        written = [token for token in template.special if more.startswith(token, len(full))]
        if written and more.startswith(full):
            return full + max(written, key=len)
    return full + template.appended_end


def _prompt(chat: Conversation, i: int, full: str, template: Renders) -> tuple[str, str | None]:
    """What the model is given at message `i`, and what of it is before its header (None: not known).

    Before the first user turn many templates render nothing. Then the header is what they add to another conversation.
    """
    opens = all(message["role"] == "system" for message in chat.messages[:i])
    try:
        prompt = template.text(chat, i, prompt=True)
    except ValueError as error:
        if not opens:
            raise
        found = _by_header(full, chat, template)
        if found is None:
            raise ValueError(f"starts with an assistant turn, and {error}, or put a user turn before it") from None
        return found
    if i == 0 and not full.startswith(prompt):
        return _by_header(full, chat, template) or (prompt, prompt)
    return prompt, None


def _by_header(full: str, chat: Conversation, template: Renders) -> tuple[str, str] | None:
    """What stands before an opening turn in its rendering, and what of it is before the assistant's header."""
    question = Conversation(PROBE[:1], chat.tools)
    try:
        before, asked = template.text(question), template.text(question, prompt=True)
    except ValueError:
        return None
    header = asked[len(before) :]
    if not header.strip() or not asked.startswith(before):
        return None
    first = token_at_start(header, template.special) or header.strip()
    places = [at for at in range(len(full)) if full.startswith(first, at)]
    if not places:
        return None
    at = max(places, key=lambda place: _shared(header, full[place:]))
    return full[:at] + header, full[:at]


def token_at_start(text: str, tokens: tuple[str, ...]) -> str | None:
    return max((token for token in tokens if text.startswith(token)), key=len, default=None)


def _shared(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
