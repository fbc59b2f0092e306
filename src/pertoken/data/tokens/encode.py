"""Text -> tokens, each with its place in the text.

Every encoding comes down to byte positions: which bytes of the UTF-8 text a token adds. A byte-level tokenizer's tokens
lie side by side in the text, and so do characters, so the positions follow from the tokens alone; any other tokenizer
is asked for its offsets, which takes longer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.data.batch.sample import Sample
from pertoken.data.files.long_text import LongText, Window
from pertoken.data.tokens.cuts import Cut, Cuts, NoCut
from pertoken.data.tokens.tokenizer import special_ids

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


@dataclass(frozen=True)
class Encoded:
    """A text's n tokens. `supervised` and `num_bytes` are about the token itself, as a label."""

    tokens: np.ndarray  # [n] int32
    supervised: np.ndarray  # [n] bool
    num_bytes: np.ndarray  # [n] int64, UTF-8 bytes of text that the token adds; 0 for a special token

    def sample(self) -> Sample:
        """Inputs and labels. The first token is nobody's label, so its being supervised is lost. Needs n >= 2."""
        return Sample(self.tokens, self.supervised[1:])


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
        self._is_special = np.zeros(max([self._backend.get_vocab_size(), *special, *_ids(self._backend)]) + 1, np.bool_)
        self._is_special[special] = True
        self._widths = _widths(self._backend)  # [V] int64, bytes of text of each token; None: ask for offsets
        self._ascii_only = self._backend.normalizer is not None  # then `_widths` hold in ASCII text alone
        self._cuts: Cuts | None = None
        if self._widths is not None:
            self._cuts = Cuts.of(json.loads(self.to_str()), int(self._widths.max()))

    def to_str(self) -> str:
        """Everything that decides the encoding."""
        return str(self._backend.to_str())

    def encode(self, texts: Sequence[TextWithSpans], *, append: int | None = None) -> Iterator[Encoded]:
        """The tokens of each text, in order. `append` is put, supervised, behind each text's own tokens."""
        strings = [marked.text for marked in texts]
        if self._widths is None:
            for marked, encoding in zip(texts, self._with_offsets(strings), strict=True):
                yield self._by_offsets(marked, encoding, append)
            return
        for marked, encoding in zip(
            texts, self._backend.encode_batch_fast(strings, add_special_tokens=False), strict=True
        ):
            yield self._by_widths(marked, encoding, append) or self._by_offsets(
                marked, self._with_offsets([marked.text])[0], append
            )

    def pieces(self, marked: TextWithSpans | LongText, *, append: int | None = None) -> Iterator[Encoded]:
        """What `encode` gives for one text, in pieces that follow each other, in memory that does not grow with it.

        A LongText is learned whole. Its pieces end with DataError where its file has changed.
        Raises NoCut at once for a text that is too long to be encoded whole and has no place to cut.
        """
        text = marked if isinstance(marked, LongText) else marked.text
        spans = [(0, len(text))] if isinstance(marked, LongText) else marked.spans
        try:
            if self._cuts is None:
                if len(text) > _WHOLE_CHARS:
                    raise NoCut(f"{len(text):,} characters, more than the {_WHOLE_CHARS:,} that can be encoded at once")
                return iter(list(self.encode([TextWithSpans(str(text), spans)], append=append)))
            return self._pieces(text, spans, list(self._cuts.find(text)), append)
        except NoCut:
            if isinstance(text, LongText):
                text.check()  # that there is no cut must be true of the file as it was
            raise

    def _pieces(
        self, text: str | LongText, spans: Sequence[tuple[int, int]], cuts: list[Cut], append: int | None
    ) -> Iterator[Encoded]:
        assert self._cuts is not None
        window, reach = Window(text), self._cuts.reach
        start, first = 0, None  # of the piece; the token that it must start with
        for cut in cuts:
            window.move(max(0, start - reach), cut.at + reach)
            inside = [(max(a, start) - start, min(b, cut.at) - start) for a, b in spans if a < cut.at and b > start]
            piece = TextWithSpans(window.text(start, cut.at), inside)
            if cut is cuts[-1]:
                window.finish()  # before the last piece is given, so that nothing is made of a file that has changed
            (encoded,) = self.encode([piece], append=append if cut is cuts[-1] else None)
            if first is not None and first != encoded.tokens[0]:
                raise NoCut(f"a word at character {start:,} that is too long to be encoded whole and cannot be cut")
            if cut.window is None:
                yield encoded
                start, first = cut.at, None
            else:
                count, width = self._cut_within(piece.text, encoded, cut.window, window, start)
                yield Encoded(encoded.tokens[:count], encoded.supervised[:count], encoded.num_bytes[:count])
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

    def _by_widths(self, marked: TextWithSpans, encoding: Any, append: int | None) -> Encoded | None:
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
            return self._encoded(own, bounds[:-1], bounds[1:], marked.spans, np.diff(bounds), raw, append)
        spans = [(len(marked.text[:start].encode()), len(marked.text[:end].encode())) for start, end in marked.spans]
        # A character cut into pieces counts with the first of them, as with offsets: its end is taken for theirs.
        continues = np.append((np.frombuffer(raw, dtype=np.uint8) & 0xC0) == 0x80, False)
        whole = bounds.copy()
        for _ in range(3):
            whole += continues[whole]
        return self._encoded(own, bounds[:-1], bounds[1:], spans, np.diff(whole), raw, append)

    def _by_offsets(self, marked: TextWithSpans, encoding: Any, append: int | None) -> Encoded:
        own = np.array(encoding.ids, dtype=np.int32)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
        num_bytes = _new_bytes(offsets, marked.text)
        return self._encoded(own, offsets[:, 0], offsets[:, 1], marked.spans, num_bytes, marked.text, append)

    def _encoded(
        self,
        own: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        spans: Sequence[tuple[int, int]],
        num_bytes: np.ndarray,
        text: str | bytes,
        append: int | None,
    ) -> Encoded:
        """`starts`, `ends` [n] and `spans` count alike, characters or bytes of `text`."""
        supervised = _inside(starts, ends, spans)
        _add_straddling(supervised, starts, ends, spans, text)
        num_bytes[self._is_special[own]] = 0
        if append is None:
            return Encoded(own, supervised, num_bytes)
        return Encoded(np.append(own, np.int32(append)), np.append(supervised, True), np.append(num_bytes, 0))


def _ids(backend: Any) -> list[int]:
    return [int(i) for i in backend.get_vocab(with_added_tokens=True).values()]


def _widths(backend: Any) -> np.ndarray | None:
    """[V] int64, how many bytes of the text each token stands for; None unless the tokenizer is byte-level throughout,
    or of characters.

    That is: byte-pair encoding over the 256 signs of the byte-level alphabet, each a token, behind a pre-tokenizer that
    only splits. Then tokens take disjoint pieces of the text, in order, of exactly these widths, except that an added
    token may swallow spaces beside it. A normalizer (NFC, as Qwen's) may rewrite text, but not ASCII.
    """
    from tokenizers import pre_tokenizers

    spec = json.loads(backend.to_str())
    if (of_characters := _character_widths(spec)) is not None:
        return of_characters
    model, first = spec["model"], spec["pre_tokenizer"] or {}
    steps = (first["pretokenizers"] or [{}]) if first.get("type") == "Sequence" else [first]
    splits = all(step["type"] == "Digits" or step.get("behavior", "Removed") != "Removed" for step in steps[:-1])
    if (
        (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC"
        or model["type"] != "BPE"
        or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        or not set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        or steps[-1].get("type") != "ByteLevel"
        or steps[-1]["add_prefix_space"]
        or not splits
    ):
        return None
    widths = np.zeros(max(_ids(backend)) + 1, dtype=np.int64)
    widths[list(model["vocab"].values())] = [len(token) for token in model["vocab"]]
    for token in spec["added_tokens"]:
        widths[token["id"]] = len(token["content"].encode())
    return widths


def _character_widths(spec: dict[str, Any]) -> np.ndarray | None:
    """As `_widths`, of byte-pair encoding without a merge: a token is a character. None for any other tokenizer.

    The token for unknown characters counts as wider than any character, so a text that has one is not tiled.
    """
    model, added = spec["model"], spec["added_tokens"]
    names = {token["content"] for token in added}
    if (
        spec["normalizer"]
        or spec["pre_tokenizer"]
        or model["type"] != "BPE"
        or any(model.get(key) for key in ("merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        or any(model.get(key) for key in ("byte_fallback", "fuse_unk", "ignore_merges"))
        or any(token["lstrip"] or token["rstrip"] or token["normalized"] for token in added)
        or any(len(token) != 1 for token in model["vocab"].keys() - names)
        or len((model["unk_token"] or "").encode()) <= 4
    ):
        return None
    vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    widths[list(vocabulary.values())] = [len(token.encode()) for token in vocabulary]
    return widths


def _add_straddling(
    inside: np.ndarray, starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]], text: str | bytes
) -> None:
    """Set `inside` [n] for tokens that reach over the edge of a span with whitespace alone, or over its start with more
    than whitespace on the inner side: " word" where the prompt ends with the space, "<|end|>" that takes the newline.
    """
    for start, end in spans:
        first = int(np.searchsorted(starts, start, side="left")) - 1
        if first >= 0 and starts[first] < start < ends[first] <= end and text[start : ends[first]].strip():
            inside[first] = True
        last = int(np.searchsorted(starts, end, side="left")) - 1
        if last >= 0 and start <= starts[last] < end < ends[last] and not text[end : ends[last]].strip():
            inside[last] = bool(text[starts[last] : end].strip())


def _inside(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n] bool: which tokens lie in one of the spans. A token that reaches over an edge of a span does not."""
    if not spans:
        return np.zeros(len(starts), dtype=np.bool_)
    span_starts, span_ends = np.array(spans, dtype=np.int64).T
    span = np.searchsorted(span_starts, starts, side="right") - 1
    inside: np.ndarray = (span >= 0) & (ends <= span_ends[span])
    return inside


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
