"""Chat templates: a conversation as text, and the token that ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pertoken.data.tokens.tokenizer import special_ids
from pertoken.data.tokens.trained import CHATML, TrainedTokenizer
from pertoken.errors import RecipeError
from pertoken.text import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_of_turn_id", "render"]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, by the tokenizer's template; with `mark` also the character spans that it marks as
    generated. Raises ValueError with a one-line reason where the template cannot render it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=mark,
            add_generation_prompt=add_generation_prompt,
            **{**tokenizer.special_tokens_map, **template_kwargs},
        )
    except Exception as error:  # a template is a program from elsewhere, and may fail in any way
        raise ValueError(
            f"the chat template cannot render it ({reason(error)}); correct it or set another data.chat_template"
        ) from None
    return texts[0], spans[0] if mark else []


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> int:
    """The special token that ends an assistant turn: the first one after its words in the template's rendering.

    A tokenizer without a template, or with one that ends turns in plain text, has its `eos_token_id` for it.
    Raises RecipeError where the template cannot render a question and its answer, the tokenizer has no tokens for
    what it renders, or neither token exists.
    """
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.chat_template == CHATML and not template_kwargs:
        return tokenizer.eos_token_id  # as below, without transformers
    if tokenizer.chat_template is not None:
        words = "An answer"
        probe = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": words}]
        try:
            text, _ = render(tokenizer, probe, template_kwargs=template_kwargs)
        except ValueError as error:
            raise RecipeError(f"data.chat_template: for a question and an answer, {error}") from None
        _, _, tail = text.rpartition(words)
        special = special_ids(tokenizer)
        try:
            ids = tokenizer.backend_tokenizer.encode(tail, add_special_tokens=False).ids
        except Exception as error:  # a tokenizer is a program from elsewhere
            raise RecipeError(f"data.tokenizer: has no tokens for what its template writes ({reason(error)})") from None
        for token in ids:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "data.tokenizer: neither an end-of-turn token in its chat template nor an eos token, so generation would "
            'never stop; set data.chat_template="chatml" and data.add_tokens=["<|im_start|>", "<|im_end|>"]'
        )
    return int(tokenizer.eos_token_id)
