"""Mistakes in finding turns, planted one by one: each is found by the oracle of tests/chat_templates.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from chat_templates import KINDS, check, ours, tokenizer_for

import pertoken.data.chat.render as render
import pertoken.data.chat.turns as turns
from pertoken.data.chat.turns import Turn
from pertoken.data.formats import Conversation

Patch = pytest.MonkeyPatch

_ASKS = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
TEMPLATES = {
    "drops reasoning": "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}" + _ASKS,
    "ends twice": "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|stop|><|end|>\n{% endfor %}" + _ASKS,
    "opens a thought": "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n<think>\n{% endif %}",
    "writes calls": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|turn|>"
    "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}" + _ASKS,
    "ignores calls": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|turn|>"
    "{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + _ASKS,
    "encodes arguments twice": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson | tojson }}{% endfor %}<|end|>\n{% endfor %}" + _ASKS,
}
_BOLD = Conversation([{"role": "user", "content": "Bold?"}, {"role": "assistant", "content": "<b>é</b>"}])
CHATS = {**KINDS, "<b>": _BOLD}


def problems() -> list[str]:
    found = []
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_for(template)
        for kind, chat in CHATS.items():
            try:
                check(tokenizer, chat, name, ours(tokenizer, chat, name))
            except AssertionError:
                found.append(f"{name}, {kind}")
    return found


def test_without_a_mistake_nothing_is_found() -> None:
    assert problems() == []
    tokenizer = tokenizer_for(TEMPLATES["encodes arguments twice"])
    assert ours(tokenizer, KINDS["call"], "").cell == "(arguments twice)"


def _changed_turns(patch: Patch, change: Callable[[Turn], Turn]) -> None:
    find = turns._find
    patch.setattr(turns, "_find", lambda *args: change(find(*args)))


def header_supervised(patch: Patch) -> None:
    _changed_turns(patch, lambda turn: dataclasses.replace(turn, start=turn.text.rindex("<|turn|>", 0, turn.start)))


def newline_supervised(patch: Patch) -> None:
    _changed_turns(patch, lambda turn: dataclasses.replace(turn, end=len(turn.text)))


def second_end_token_lost(patch: Patch) -> None:
    def change(turn: Turn) -> Turn:
        first = min(
            turn.text.find(token, turn.start) + len(token) for token in ("<|stop|>", "<|end|>") if token in turn.said
        )
        return dataclasses.replace(turn, end=first)

    _changed_turns(patch, change)


def prefix_by_characters(patch: Patch) -> None:
    patch.setattr(render.ChatTemplate, "shared_tokens", lambda self, a, b: turns._shared(a, b))


def rewritten_history_accepted(patch: Patch) -> None:
    patch.setattr(Turn, "is_within", lambda self, other: self.end <= other.end)


def every_turn_by_itself(patch: Patch) -> None:
    patch.setattr(Turn, "is_within", lambda self, other: self is other)


def reasoning_lost(patch: Patch) -> None:
    patch.setattr(render, "lost_reasoning", lambda *args: False)


def calls_and_content_lost(patch: Patch) -> None:
    patch.setattr(render, "lost_words", lambda *args: None)


def tools_lost(patch: Patch) -> None:
    patch.setattr(render, "lost_context", lambda *args: None)


def weights_ignored(patch: Patch) -> None:
    patch.setattr(render.Conversation, "weight", lambda self, i: float(self.messages[i]["role"] == "assistant"))


MUTANTS: list[Callable[[Patch], None]] = [
    header_supervised,
    newline_supervised,
    second_end_token_lost,
    prefix_by_characters,
    rewritten_history_accepted,
    every_turn_by_itself,
    reasoning_lost,
    calls_and_content_lost,
    tools_lost,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_mistake_is_found(mutant: Callable[[Patch], Any], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert problems()


def test_ignored_weights_are_found(monkeypatch: Patch) -> None:
    """The oracle asks the conversation too, so this one is found by what is supervised."""
    tokenizer = tokenizer_for(TEMPLATES["ends twice"])

    def said() -> str:
        ((tokens, supervised),) = ours(tokenizer, KINDS["weight 0"], "").samples
        return str(tokenizer.decode([token for token, is_said in zip(tokens, supervised, strict=True) if is_said]))

    assert said() == "The Rhine.<|stop|><|end|>"
    weights_ignored(monkeypatch)
    assert said() != "The Rhine.<|stop|><|end|>"
