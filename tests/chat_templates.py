"""Which chat templates render which conversations exactly, and an oracle that says what exactly is.

    python tests/chat_templates.py          write docs/templates.md

The templates are those that come with TRL, where it is installed. They are read there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pertoken.data.chat.render import ChatTemplate, rendered_chat
from pertoken.data.formats import Conversation
from pertoken.data.tokens.encode import Encoder
from pertoken.errors import PertokenError

DOCUMENT = Path(__file__).parents[1] / "docs" / "templates.md"
DAY = "2026-01-31"
ENDS = {"glm4moe": "<|user|>"}  # data.end_of_turn
_SPECIAL = re.compile(r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>")
_MORE_SPECIAL = (
    "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "</s>", "[gMASK]", "<sop>", "<|bos|>", "<|eos|>",
)  # fmt: skip


def template_files() -> list[Path]:
    """The templates of the installed TRL, none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))


def _tool(name: str, key: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": "string", "description": "what"}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


def _call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _result(content: str, name: str = "weather", number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": f"call{number:05d}"}


_TOOLS = [_tool("weather", "city"), _tool("clock", "zone")]
_CITY = {"city": 'Köln "Süd"', "days": 3, "hourly": True, "where": {"zip": ["50667"]}}
_SYSTEM = {"role": "system", "content": "Be brief."}
_QUESTION, _ANSWER = _user("Which river?"), _said("The Rhine.")

KINDS: dict[str, Conversation] = {
    "1 turn": Conversation([_QUESTION, _ANSWER]),
    "3 turns": Conversation([_QUESTION, _ANSWER, _user("Next?"), _said("Moselle."), _user("More?"), _said("Main.")]),
    "system": Conversation([_SYSTEM, _QUESTION, _ANSWER]),
    "tools, no call": Conversation([_QUESTION, _ANSWER], _TOOLS),
    "call": Conversation(
        [_user("Rain?"), _said("", tool_calls=[_call("weather", _CITY)]), _result("dry"), _said("No.")], _TOOLS
    ),
    "arguments as text": Conversation(
        [_user("Rain?"), _said("", tool_calls=[_call("weather", json.dumps(_CITY))]), _result("dry"), _said("No.")],
        _TOOLS,
    ),
    "parallel calls": Conversation(
        [
            _user("Rain? Time?"),
            _said("", tool_calls=[_call("weather", _CITY), _call("clock", {"zone": "CET"}, 2)]),
            _result("dry"),
            _result("noon", "clock", 2),
            _said("No rain at noon."),
        ],
        _TOOLS,
    ),
    "words and call": Conversation(
        [_user("Rain?"), _said("Let me see.", tool_calls=[_call("weather", _CITY)]), _result("dry"), _said("No.")],
        _TOOLS,
    ),
    "reasoning": Conversation(
        [
            _QUESTION, _said("The Rhine.", reasoning_content="Cologne lies on it."),
            _user("Next?"), _said("Moselle.", reasoning_content="Koblenz, then."),
        ]
    ),
    "reasoning at times": Conversation(
        [_QUESTION, _ANSWER, _user("Next?"), _said("Moselle.", reasoning_content="Koblenz, then.")]
    ),
    "reasoning and call": Conversation(
        [
            _user("Rain?"), _said("", reasoning_content="Ask.", tool_calls=[_call("weather", _CITY)]),
            _result("dry"), _said("No.", reasoning_content="Dry it is."),
        ],
        _TOOLS,
    ),
    "assistant first": Conversation([_said("Hello there."), _QUESTION, _ANSWER]),
    "weight 0": Conversation([_QUESTION, _said("Rubbish."), _user("Again?"), _ANSWER], weights=(0, 0, 0, 1)),
    "empty answer": Conversation([_QUESTION, _said(""), _user("Really?"), _ANSWER]),
    "inline <think>": Conversation(
        [_QUESTION, _said("<think>\nCologne lies on it.\n</think>\n\nThe Rhine."), _user("Next?"), _said("Moselle.")]
    ),
    "user last": Conversation([_QUESTION, _ANSWER, _user("Thanks!")]),
    "unicode": Conversation([_user("Welcher Fluß? 🙂"), _said("莱茵河 — <b>é</b>.\n\n```\nx\n```")]),
}  # fmt: skip


@cache
def _base() -> str:
    """A byte-level tokenizer's tokenizer.json, without tokens of templates."""
    from pertoken.data.tokens.train import train_tokenizer

    words = " ".join(str(message) for chat in KINDS.values() for message in chat.messages)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(f"{words} <|im_start|>assistant user system model </think>\n\n <think>\n" * 3, encoding="utf-8")
        train_tokenizer([text], vocab_size=500, out_dir=Path(folder, "tokenizer"))
        return Path(folder, "tokenizer", "tokenizer.json").read_text(encoding="utf-8")


def tokenizer_for(template: str) -> Any:
    """A small real tokenizer with the template, and with the control tokens that stand in it as special ones."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = [token for token in _MORE_SPECIAL if token in template or token in ("<|bos|>", "<|eos|>")]
    tokens = list(dict.fromkeys([*_SPECIAL.findall(template), *known]))
    backend = Tokenizer.from_str(_base())
    backend.add_tokens(["<think>", "</think>"])  # tokens, and not special, as in real ones
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        extra_special_tokens=tokens,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


@dataclass(frozen=True)
class Outcome:
    """What became of a conversation: its samples (tokens, supervised), or why it was refused."""

    samples: list[tuple[list[int], list[bool]]]
    refused: str = ""

    @property
    def cell(self) -> str:
        """As docs/templates.md says it."""
        if not self.refused:
            return "yes" if len(self.samples) == 1 else f"{len(self.samples)} samples"
        for pattern, why in _WHY:
            if re.search(pattern, self.refused):
                return f"({why})"
        raise AssertionError(f"a refusal that says nothing: {self.refused}")


_WHY = [
    (r"leaves out its reasoning", "reasoning"),
    (r"leaves out the tool ", "tools"),
    (r"leaves out the call of", "calls"),
    (r"leaves out the argument ", "arguments"),
    (r"as JSON within JSON", "arguments twice"),
    (r"leaves out .* of its content", "content"),
    (r"leaves out .* of the system message", "system"),
    (r"leaves out .* of the tool message", "results"),
    (r"leaves out .* of the user message", "content"),
    (r"does not end message|ends no turn", "no end"),
    (r"renders what is before", "changes"),
    (r"cannot render it", "fails"),
]


def ours(tokenizer: Any, chat: Conversation, name: str) -> Outcome:
    try:
        template = ChatTemplate(tokenizer, {}, day=DAY, end_of_turn=ENDS.get(name))
        samples = rendered_chat(chat, template).samples
    except (ValueError, PertokenError) as error:
        return Outcome([], str(error))
    encoded = Encoder(tokenizer).encode(samples)
    return Outcome([(one.tokens.tolist(), one.supervised.tolist()) for one in encoded])


class Refused(Exception):
    """The oracle finds that the conversation cannot be trained as it will be asked."""


def oracle(tokenizer: Any, chat: Conversation, end: int | None = None) -> list[tuple[list[int], list[bool]]]:
    """The samples up to the end of their last turn, by nothing but `apply_chat_template` on the first messages.

    `end` is appended where the template does not go on with a special token by itself.
    """
    special = set(tokenizer.all_special_ids)

    def ids(messages: list[Any], *, prompt: bool = False) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(
            messages, tools=chat.tools, add_generation_prompt=prompt, return_dict=False
        )
        return found

    turns = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant" or not chat.weight(i):
            continue
        full = ids(chat.messages[: i + 1])
        start = _same(ids(chat.messages[:i], prompt=True), full) if i else _after_header(ids, full)
        if end is not None and full[-1] != end:
            following = ids(chat.messages[: i + 2])[len(full) : len(full) + 1]
            full = [*full, *(following or [end])]
        turns.append((start, full[: max(at for at, token in enumerate(full) if token in special) + 1]))
    whole = [full for i, (_, full) in enumerate(turns) if not any(_is_in(full, other) for _, other in turns[i + 1 :])]
    masks = [[False] * len(full) for full in whole]
    for start, full in turns:
        number = next(n for n, other in enumerate(whole) if _is_in(full, other))
        masks[number][start : len(full)] = [True] * (len(full) - start)
    return list(zip(whole, masks, strict=True))


def expected(tokenizer: Any, chat: Conversation, end: int | None = None) -> list[tuple[list[int], list[bool]]]:
    """The oracle's samples with the arguments of calls as objects, or, where that fails, as text."""
    from jinja2 import TemplateError

    try:
        return oracle(tokenizer, _with_arguments(chat, json.loads), end)
    except (TypeError, TemplateError):
        return oracle(
            tokenizer, _with_arguments(chat, lambda text: json.dumps(json.loads(text), ensure_ascii=False)), end
        )


def _with_arguments(chat: Conversation, convert: Callable[[str], Any]) -> Conversation:
    messages = json.loads(json.dumps(chat.messages))
    for call in (call["function"] for message in messages for call in message.get("tool_calls", ())):
        given = call["arguments"]
        call["arguments"] = convert(given if isinstance(given, str) else json.dumps(given))
    return Conversation(messages, chat.tools, chat.weights)


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_in(a: list[int], b: list[int]) -> bool:
    return b[: len(a)] == a


def _after_header(ids: Callable[..., list[int]], full: list[int]) -> int:
    """Where an answer that nothing comes before starts: behind the header that another conversation shows."""
    question = [{"role": "user", "content": "A question"}]
    header = ids(question, prompt=True)[len(ids(question)) :]
    for length in range(len(header), 0, -1):
        for at in range(len(full) - length + 1):
            if full[at : at + length] == header[:length]:
                return at + length
    raise Refused("no header")


@contextmanager
def day_stands_still() -> Iterator[None]:
    """`strftime_now` of templates says DAY."""
    from transformers.utils import chat_template_utils

    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(DAY)

    before = chat_template_utils.datetime
    chat_template_utils.datetime = Now
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def check(tokenizer: Any, chat: Conversation, name: str, found: Outcome) -> None:
    """Exact by the oracle, with every word there, or refused for a reason that is true."""
    end = tokenizer.convert_tokens_to_ids(ENDS[name]) if name in ENDS else None
    with day_stands_still():
        if found.cell == "(fails)":
            try:
                expected(tokenizer, chat, end)
            except Exception:  # a template fails in any way
                return
            raise AssertionError(f"does not fail: {found.refused}")
        exact = expected(tokenizer, chat, end)
    said = " ".join(_text(tokenizer, tokens, supervised, True) for tokens, supervised in found.samples or exact)
    asked = " ".join(_text(tokenizer, tokens, supervised, False) for tokens, supervised in found.samples or exact)
    last = max(i for i in range(len(chat.messages)) if chat.weight(i))
    learned = [message for i, message in enumerate(chat.messages) if chat.weight(i)]
    given = [message for message in chat.messages[:last] if message["role"] != "assistant"]
    all_there = all(word in said for message in learned for word in _words(message)) and all(
        word in asked for message in given for word in _words(message)
    )
    tools = [tool["function"]["name"] for tool in chat.tools or ()]
    if found.refused:
        assert (
            found.cell in ("(changes)", "(no end)", "(arguments twice)")
            or not all_there
            or not all(name in asked for name in tools)
        )
        return
    assert all_there
    assert all(name in asked for name in tools)
    assert len(found.samples) == len(exact)
    for (tokens, supervised), (up_to_end, mask) in zip(found.samples, exact, strict=True):
        assert tokens[: len(up_to_end)] == up_to_end
        assert supervised[: len(mask)] == mask
        assert not any(supervised[len(mask) :])


def _text(tokenizer: Any, tokens: list[int], supervised: list[bool], which: bool) -> str:
    return str(tokenizer.decode([token for token, is_said in zip(tokens, supervised, strict=True) if is_said is which]))


def _words(message: dict[str, Any]) -> list[str]:
    words = f"{message['content']} {message.get('reasoning_content', '')}".split()
    return [word for word in words if "think>" not in word] + [
        call["function"]["name"] for call in message.get("tool_calls", ())
    ]


@cache
def outcomes(file: Path) -> tuple[Any, dict[str, Outcome]]:
    """The tokenizer of a template, and what becomes of each kind of conversation."""
    tokenizer = tokenizer_for(file.read_text(encoding="utf-8"))
    return tokenizer, {kind: ours(tokenizer, chat, file.stem) for kind, chat in KINDS.items()}


def table() -> str:
    """docs/templates.md"""
    cells = {file.stem: [outcome.cell for outcome in outcomes(file)[1].values()] for file in template_files()}
    rows = [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    head = ["| template | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    return _ABOUT + "\n".join([*head, *rows]) + "\n"


_ABOUT = """\
# Chat templates

What becomes of which kind of conversation with the chat templates that models bring. This page is written by
`python tests/chat_templates.py`, from the templates that come with TRL, and `tests/data/test_templates.py` holds each
cell against an oracle that uses nothing but `apply_chat_template`.

A turn of the assistant is trained as it will be asked. Its context is what the template gives for the messages before
it, with the generation prompt; supervised is what follows, up to the turn's last special token. There is no third way.
Most templates that render a turn differently once others follow it drop its reasoning; `data.on_rewrite = "error"`
refuses a row that this would make several samples of.

| cell | meaning |
|---|---|
| yes | one sample, exact |
| 2 samples | exact; the template renders turns differently later, so some have a sample of their own |
| (reasoning) | refused: the template leaves out reasoning; `data.reasoning = "inline"` or `"drop"` trains the row |
| (content), (calls), (tools), (system) | refused: the template leaves that out, all of it or a part |
| (fails) | refused: the template itself says no, most often since roles must alternate |
| (changes) | refused: what is before a turn changes when the turn is there, so nothing is what will be asked |
| (no end) | refused: the template ends the turn with no special token |

glm4moe ends no turn with a token of its own, so it is used with `data.end_of_turn = "<|user|>"`. gptoss writes today's
date: it is used with `data.template_date`. Arguments of calls are objects in these conversations, or the JSON text of
one; both give the same samples.

"""


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    DOCUMENT.write_text(table(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
