"""A model and its tokenizer, ready to answer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from pertoken.checkpoints.read import has_tokenizer, load_model, recipe_of, resolve_model_folder, tokenizer_folder
from pertoken.data.chat.template import end_of_turn_id, render
from pertoken.data.chat.typed_specials import mark_typed, typed_in, unmark
from pertoken.data.formats import Conversation
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.errors import ModelError, RecipeError
from pertoken.inference.generate import generate, stream_text
from pertoken.model.protocol import LanguageModel
from pertoken.text import reason, shown
from pertoken.training.precision import resolve_device

__all__ = ["ChatSession"]


@dataclass(frozen=True)
class ChatSession:
    """Turns text or messages into token ids, and token ids into an answer, piece by piece."""

    model: LanguageModel
    tokenizer: Any
    stop_ids: frozenset[int]
    template_kwargs: dict[str, Any]
    control: ControlTokens  # those that are plain text in a message; none where training took them for what they are
    template_date: str | None = None

    @classmethod
    def load(cls, path: str, device: str = "auto") -> ChatSession:
        """From a run, a checkpoint, a Hugging Face folder or a GGUF file. Raises ModelError or RecipeError."""
        folder = resolve_model_folder(path)
        if not has_tokenizer(folder):
            raise ModelError(f"{path}: has no tokenizer; `pertoken export` it as a Hugging Face folder with one first")
        tokenizer = open_tokenizer(tokenizer_folder(folder))
        recipe = recipe_of(folder)
        # As it was trained, the date included; what others have trained is told today's.
        data: dict[str, Any] = recipe["data"] if recipe else {"template_date": date.today().isoformat()}
        template_kwargs, day = data.get("template_kwargs", {}), data.get("template_date")
        control = ControlTokens.of(tokenizer, data.get("add_tokens", ()))
        if data.get("special_in_text") == "special":
            control = ControlTokens(())
        stops = {tokenizer.eos_token_id} - {None}
        if tokenizer.chat_template is not None:
            stops.add(end_of_turn_id(tokenizer, template_kwargs, day=day, end_of_turn=data.get("end_of_turn")))
        model = load_model(folder).to(resolve_device(device))
        return cls(model, tokenizer, frozenset(stops), template_kwargs, control, day)

    def encode(self, text: str) -> list[int]:
        """Text to continue, encoded as the tokenizer does by itself (with a BOS where it adds one)."""
        ids = self._ids(text)
        if not ids:
            raise RecipeError(f"prompt={shown(text)}: gives no token; write something to continue from")
        return ids

    def require_template(self) -> None:
        """Raises ModelError for a base model, which has no way to tell turns apart."""
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template; this is a base model, so give it a text, not a message"
            )

    def encode_latest(
        self, opening: list[dict[str, Any]], turns: list[dict[str, Any]], *, room: int
    ) -> tuple[list[int], int]:
        """`opening` and as many of the latest `turns` as leave `room` tokens for an answer, and how many of the turns
        were left out. The last turn stays, as long as one token is left for the answer.

        Raises RecipeError where the last turn alone is too long, and what `encode_chat` raises.
        """
        limit = self.model.facts.max_position_embeddings
        room = min(room, max(1, limit // 2))
        for dropped in range(0, len(turns), 2):  # a question with its answer
            ids = self.encode_chat([*opening, *turns[dropped:]])
            if len(ids) + room <= limit:
                return ids, dropped
        if len(ids) >= limit:
            raise RecipeError(f"this message takes {len(ids):,} tokens; the model's context is {limit:,}: shorten it")
        return ids, dropped

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation up to where the assistant is to speak. Control tokens typed in it are text, as in training."""
        self.require_template()
        chat, mark = Conversation(messages), ""
        try:
            if typed_in(chat, self.control):
                chat, mark = mark_typed(chat, self.control)
            text, _ = render(
                self.tokenizer,
                chat.messages,
                template_kwargs=self.template_kwargs,
                add_generation_prompt=True,
                day=self.template_date,
            )
            if mark:
                plain = unmark(TextWithSpans(text, []), mark, self.control)
                return [int(i) for i in next(Encoder(self.tokenizer).encode([plain])).tokens]
        except ValueError as error:
            raise ModelError(f"the chat template cannot render this conversation: {error}") from None
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, **options: bool) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, **options)
        except Exception as error:  # a tokenizer is a program from elsewhere; and what was typed may not be UTF-8
            raise ModelError(f"the tokenizer has no tokens for this text ({reason(error)})") from None
        return ids

    def reply(self, input_ids: list[int], **sampling: Any) -> Iterator[str]:
        """Text as it is made, up to the end of the turn. `sampling` is `generate`'s."""
        if sampling.get("seed") is None:
            sampling["seed"] = secrets.randbits(63)
        return stream_text(self.tokenizer, generate(self.model, input_ids, stop_ids=self.stop_ids, **sampling))
