"""Conversations -> texts with spans: each turn of the assistant supervised once, in the context that it will have.

A turn's characters are found by comparing renderings (`turns.py`), its tokens by where each token lies in the text
(`encode.py`). What a template leaves out is refused (`lost.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from pertoken.data.batch.sample import Sample
from pertoken.data.chat.calls import with_arguments
from pertoken.data.chat.lost import lost_context, lost_reasoning, lost_words
from pertoken.data.chat.template import PROBE, end_of_turn_id, render, special_tokens, template_end
from pertoken.data.chat.turns import Turn, find_turns, share_samples
from pertoken.data.formats import Conversation
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.data.tokens.trained import CHATML
from pertoken.errors import RecipeError
from pertoken.recipe.data import DataConfig
from pertoken.text import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Rendered", "chat_sample", "rendered_chat"]

_EMPTY_THOUGHTS = re.compile(
    r"\s*(?:(?:<think>|<thinking>|\[THINK\]|<\|channel>thought)\s*)?(?:</think>|</thinking>|\[/THINK\]|<channel\|>)"
)


@cache
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


class ChatTemplate:
    """A tokenizer's chat template with everything that decides what is made of a conversation.

    Raises RecipeError where the tokenizer has no template, the template cannot render the simplest conversation, or it
    ends no turn and `end_of_turn` does not either.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any],
        *,
        day: str | None = None,
        end_of_turn: str | None = None,
        on_rewrite: Literal["split", "error"] = "split",
        reasoning: Literal["error", "inline", "drop"] = "error",
    ) -> None:
        if tokenizer.chat_template is None:
            raise RecipeError(
                'data.chat_template: the tokenizer has none; set it, for example to "chatml" with '
                'data.add_tokens=["<|im_start|>", "<|im_end|>"]'
            )
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self._day = day
        self.on_rewrite = on_rewrite
        self.reasoning = reasoning
        self.appended_end = end_of_turn
        end_id = end_of_turn_id(tokenizer, template_kwargs, day=day, end_of_turn=end_of_turn)
        self.bos: str | None = tokenizer.special_tokens_map.get("bos_token")
        self.end_of_turn: str = tokenizer.convert_ids_to_tokens(end_id)
        self.special = tuple(dict.fromkeys((*special_tokens(tokenizer), *([end_of_turn] if end_of_turn else []))))
        self.is_chatml = tokenizer.chat_template == CHATML and end_of_turn is None
        if end_of_turn is None and not (self.is_chatml and self.end_of_turn == "<|im_end|>"):
            self._check_that_turns_end()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ChatTemplate:
        """With what the recipe says of it. Raises RecipeError as ChatTemplate does."""
        return cls(
            tokenizer,
            data.template_kwargs,
            day=data.template_date,
            end_of_turn=data.end_of_turn,
            on_rewrite=data.on_rewrite,
            reasoning=data.reasoning,
        )

    def _check_that_turns_end(self) -> None:
        if template_end(self._tokenizer, self._template_kwargs, day=self._day) is not None:
            return
        named = "with data.end_of_turn"
        asked = Conversation([*PROBE, *PROBE[:1]])
        try:
            ended, more = self.text(asked, 2), self.text(asked)
            following = [token for token in self.special if more.startswith(token, len(ended))]
            named = f'with data.end_of_turn="{following[0]}"' if following else named
        except ValueError:  # one that renders no second question
            pass
        raise RecipeError(
            "data.chat_template: ends no turn of the assistant with a special token of its own, so no reply would "
            f'learn to end; name the token that ends a turn {named}, or set another template, for example "chatml"'
        )

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
        return self._render(chat, upto, prompt=prompt).text

    def marked(self, chat: Conversation) -> TextWithSpans:
        """The whole rendering with the spans that the template marks as generated. Raises ValueError where it fails."""
        return self._render(chat, mark=True)

    def _render(
        self, chat: Conversation, upto: int | None = None, *, mark: bool = False, prompt: bool = False
    ) -> TextWithSpans:
        text, spans = render(
            self._tokenizer,
            chat.messages[:upto],
            tools=chat.tools,
            template_kwargs=self._template_kwargs,
            add_generation_prompt=prompt,
            mark=mark,
            day=self._day,
        )
        return TextWithSpans(text, spans)

    def shared_tokens(self, a: str, b: str) -> int:
        """How many characters of `b` the tokens take that both texts begin with. Raises ValueError without tokens."""
        try:
            return self._encoder.shared_tokens(a, b)
        except Exception as error:  # a tokenizer is a program from elsewhere, and may fail at a text in any way
            raise ValueError(f"the tokenizer has no tokens for it ({reason(error)}); choose another") from None

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer)

    @cached_property
    def thinks_in_prompt(self) -> bool:
        """Whether enable_thinking=false makes the template write the empty thinking block itself, in the prompt."""
        off = {**self._template_kwargs, "enable_thinking": False}
        try:
            prompt, _ = render(
                self._tokenizer, PROBE[:1], template_kwargs=off, add_generation_prompt=True, day=self._day
            )
        except ValueError:
            return False
        asked = self.text(Conversation(PROBE[:1]), prompt=True)
        return prompt != asked and _EMPTY_THOUGHTS.search(prompt) is not None


@dataclass(frozen=True)
class Rendered:
    """What a conversation becomes: its samples, and how many there are of each kind of finding."""

    samples: list[TextWithSpans]
    findings: dict[str, int] = field(default_factory=dict)


def rendered_chat(chat: Conversation, template: ChatTemplate) -> Rendered:
    """The conversation as texts, with the spans that the assistant said: each supervised turn in exactly one of them.

    Raises ValueError, saying why and what to do, where the template fails, leaves something out, or, with
    `data.on_rewrite="error"`, renders turns differently later.
    """
    chat = with_arguments(chat, as_text=False)
    if template.is_chatml:
        marked = template.marked(chat)
        said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        spans = [span for i, span in zip(said, marked.spans, strict=True) if chat.weight(i)]
        learned = [i for i in said if chat.weight(i)]
        for i, (start, end) in zip(learned, spans, strict=True):
            if "tool_calls" not in chat.messages[i]:
                continue  # our template writes all else as it is
            _require(lost_words(chat.messages[i], marked.text[start:end], template.special), f"message {i}: ")
        return Rendered([_learned(marked.text, spans, [chat.weight(i) for i in learned])])
    chat, turns = _turns(chat, template)
    lost = [turn.message for turn in turns if lost_reasoning(chat.messages[turn.message], turn.said)]
    if lost and template.reasoning != "error":
        chat = _without_reasoning(chat, lost, inline=template.reasoning == "inline")
        turns = find_turns(chat, template)
    for turn in turns:
        _check_turn(chat, turn, template)
    shared = share_samples(turns)
    if not turns:
        return Rendered([TextWithSpans(template.text(chat), [])])
    if len(shared) > 1 and template.on_rewrite == "error":
        raise ValueError(
            f"the chat template renders message {shared[0][-1].message} or what is before it differently once later "
            f'messages follow, so this takes {len(shared)} samples; set data.on_rewrite to "split", or '
            "data.chat_template to one that rewrites nothing"
        )
    texts = [group[-1].text for group in shared]
    if len(shared) == 1 and turns[-1].message < len(chat.messages) - 1:
        whole = template.text(chat)
        texts = [whole if whole.startswith(turns[-1].context_and_turn) else texts[0]]
    for group, text in zip(shared, texts, strict=True):
        _require(lost_context(chat, group[-1].message, text, text[: group[0].start]), "")
    samples = [
        _learned(text, [(turn.start, turn.end) for turn in group], [chat.weight(turn.message) for turn in group])
        for group, text in zip(shared, texts, strict=True)
    ]
    found = {"split": 1} if len(samples) > 1 else {}
    if empty := sum(_EMPTY_THOUGHTS.match(turn.said) is not None for turn in turns):
        found["empty_thinking_avoidable" if template.thinks_in_prompt else "empty_thinking"] = empty
    return Rendered(samples, found)


def _learned(text: str, spans: list[tuple[int, int]], weights: list[float]) -> TextWithSpans:
    return TextWithSpans(text, spans, None if all(weight == 1 for weight in weights) else weights)


def _turns(chat: Conversation, template: ChatTemplate) -> tuple[Conversation, list[Turn]]:
    """Some templates (DeepSeek V3's) take the arguments of calls as JSON text alone; the others are given objects."""
    try:
        return chat, find_turns(chat, template)
    except ValueError:
        as_text = with_arguments(chat, as_text=True)
        if as_text is chat:
            raise
        try:
            return as_text, find_turns(as_text, template)
        except ValueError:
            pass
        raise


def _check_turn(chat: Conversation, turn: Turn, template: ChatTemplate) -> None:
    message = chat.messages[turn.message]
    _require(lost_words(message, turn.said, template.special), f"message {turn.message}: ")
    if lost_reasoning(message, turn.said):
        raise ValueError(
            f'message {turn.message}: the chat template leaves out its reasoning; set data.reasoning to "inline" (it '
            'becomes "<think>...</think>" before the content) or to "drop", or data.chat_template to one that writes it'
        )


def _require(lost: str | None, where: str) -> None:
    if lost is not None:
        raise ValueError(f"{where}the chat template {lost}")


def _without_reasoning(chat: Conversation, which: list[int], *, inline: bool) -> Conversation:
    """The conversation with the reasoning of some messages put before their content, or dropped."""
    messages = list(chat.messages)
    for i in which:
        message = {key: value for key, value in messages[i].items() if key != "reasoning_content"}
        if inline:
            message["content"] = f"<think>\n{messages[i]['reasoning_content']}\n</think>\n\n{message['content']}"
        messages[i] = message
    return replace(chat, messages=messages)


def chat_sample(chat: Conversation, template: ChatTemplate, encoder: Encoder) -> Sample:
    """A conversation that is one sample. Raises ValueError as `rendered_chat` does."""
    (sample,) = rendered_chat(chat, template).samples
    (encoded,) = encoder.encode([sample])
    return encoded.sample()
