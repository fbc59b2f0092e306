"""The samples that a conversation must become, worked out a second time: by tokens, from renderings of its starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from pertoken.data.chat.template import PROBE, render
from pertoken.data.chat.typed_specials import mark_typed, typed_in, unmark
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats import Conversation, to_conversation
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import special_ids
from pertoken.recipe.data import DataConfig

__all__ = ["ExpectedSample", "expected_samples", "supervision"]


@dataclass(frozen=True)
class ExpectedSample:
    """A conversation's sample, uncut."""

    tokens: np.ndarray  # [n]
    weights: np.ndarray  # [n] float64, of each token as a label
    starts: tuple[int, ...]  # of the turns: the token may be whitespace that belongs to the header as well


@dataclass(frozen=True)
class _Turn:
    message: int
    start: int
    tokens: list[int]  # up to its end, what comes before included
    rest: list[int]  # of the rendering of the conversation up to it


class _Tokens:
    """Renderings of one conversation as tokens."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data = data
        self._tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.control = ControlTokens.of(tokenizer, data.add_tokens)
        self.mark = ""  # of control tokens that are typed in the conversation
        self.end = None if data.end_of_turn is None else tokenizer.backend_tokenizer.token_to_id(data.end_of_turn)

    def text(self, chat: Conversation, upto: int, *, prompt: bool = False) -> str:
        text, _ = render(
            self._tokenizer,
            chat.messages[:upto],
            tools=chat.tools,
            template_kwargs=self.data.template_kwargs,
            add_generation_prompt=prompt,
            day=self.data.template_date,
        )
        return text

    def __call__(self, chat: Conversation, upto: int, *, prompt: bool = False) -> list[int]:
        return self.encode(self.text(chat, upto, prompt=prompt))

    def encode(self, text: str) -> list[int]:
        if self.mark:
            plain = unmark(TextWithSpans(text, []), self.mark, self.control)
            return [int(i) for i in next(Encoder(self._tokenizer).encode([plain])).tokens]
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def expected_samples(record: Record, data: DataConfig, tokenizer: Any) -> list[ExpectedSample] | str:
    """Those that are kept under `data.max_seq_len` and `data.overlong`, or why there are none."""
    chat = to_conversation(record, data.format, data.key_names)
    if isinstance(chat, BadRow):
        return str(chat)
    tokens = _Tokens(data, tokenizer)
    if data.special_in_text == "text" and typed_in(chat, tokens.control):
        chat, tokens.mark = mark_typed(chat, tokens.control)
    for arguments in (json.loads, lambda text: json.dumps(json.loads(text), ensure_ascii=False)):
        converted = _with_arguments(chat, arguments)
        try:
            samples = _samples(converted, tokens)
            break
        except ValueError as error:
            problem = f"its turns cannot be told: {error}"
    else:
        return problem
    limit = data.max_seq_len
    whole = [sample for sample in samples if len(sample.tokens) - 1 <= limit or data.overlong == "truncate"]
    return [sample for sample in whole if sample.weights[1 : limit + 1].any()]


def supervision(got: np.ndarray, sample: ExpectedSample, tokenizer: Any) -> str | None:
    """What is wrong with a sample's loss mask [T]."""
    expected = sample.weights[1 : len(got) + 1]
    for at in np.flatnonzero(got.astype(np.float64) != expected.astype(got.dtype).astype(np.float64)):
        label = int(sample.tokens[at + 1])
        if not got[at] and at + 1 in sample.starts and not tokenizer.decode([label], skip_special_tokens=False).strip():
            continue
        shown = repr(tokenizer.decode([label], skip_special_tokens=False))
        return f"token {at + 1}, {shown}, has weight {float(got[at]):g}, not {expected[at]:g}"
    return None


def _samples(chat: Conversation, tokens: _Tokens) -> list[ExpectedSample]:
    if tokens.data.reasoning != "error":
        chat = _with_reasoning(chat, tokens)
    turns = [_turn(chat, i, tokens) for i in range(len(chat.messages)) if chat.weight(i)]
    last = [one for i, one in enumerate(turns) if not any(_begins(one, other) for other in turns[i + 1 :])]
    made = []
    for holder in last:
        held = [turn for turn in turns if next(other for other in last if _begins(turn, other)) is holder]
        ids = holder.tokens + holder.rest
        if len(last) == 1:
            whole = tokens(chat, len(chat.messages))
            ids = whole if whole[: len(holder.tokens)] == holder.tokens else ids
        weights = np.zeros(len(ids))
        for turn in held:
            weights[turn.start : len(turn.tokens)] = chat.weight(turn.message)
        made.append(ExpectedSample(np.array(ids), weights, tuple(turn.start for turn in held)))
    return made


def _begins(one: _Turn, other: _Turn) -> bool:
    return other.tokens[: len(one.tokens)] == one.tokens


def _turn(chat: Conversation, i: int, tokens: _Tokens) -> _Turn:
    full = tokens(chat, i + 1)
    try:
        prompt = tokens(chat, i, prompt=True)
        if i == 0 and full[: len(prompt)] != prompt:
            raise ValueError("renders something else for no message at all")
        start = _shared(prompt, full)
    except ValueError:
        if any(message["role"] != "system" for message in chat.messages[:i]):
            raise
        start = _after_header(full, chat, tokens)
    if tokens.end is not None and tokens.end not in full[start:]:
        follows = chat.messages[i + 1]["role"] if i + 1 < len(chat.messages) else "assistant"
        more = tokens(chat, i + 2)[len(full) : len(full) + 1] if follows != "assistant" else []
        full = full + (more if more and more[0] in tokens.special else [tokens.end])
    ends = [at for at in range(start, len(full)) if full[at] in {*tokens.special, tokens.end}]
    if not ends:
        raise ValueError(f"message {i} is not ended")
    return _Turn(i, start, full[: ends[-1] + 1], full[ends[-1] + 1 :])


def _after_header(full: list[int], chat: Conversation, tokens: _Tokens) -> int:
    question = Conversation(PROBE[:1], chat.tools)
    header = tokens(question, 1, prompt=True)[len(tokens(question, 1)) :]
    for length in range(len(header), 0, -1):
        for at in range(len(full) - length + 1):
            if full[at : at + length] == header[:length]:
                return at + length
    raise ValueError("no header of the assistant's")


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_reasoning(chat: Conversation, tokens: _Tokens) -> Conversation:
    messages = list(chat.messages)
    for i, message in enumerate(chat.messages):
        thought = message.get("reasoning_content")
        if thought and chat.weight(i) and thought.strip() not in tokens.text(chat, i + 1):
            kept = {key: value for key, value in message.items() if key != "reasoning_content"}
            words = f"<think>\n{thought}\n</think>\n\n" if tokens.data.reasoning == "inline" else ""
            messages[i] = {**kept, "content": words + kept["content"]}
    return Conversation(messages, chat.tools, chat.weights)


def _with_arguments(chat: Conversation, convert: Any) -> Conversation:
    messages = json.loads(json.dumps(chat.messages))
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        function = call["function"] if isinstance(call.get("function"), dict) else call
        given = function.get("arguments")
        try:
            if isinstance(given, (str, dict)):
                converted = convert(given if isinstance(given, str) else json.dumps(given))
                function["arguments"] = converted if isinstance(converted, (dict, str)) else given
        except ValueError:
            pass
    return Conversation(messages, chat.tools, chat.weights)
