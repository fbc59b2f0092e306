"""Text -> tokens, each with its place in the text.

Every encoding comes down to byte positions: which bytes of the UTF-8 text a token adds. A byte-level tokenizer's tokens
lie side by side in the text, and so do characters, so the positions follow from the tokens alone; any other tokenizer
is asked for its offsets, which takes longer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.data.batch.sample import Sample
from pertoken.data.files.long_text import LongText, Window
from pertoken.data.tokens.control import ControlTokens, TypedEncoder
from pertoken.data.tokens.cuts import Cut, Cuts, NoCut
from pertoken.data.tokens.tokenizer import special_ids
from pertoken.data.tokens.widths import ids_of, unknown_id_of, widths_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Encoder", "TextWithSpans"]

_WHOLE_CHARS = 2_000_000  # some 600 MB while it is encoded
_AWAY_FROM_EDGE = 32  # bytes from where a word may start: what is before the window can be part of it


@dataclass(frozen=True)
class TextWithSpans:
    """A text and the spans [start, end) of its characters that are learned, in order and apart."""

    text: str
    spans: Sequence[tuple[int, int]]
    weights: Sequence[float] | None = None  # of each span's tokens in the loss, at least 0; None: 1
    typed: Sequence[tuple[int, int]] = ()  # control tokens that are plain text, in order and apart

    def __post_init__(self) -> None:
        if self.weights is not None:
            assert len(self.weights) == len(self.spans), (len(self.weights), len(self.spans))
            assert all(math.isfinite(weight) and weight >= 0 for weight in self.weights), self.weights

    def part(self, text: str, start: int) -> TextWithSpans:
        """What of this is in `text`, the characters from `start` on."""
        stop = start + len(text)
        inside = [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start]
        spans = [(max(self.spans[i][0], start) - start, min(self.spans[i][1], stop) - start) for i in inside]
        typed = [(a - start, b - start) for a, b in self.typed if a >= start and b <= stop]
        return TextWithSpans(text, spans, self.weights and [self.weights[i] for i in inside], typed)


@dataclass(frozen=True)
class Encoded:
    """A text's n tokens. `supervised` and `num_bytes` are about the token itself, as a label."""

    tokens: np.ndarray  # [n] int32
    supervised: np.ndarray  # [n] bool; float32 weights where one is neither 0 nor 1
    num_bytes: np.ndarray  # [n] int64, UTF-8 bytes of text that the token adds; 0 for a special token

    def sample(self) -> Sample:
        """Inputs and labels. The first token is nobody's label, so its being supervised is lost. Needs n >= 2."""
        return Sample(self.tokens, self.supervised[1:])

    def framed(self, first: int | None, last: int | None) -> Encoded:
        """Between the token `first`, unless it begins with it, and the token `last`, which is learned, unless it ends
        with it."""
        tokens, supervised, num_bytes = self.tokens, self.supervised, self.num_bytes
        if first is not None and (not len(tokens) or tokens[0] != first):
            tokens, num_bytes = np.append(np.int32(first), tokens), np.append(0, num_bytes)
            supervised = np.append(False, supervised).astype(supervised.dtype, copy=False)
        if last is not None and (not len(tokens) or tokens[-1] != last):
            tokens, num_bytes = np.append(tokens, np.int32(last)), np.append(num_bytes, 0)
            supervised = np.append(supervised, True).astype(supervised.dtype, copy=False)
        return Encoded(tokens, supervised, num_bytes)


class Encoder:
    """A tokenizer's encoding alone: nothing is added, cut or padded, and places are exact. Can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # A byte-level post-processor trims spaces off the offsets; a token would seem not to reach over a span's start.
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        special = sorted(special_ids(tokenizer))
        spec = json.loads(self.to_str())
        last = max([self._backend.get_vocab_size(), *special, *ids_of(self._backend)])
        self._is_special = np.zeros(last + 1, np.bool_)
        self._is_special[special] = True
        self._widths = widths_of(self._backend, spec)  # [V] int64, bytes of text of each token; None: ask for offsets
        self._ascii_only = self._backend.normalizer is not None  # then `_widths` hold in ASCII text alone
        self.unknown_id = unknown_id_of(self._backend, spec)  # for characters without a token; None: there are none
        self._typed: TypedEncoder | None = None  # made when it is needed
        self._cuts: Cuts | None = None
        if self._widths is not None:
            self._cuts = Cuts.of(spec, int(self._widths.max()))

    def token(self, token_id: int) -> str:
        return str(self._backend.id_to_token(token_id))

    def to_str(self) -> str:
        """Everything that decides the encoding."""
        return str(self._backend.to_str())

    def encode(
        self, texts: Sequence[TextWithSpans], *, prepend: int | None = None, append: int | None = None
    ) -> Iterator[Encoded]:
        """The tokens of each text, in order. `prepend` is put before and `append`, supervised, behind each text's own
        tokens, unless they are there already.

        Raises ValueError where typed control tokens cannot be told from others.
        """
        plain = [marked.text for marked in texts if not marked.typed]
        if self._widths is None:
            encodings = iter(self._with_offsets(plain))
        else:
            encodings = iter(self._backend.encode_batch_fast(plain, add_special_tokens=False))
        for marked in texts:
            if marked.typed:
                encoded = self._with_typed(marked)
            elif self._widths is None:
                encoded = self._by_offsets(marked, next(encodings))
            else:
                encoded = self._by_widths(marked, next(encodings)) or self._by_offsets(
                    marked, self._with_offsets([marked.text])[0]
                )
            yield encoded.framed(prepend, append)

    def _with_typed(self, marked: TextWithSpans) -> Encoded:
        if self._typed is None:
            self._typed = TypedEncoder(self.to_str(), self.unknown_id)
        encoding = self._typed.encode(marked.text, marked.typed)
        by_widths = self._by_widths(marked, encoding) if self._widths is not None else None
        return by_widths or self._by_offsets(marked, encoding)

    def pieces(
        self,
        marked: TextWithSpans | LongText,
        *,
        prepend: int | None = None,
        append: int | None = None,
        typed: ControlTokens | None = None,
    ) -> Iterator[Encoded]:
        """What `encode` gives for one text, in pieces that follow each other, in memory that does not grow with it.

        A LongText is learned whole; those of the tokens `typed` that it has are plain text. Its pieces end with
        DataError where its file has changed.
        Raises NoCut at once for a text that is too long to be encoded whole and has no place to cut.
        """
        text = marked if isinstance(marked, LongText) else marked.text
        try:
            if self._cuts is None:
                if len(text) > _WHOLE_CHARS:
                    raise NoCut(f"{len(text):,} characters, more than the {_WHOLE_CHARS:,} that can be encoded at once")
                whole = _part(marked, str(text), 0, typed)
                return iter(list(self.encode([whole], prepend=prepend, append=append)))
            return self._pieces(marked, list(self._cuts.find(text)), prepend, append, typed)
        except NoCut:
            if isinstance(text, LongText):
                text.check()  # that there is no cut must be true of the file as it was
            raise

    def _pieces(
        self,
        marked: TextWithSpans | LongText,
        cuts: list[Cut],
        prepend: int | None,
        append: int | None,
        typed: ControlTokens | None,
    ) -> Iterator[Encoded]:
        assert self._cuts is not None
        window, reach = Window(marked if isinstance(marked, LongText) else marked.text), self._cuts.reach
        start, first = 0, None  # of the piece; the token that it must start with
        for cut in cuts:
            window.move(max(0, start - reach), cut.at + reach)
            piece = _part(marked, window.text(start, cut.at), start, typed)
            if cut is cuts[-1]:
                window.finish()  # before the last piece is given, so that nothing is made of a file that has changed
            (encoded,) = self.encode([piece])
            if first is not None and first != encoded.tokens[0]:
                raise NoCut(f"a word at character {start:,} that is too long to be encoded whole and cannot be cut")
            before = prepend if cut is cuts[0] else None
            if cut.window is None:
                yield encoded.framed(before, append if cut is cuts[-1] else None)
                start, first = cut.at, None
            else:
                count, width = self._cut_within(piece.text, encoded, cut.window, window, start)
                kept = Encoded(encoded.tokens[:count], encoded.supervised[:count], encoded.num_bytes[:count])
                yield kept.framed(before, None)
                start, first = start + width, encoded.tokens[count]

    def _cut_within(self, piece: str, encoded: Encoded, window: int, text: Window, start: int) -> tuple[int, int]:
        """(tokens, characters) of the piece that are before the cut: where a token in its last word starts."""
        assert self._widths is not None
        assert self._cuts is not None
        raw = piece.encode()
        starts = np.cumsum(self._widths[encoded.tokens])
        if starts[-1] == len(raw) and (not self._ascii_only or piece.isascii()):
            word, end = len(piece[:-window].encode()), len(piece[: -window // 2].encode())
            for i in range(int(np.searchsorted(starts, end, side="right")) - 1, -1, -1):
                at = int(starts[i])
                if at < word + _AWAY_FROM_EDGE:
                    break
                if raw[at] & 0xC0 != 0x80 and self._cuts.allows(text, start + (chars := len(raw[:at].decode()))):
                    return i + 1, chars
        raise NoCut(f"a word at character {start:,} that is too long to be encoded whole and cannot be cut")

    def shared_tokens(self, a: str, b: str) -> int:
        """How many characters of `b` the tokens take that both texts begin with."""
        of_a, of_b = self._with_offsets([a, b])
        pairs = enumerate(zip(of_a.ids, of_b.ids, strict=False))
        count = next((i for i, (x, y) in pairs if x != y), min(len(of_a.ids), len(of_b.ids)))
        return int(of_b.offsets[count - 1][1]) if count else 0

    def _with_offsets(self, strings: list[str]) -> Any:
        return self._backend.encode_batch(strings, add_special_tokens=False)

    def _by_widths(self, marked: TextWithSpans, encoding: Any) -> Encoded | None:
        """None where the tokens do not tile the text."""
        assert self._widths is not None
        raw, own = marked.text.encode(), np.array(encoding.ids, dtype=np.int32)
        bounds = np.concatenate(
            [[0], np.cumsum(self._widths[own])]
        )  # token i takes the bytes [bounds[i], bounds[i + 1])
        # No token is wider than its text, so only tokens side by side from one end to the other add up to all of it.
        if (self._ascii_only and len(raw) != len(marked.text)) or bounds[-1] != len(raw):
            return None
        if len(raw) == len(marked.text):
            return self._encoded(own, bounds[:-1], bounds[1:], marked, marked.spans, np.diff(bounds), raw)
        spans = [(len(marked.text[:start].encode()), len(marked.text[:end].encode())) for start, end in marked.spans]
        # A character cut into pieces counts with the first of them, as with offsets: its end is taken for theirs.
        continues = np.append((np.frombuffer(raw, dtype=np.uint8) & 0xC0) == 0x80, False)
        whole = bounds.copy()
        for _ in range(3):
            whole += continues[whole]
        return self._encoded(own, bounds[:-1], bounds[1:], marked, spans, np.diff(whole), raw)

    def _by_offsets(self, marked: TextWithSpans, encoding: Any) -> Encoded:
        own = np.array(encoding.ids, dtype=np.int32)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
        num_bytes = _new_bytes(offsets, marked.text)
        return self._encoded(own, offsets[:, 0], offsets[:, 1], marked, marked.spans, num_bytes, marked.text)

    def _encoded(
        self,
        own: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        marked: TextWithSpans,
        spans: Sequence[tuple[int, int]],
        num_bytes: np.ndarray,
        text: str | bytes,
    ) -> Encoded:
        """`starts`, `ends` [n] and `spans`, those of `marked`, count alike, characters or bytes of `text`."""
        num_bytes[self._is_special[own]] = 0
        return Encoded(own, _supervised(starts, ends, spans, marked.weights, text), num_bytes)


def _part(marked: TextWithSpans | LongText, text: str, start: int, typed: ControlTokens | None) -> TextWithSpans:
    """The piece `text` of a text, from the character `start` on. No control token reaches over its ends."""
    if isinstance(marked, TextWithSpans):
        return marked.part(text, start)
    return TextWithSpans(text, [(0, len(text))], typed=typed.find(text) if typed is not None else ())


def _straddling(
    starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]], text: str | bytes
) -> Iterator[tuple[int, int]]:
    """(token, span) of tokens that lie in a span though they reach over its edge: over its start with more than
    whitespace on the inner side (" word" where the prompt ends with the space), over its end with whitespace alone
    ("<|end|>" that takes the newline)."""
    for number, (start, end) in enumerate(spans):
        first = int(np.searchsorted(starts, start, side="left")) - 1
        if first >= 0 and starts[first] < start < ends[first] <= end and text[start : ends[first]].strip():
            yield first, number
        last = int(np.searchsorted(starts, end, side="left")) - 1
        if last >= 0 and start <= starts[last] < end < ends[last]:
            inner, outer = text[starts[last] : end], text[end : ends[last]]
            if inner.strip() and not outer.strip():
                yield last, number


def _supervised(
    starts: np.ndarray,
    ends: np.ndarray,
    spans: Sequence[tuple[int, int]],
    weights: Sequence[float] | None,
    text: str | bytes,
) -> np.ndarray:
    """[n]: which tokens lie in one of the spans, bool, or the weights of their spans, float32, where one is neither 0
    nor 1. A token that reaches over an edge of a span does not lie in it,
    but as `_straddling` says."""
    if not spans:
        return np.zeros(len(starts), dtype=np.bool_)
    span_starts, span_ends = np.array(spans, dtype=np.int64).T
    span = np.searchsorted(span_starts, starts, side="right") - 1
    inside: np.ndarray = (span >= 0) & (ends <= span_ends[span])
    for token, number in _straddling(starts, ends, spans, text):
        inside[token], span[token] = True, number
    if weights is None:
        return inside
    of_span = np.array(weights, dtype=np.float32)
    if np.isin(of_span, (0, 1)).all():
        inside &= of_span[span] == 1
        return inside
    return np.where(inside, of_span[span], np.float32(0))


def _new_bytes(offsets: np.ndarray, text: str) -> np.ndarray:
    """[n] int64: UTF-8 bytes of the characters that a token covers and no token before it does.

    The tokens of one character cut into pieces all have that character's offsets; the first of them takes its bytes.
    """
    covered = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))  # [n + 1] characters covered before token i
    start = np.clip(offsets[:, 0], covered[:-1], covered[1:])
    before = _bytes_before(text)
    new_bytes: np.ndarray = before[covered[1:]] - before[start]
    return new_bytes


def _bytes_before(text: str) -> np.ndarray:
    """[len(text) + 1] int64: UTF-8 bytes of the characters before each position."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
