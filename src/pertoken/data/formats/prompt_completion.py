"""`prompt_completion`: two texts, or lists of messages, of which only the completion is learned."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation, read_messages, read_tools, require_assistant
from pertoken.data.formats.format import Fields, Format, KeyNames

__all__ = ["PROMPT_COMPLETION"]


def _read(fields: Fields, keys: KeyNames) -> Conversation:
    prompt, completion = fields.need(keys.prompt), fields.need(keys.completion)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    context, learned = read_messages(prompt, keys.prompt), read_messages(completion, keys.completion)
    require_assistant(learned, keys.completion)
    weights = (0.0,) * len(context) + (1.0,) * len(learned)
    return Conversation(context + learned, read_tools(fields.get("tools"), "tools"), weights)


PROMPT_COMPLETION = Format("prompt_completion", "conversation", lambda keys: (keys.prompt, keys.completion), _read)
