"""Chat templates: a conversation as text, and the token that ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pertoken.data.tokens.tokenizer import special_ids
from pertoken.data.tokens.trained import CHATML, TrainedTokenizer
from pertoken.errors import RecipeError
from pertoken.text import reason, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBE", "end_of_turn_id", "render", "special_tokens", "template_end", "token_at_end", "without_ends"]

PROBE = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
    mark: bool = False,
    day: str | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, by the tokenizer's template; with `mark` also the character spans that it marks as
    generated. Raises ValueError with a one-line reason where the template cannot render it.

    `day` (YYYY-MM-DD) is what the template is told when it asks for today's date. Without it there is no such
    function, and a template that has a date of its own for that case uses it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    values = {**tokenizer.special_tokens_map, **template_kwargs}
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if mark:
            texts, spans = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **values
            )
            return texts[0], spans[0]
        text: str = _compiled(template, day).render(
            messages=[_with_all_names(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **values,
        )
    except Exception as error:  # a template is a program from elsewhere, and may fail in any way
        raise ValueError(_cannot(reason(error), day)) from None
    return text, []


def _cannot(why: str, day: str | None) -> str:
    if "strftime_now" in why and day is None:
        return (
            "the chat template writes today's date, so samples would change from one day to the next; set "
            'data.template_date to a day, for example "2026-01-31"'
        )
    return f"the chat template cannot render it ({why}); correct it or set another data.chat_template"


@lru_cache(maxsize=64)
def _compiled(template: str, day: str | None) -> Any:
    """As transformers compiles it, but for the date."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)
    if "strftime_now" not in template:
        return compiled
    environment = compiled.environment
    now = environment.undefined(name="strftime_now") if day is None else date.fromisoformat(day).strftime
    return environment.from_string(template, globals={"strftime_now": now})


def _with_all_names(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning under the names that templates know it by, as transformers does."""
    found = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    thoughts = next((thought for thought in found if thought is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the tokens that stand for no text."""
    return tuple(filter(None, (str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special_ids(tokenizer)))))


def token_at_end(text: str, tokens: tuple[str, ...]) -> str | None:
    """The longest of the tokens that the text ends with, None where it ends with none of them."""
    return max((token for token in tokens if text.endswith(token)), key=len) if text.endswith(tokens) else None


def without_ends(text: str, tokens: tuple[str, ...]) -> str:
    """The text without the special tokens and the whitespace at its end."""
    text = text.rstrip()
    while (token := token_at_end(text, tokens)) is not None:
        text = text[: -len(token)].rstrip()
    return text


def end_of_turn_id(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    *,
    day: str | None = None,
    end_of_turn: str | None = None,
) -> int:
    """The token that ends an assistant turn: `end_of_turn`, or the last special one of a turn in the template's
    rendering, or else, where the template ends turns in plain text, the tokenizer's `eos_token_id`.

    Raises RecipeError where the template cannot render a question and its answer, `end_of_turn` is no token, or there
    is no token at all.
    """
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.chat_template == CHATML and end_of_turn is None:
        return tokenizer.eos_token_id  # as below, without transformers
    found = None
    if end_of_turn is not None:
        if end_of_turn not in {token.content for token in tokenizer.added_tokens_decoder.values()}:
            raise RecipeError(f"data.end_of_turn={shown(end_of_turn)}: no token of the tokenizer's own; name one")
        found = end_of_turn
    elif tokenizer.chat_template is not None:
        found = template_end(tokenizer, template_kwargs, day=day)
    if found is not None:
        return int(tokenizer.backend_tokenizer.token_to_id(found))
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "data.tokenizer: neither an end-of-turn token in its chat template nor an eos token, so generation would "
            'never stop; set data.chat_template="chatml" and data.add_tokens=["<|im_start|>", "<|im_end|>"]'
        )
    return int(tokenizer.eos_token_id)


def template_end(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], *, day: str | None = None
) -> str | None:
    """The text of the special token that the template itself ends an answer with, None where it does not.

    Raises RecipeError where the template cannot render a question and its answer.
    """
    try:
        text, _ = render(tokenizer, PROBE, template_kwargs=template_kwargs, day=day)
    except ValueError as error:
        raise RecipeError(f"data.chat_template: for a question and an answer, {error}") from None
    _, _, tail = text.rpartition(PROBE[1]["content"])
    return token_at_end(tail.rstrip(), special_tokens(tokenizer))
