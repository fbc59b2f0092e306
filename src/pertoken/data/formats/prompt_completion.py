"""`prompt_completion`: two texts, or lists of messages, of which only the completion is learned."""

from __future__ import annotations

from pertoken.data.formats.calls import read_tools
from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.data.formats.turns import read_messages, require_assistant, with_system

__all__ = ["PROMPT_COMPLETION"]


def _read(fields: Fields) -> Conversation:
    prompt, completion = fields.need("prompt"), fields.need("completion")
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            raise RowProblem(fields.name(key), f"{kind_of(value)} found; give a text or a list of messages")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    context, weights_before = read_messages(prompt, fields.name("prompt"))
    if any(weights_before):
        raise RowProblem(
            fields.name("prompt"), "a message with a weight, but a prompt is not learned; remove the weight"
        )
    learned, said = read_messages(completion, fields.name("completion"))
    require_assistant(learned, fields.name("completion"))
    context = with_system(context, fields.text("system"))
    weights = (0.0,) * len(context) + tuple(1.0 if weight is None else weight for weight in said)
    return Conversation(context + learned, read_tools(fields.get("tools"), "tools"), weights)


PROMPT_COMPLETION = Format("prompt_completion", "conversation", ("prompt", "completion"), _read, ("system", "tools"))
