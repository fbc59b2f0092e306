"""Where a long text may be cut, so that the tokens of its pieces, put together, are those of the whole.

Two kinds of cuts are known, both for byte-pair encoding whose tokens tile the text (`encode.py`).

**A clean cut** is a place where the pre-tokenizer splits, whatever is around it. Its patterns are sets of alternatives,
and `_ALTERNATIVES` lists those that are known. Each of them matches one run of a class of characters, perhaps with a
character before it and line ends behind it. So none reaches from a character that is no white space over the space
behind it, from a letter or a digit over the sign or the line end behind it, or from a letter over the digit behind it.
A match that ends there has looked at no more than the character behind it, and finds it as unfit as the end of the
text; none looks back. What no alternative matches stays together, hence letters, signs and every white space must be
among them. Therefore the pieces before and behind the cut are split as within the whole, and byte-pair encoding takes
each piece by itself. NFC joins or reorders nothing across such a cut, since what stands behind it never combines with
what is before.

**A cut within a word**, where a run of letters or digits is longer than a piece should be. Merging takes the lowest
rank that is anywhere, the leftmost of these; hence

    (1) tokens that are neighbors in the encoding of a word are, taken alone, the encoding of their text: the merges
        among them come in the same order, as no merge crossed their ends
    (2) tokens of which every two neighbors are the encoding of their own text are the encoding of the whole: the first
        merge across a border would have the lowest rank among these two tokens also

So a window that ends within the word, and one that starts at one of its tokens' starts, fit together there if the
second one starts with the token that the first one has at this place: every two neighbors are neighbors in one of the
windows. `Encoder.pieces` checks just that.

An added token is found before all this. No cut is made within one, and none in a text that has an added token whose
surroundings matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.data.files.long_text import LongText, Window, one_of

__all__ = ["Cut", "Cuts", "NoCut"]

_PIECE_CHARS = 200_000  # at least: some 30 MB while it is encoded
_LONGEST_CHARS = 1_000_000  # without a place to cut: some 200 MB
_LEAST_WINDOW = 256

# Letters, signs and digits that every version of Unicode knows as such, and that NFC leaves as they are.
_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
_SIGNS = r"\t\n\r.,;:!?()\[\]{}<>=+*/" + "\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f"
_CLEAN = rf"(?<=[^\s\u180e])(?= )|(?<=[{_LETTERS}0-9])(?=[{_SIGNS}])|(?<=[{_LETTERS}])(?=[0-9])"
_BETWEEN_DIGITS = r"|(?<=[0-9])(?=[0-9])"

_ALTERNATIVES = {
    "contraction": [
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'(?:s|t|re|ve|m|ll|d))", "'(?i:[sdmt]|ll|ve|re)"),
    ],
    "letters": [r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?\p{L}+", r" ?[\p{L}\p{M}]+"],
    "digit": [r"\p{N}"],
    "digits": [r"\p{N}+", r" ?\p{N}+"],
    "few digits": [r"\p{N}{1,3}"],
    "signs": [r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+"],
    "some spaces": [r"\s*[\r\n]+", r"\s+(?!\S)"],
    "spaces": [r"\s+"],
}
_KINDS = {alternative: kind for kind, known in _ALTERNATIVES.items() for alternative in known}
_GPT2 = {"contraction", "letters", "digits", "signs", "spaces"}  # the pattern that a byte-level step has by itself
_WHOLE = {"letters", "signs", "spaces"}  # a step with these splits at every clean cut


class NoCut(ValueError):
    """A text that is too long to be encoded whole and cannot be cut; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A piece ends before the character `at`. `window` is None for a clean cut; else the `window` characters before
    and the one behind the cut are in the same word."""

    at: int
    window: int | None = None


@dataclass(frozen=True)
class Cuts:
    """Finds the cuts for one tokenizer. Can be pickled."""

    clean: re.Pattern[str] | None
    within: re.Pattern[str] | None  # as long a run as a window, and the character behind it
    window: int
    added: tuple[str, ...]  # contents of the added tokens
    alone: tuple[str, ...]  # of those whose surroundings matter
    ascii_only: bool  # whether tokens are known to tile the text in ASCII alone
    blocked: str  # characters before which no cut is made: an added token may be found there once they are normalized

    @classmethod
    def of(cls, spec: dict[str, Any], widest: int) -> Cuts | None:
        """For a tokenizer (its JSON) whose tokens tile the text, the widest with `widest` bytes. None: no cut is known.

        `spec` must be one that `widths_of` knows.
        """
        window = 2 * max(_LEAST_WINDOW, widest)
        added, normalized = spec["added_tokens"], bool(spec["normalizer"])
        moved = "".join(token["content"][1:] for token in added if token["normalized"]) if normalized else ""
        alone = [token for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
        if normalized and any(token["normalized"] for token in alone):
            return None
        patterns = _patterns(spec["pre_tokenizer"], merges=bool(spec["model"]["merges"]), window=window)
        if patterns is None:
            return None
        contents = tuple(token["content"] for token in added)
        return cls(*patterns, window, contents, tuple(token["content"] for token in alone), normalized, moved)

    @property
    def reach(self) -> int:
        """How many characters on either side of a place `allows` looks at, at most."""
        return max(map(len, self.added), default=0) + 1

    def find(self, text: str | LongText) -> Iterator[Cut]:
        """The cuts of a text in order, the last one its end. Raises NoCut, and DataError for a file that changes."""
        if found := one_of(text, self.alone):
            if len(text) > _LONGEST_CHARS:
                raise NoCut(f"{len(text):,} characters with the token {found} among them, which takes spaces beside it")
            yield Cut(len(text))
            return
        window = Window(text)
        start, seen = 0, 0  # of the piece, which after a cut within a word starts some characters before, at `seen`
        while len(text) - start > 2 * _PIECE_CHARS:
            stop = min(start + _LONGEST_CHARS, len(text))
            window.move(max(0, seen - self.reach), stop + self.reach)
            cut = self._next(window, seen, start + _PIECE_CHARS, stop, len(text))
            if cut is None and len(text) - start <= _LONGEST_CHARS:
                break
            if cut is None:
                raise NoCut(f"{_LONGEST_CHARS:,} characters after character {start:,} without a known place to cut")
            yield cut
            start, seen = cut.at, cut.at - (cut.window or 0)
        window.finish()
        yield Cut(len(text))

    def allows(self, window: Window, at: int) -> bool:
        """Whether no added token reaches over this place. The window holds `reach` characters on either side of it."""
        text, at = window.held, at - window.start
        if text[at] in self.blocked:
            return False
        return not any(text.find(token, max(0, at - len(token) + 1), at + len(token) - 1) >= 0 for token in self.added)

    def _next(self, window: Window, seen: int, start: int, stop: int, end: int) -> Cut | None:
        """The first cut in [start, stop) of a text of `end` characters."""
        text, before = window.held, window.start
        for match in self.clean.finditer(text, start - before, stop - before) if self.clean else ():
            at = before + match.start()
            if at < end and self.allows(window, at):
                return Cut(at)
        for match in self.within.finditer(text, start - before, stop - before) if self.within else ():
            at = before + match.end() - 1
            if self.ascii_only and not window.text(seen, at + 1).isascii():
                break  # its tokens need not tile the text, so it could not be told where they start
            if self.allows(window, at):
                return Cut(at, self.window)
        return None


def _patterns(
    pre_tokenizer: dict[str, Any] | None, *, merges: bool, window: int
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None] | None:
    """`clean` and `within` of Cuts; None where no cut is known."""
    if pre_tokenizer is None and not merges:  # a character each
        return re.compile(""), None
    steps = _steps(pre_tokenizer)
    if steps is None:
        return None
    kinds = [kind for step in steps for kind in step]
    if not kinds:  # all of the text is one word
        return None, re.compile(f"(?s:.{{{window + 1}}})")
    if not any(step >= _WHOLE for step in steps):
        return None
    clean, within = _CLEAN, f"[{_LETTERS}]{{{window + 1}}}"
    if "few digits" not in kinds:
        if "digit" in kinds:
            clean += _BETWEEN_DIGITS
        else:
            within += f"|[0-9]{{{window + 1}}}"
    return re.compile(clean), re.compile(within)


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[set[str]] | None:
    """The kinds of alternatives of each step; None where one is not known."""
    first = pre_tokenizer or {"type": "Sequence", "pretokenizers": []}
    steps: Sequence[dict[str, Any]] = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    found = []
    for step in steps:
        if step["type"] == "ByteLevel":
            found.append(set(_GPT2) if step["use_regex"] else set())
        elif step["type"] == "Digits":
            found.append({"digit" if step["individual_digits"] else "digits"})
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            kinds = {_KINDS.get(alternative) for alternative in _alternatives(step["pattern"].get("Regex", ""))}
            if None in kinds:
                return None
            found.append({kind for kind in kinds if kind})
        else:
            return None
    return found


def _alternatives(pattern: str) -> list[str]:
    """The parts of a pattern between the bars that are in no group."""
    parts, depth = [""], 0
    for sign in pattern:
        depth += (sign == "(") - (sign == ")")
        if sign == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
