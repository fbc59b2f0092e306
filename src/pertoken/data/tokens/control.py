"""Control tokens, which end turns and documents or head a role, and what to do with those that are typed in data.

A text that was typed has no business to steer: "<|im_end|>" in a message is ten characters, not the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.data.files.long_text import LongText, blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ControlTokens", "Encoding", "Found", "TypedEncoder"]

# What models write themselves, in the brackets that tokenizers have for it: it stays the token that it is.
_OWN = re.compile(
    r"\W*(begin_of_|end_of_)?(think|thinking|thought|reasoning|solution|answer|python_tag|tool[\W_]?(call|response)s?)"
    r"([\W_]?(section|argument))?([\W_]?(begin|end|start|sep))?\W*",
    re.IGNORECASE,
)
# Single characters for private use that stand for a control token: the first says which, the others fill its length.
_FIRST, _MOST, _FILL = 0xF0000, 0xFFFE, "\U00100000"
_STAND_INS = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + _MOST - 1)}{_FILL}]")


@dataclass(frozen=True)
class Found:
    """The control tokens of a text."""

    count: int
    first: str  # the first one behind the text's beginning, else the one there; empty where there is none
    begins: str  # the one that the text begins with
    ends: str  # the one that it ends with


class ControlTokens:
    """The special tokens of a tokenizer that data must not write: all but those that models write themselves. Can be
    pickled."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(sorted(names))
        self._pattern = _any_of(self.names)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, add_tokens: Sequence[str] = ()) -> ControlTokens:
        """`add_tokens` are those that a recipe adds: for the data to write, unless the tokenizer names them (eos, say)
        or its chat template writes them."""
        named = [value for value in tokenizer.special_tokens_map.values() if not isinstance(value, list | dict)]
        written = [str(tokenizer.chat_template or ""), *map(str, named)]
        theirs = {name for name in add_tokens if not any(name in text for text in written)}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(name for name in special - theirs if name.strip() and not _OWN.fullmatch(name))

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where they stand in the text, [start, end) in characters, in order."""
        return [match.span() for match in self._pattern.finditer(text)] if self.names else []

    def look_through(self, text: str | LongText) -> Found:
        """How many of them a text has. Raises DataError where a LongText's file has changed."""
        count, first, begins, ends = 0, "", "", ""
        held, at = "", 0  # what is not looked through yet, and where it starts
        longest, last = max(map(len, self.names), default=0), len(text)
        for block in blocks_of(text) if self.names else ():
            held += block
            end = 0
            for match in self._pattern.finditer(held):
                if at + len(held) < last and len(held) - match.start() < longest:
                    break  # what follows may make a longer one of it
                count, end = count + 1, match.end()
                if at + match.start() == 0:
                    begins = match[0]
                else:
                    first = first or match[0]
                ends = match[0] if at + end == last else ends
            end = max(end, len(held) - longest + 1)
            held, at = held[end:], at + end
        return Found(count, first or begins, begins, ends)


@dataclass(frozen=True)
class Encoding:
    """As `tokenizers` has it, of a whole text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TypedEncoder:
    """Encodes a text in which some special tokens are what they are, and others were typed: these are plain text.

    It is the same tokenizer, but that each special token goes by a name of as many private characters. What is to be
    that token is written so, and everything else is left to what encodes any text. Places therefore stay what they are.
    """

    def __init__(self, tokenizer_json: str, unknown_id: int | None) -> None:
        from tokenizers import Tokenizer

        spec = json.loads(tokenizer_json)
        special = [token for token in spec["added_tokens"] if token["special"]]
        assert len(special) < _MOST, len(special)
        self._stand_in = {
            token["content"]: chr(_FIRST + i) + _FILL * (len(token["content"]) - 1) for i, token in enumerate(special)
        }
        self._special = _any_of(self._stand_in)
        self._id_of = {token["content"]: token["id"] for token in special}
        self._unknown_id = unknown_id
        _rename(spec["model"], self._stand_in)
        ids = {}
        for token in spec["added_tokens"]:
            if token["special"]:
                token["content"] = self._stand_in[token["content"]]
            ids[token["content"]] = token["id"]
        self._backend = Tokenizer.from_str(json.dumps(spec))
        highest = max(*ids.values(), *self._backend.get_vocab(with_added_tokens=True).values())
        self._ids = np.arange(highest + 1)  # from the ids of `_backend` to the tokenizer's own
        for content, token_id in ids.items():
            self._ids[self._backend.token_to_id(content)] = token_id

    def encode(self, text: str, typed: Sequence[tuple[int, int]]) -> Encoding:
        """`typed` are the characters [start, end) of the special tokens that are plain text, in order and apart.

        Raises ValueError where the tokenizer cannot tell the two apart.
        """
        if _STAND_INS.search(text):
            raise ValueError("it has characters for private use, which are needed to keep control tokens apart")
        parts, at, written = [], 0, list[int]()
        for start, end in (*typed, (len(text), len(text))):
            written += [self._id_of[name] for name in self._special.findall(text[at:start])]
            parts += [self._special.sub(lambda match: self._stand_in[match[0]], text[at:start]), text[start:end]]
            at = end
        encoding = self._backend.encode("".join(parts), add_special_tokens=False)
        ids: list[int] = self._ids[np.array(encoding.ids, dtype=np.int64)].tolist()
        # An unknown character has a special token too.
        special = set(self._id_of.values()) - {self._unknown_id}
        if [i for i in ids if i in special] != [i for i in written if i in special]:
            raise ValueError("control tokens that are typed in it cannot be told from those of the chat template")
        return Encoding(ids, encoding.offsets)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """The model's own entries for special tokens, which a text might find by itself. Those that merging makes stay."""
    made = {
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model.get("merges") or ()
    }
    names = {name: stand_in for name, stand_in in names.items() if name not in made}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Any of the names, the longest where several start."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or r"(?!)")
