"""Files -> samples: what is learned from every row, and the count of every row that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pertoken.data.chat.headers import headers_of, rendered_before
from pertoken.data.chat.render import ChatTemplate, rendered_chat
from pertoken.data.files.long_text import LongText, one_of
from pertoken.data.files.records import BadRow, Record, Span, read_records
from pertoken.data.formats import Conversation, Gives, read_row
from pertoken.data.outcome import Outcome
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.cuts import NoCut
from pertoken.data.tokens.encode import Encoded, Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import bos_of
from pertoken.data.typed import TypedTokens, unknown_counted
from pertoken.errors import DataError, RecipeError
from pertoken.recipe.data import DataConfig
from pertoken.text import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Row", "SampleBuilder"]

# Encoded at a time, by all threads at once: enough to keep them busy, little enough to hold in memory, where a token
# takes over a hundred bytes until it is a number.
_CHUNK_DOCUMENTS = 1000
_CHUNK_CHARS = 500_000
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Row:
    """One sample and where it comes from."""

    tokens: np.ndarray  # [T + 1] int32
    loss_mask: np.ndarray  # [T] bool; float32 weights where one is neither 0 nor 1
    num_bytes: float  # UTF-8 bytes of the supervised text, each times its token's weight
    file: int  # index into the files
    line: int
    digest: int
    is_tail: bool


@dataclass(frozen=True)
class _Document:
    file: int
    line: int
    digest: int
    is_tail: bool
    text: TextWithSpans | LongText
    is_extra: bool = False  # another sample of the same conversation follows: its context is there again

    @property
    def num_chars(self) -> int:
        return len(self.text.text if isinstance(self.text, TextWithSpans) else self.text)


@dataclass(frozen=True)
class SampleBuilder:
    """How rows become samples: everything a worker has to know. Can be pickled."""

    files: tuple[Path, ...]
    data: DataConfig
    encoder: Encoder
    template: ChatTemplate | None  # of fine-tuning
    typed: TypedTokens
    bos_token_id: int | None  # that documents begin with, where the tokenizer adds one
    eos_token_id: int | None  # that documents end with

    @classmethod
    def of(
        cls,
        files: Sequence[Path],
        data: DataConfig,
        *,
        stage: Literal["sft", "pretrain"],
        tokenizer: PreTrainedTokenizerBase,
        encoder: Encoder,
    ) -> SampleBuilder:
        """Raises RecipeError where the tokenizer lacks the template or the eos token that the stage needs."""
        typed = TypedTokens.of(tokenizer, data)
        if stage == "sft":
            return cls(tuple(files), data, encoder, ChatTemplate.of(tokenizer, data), typed, None, None)
        return cls(tuple(files), data, encoder, None, typed, bos_of(tokenizer), _eos(tokenizer))

    def samples(
        self,
        part: Sequence[Span],
        outcome: Outcome,
        *,
        skip: Callable[[BadRow], object],
        on_bytes: Callable[[int], None],
    ) -> Iterator[Row]:
        """The samples of a part's rows, in order. `outcome` is filled on the way.

        With `data.on_bad_row="skip"`, `skip` is called for every bad row. Otherwise, and for overlong rows under
        `data.overlong="error"`, they become the outcome's problems. `on_bytes` is told how many bytes of the part are
        done.
        """
        rows = _Rows(self, outcome, skip)
        for chunk in _chunks(rows.documents(part)):
            for document, encoded in self._encoded(chunk, rows):
                pieces = self._unknown_counted(document, encoded, outcome)
                if self.template is None:
                    yield from _text_samples(document, pieces, self.data.max_seq_len, outcome)
                else:
                    yield from _chat_samples(document, pieces, self.data, str(self.files[document.file]), outcome)
            on_bytes(rows.bytes_done)

    def _encoded(self, chunk: list[_Document], rows: _Rows) -> Iterator[tuple[_Document, Iterator[Encoded]]]:
        """Each document with its tokens, a long one's in pieces; one that there are no tokens for is a bad row."""
        try:
            if len(chunk) == 1 and chunk[0].num_chars >= _CHUNK_CHARS:
                text, typed = chunk[0].text, self.typed.as_text
                pieces = self.encoder.pieces(text, prepend=self.bos_token_id, append=self.eos_token_id, typed=typed)
                yield chunk[0], self._guarded(chunk[0], pieces)
                return
            marked = [document.text for document in chunk if isinstance(document.text, TextWithSpans)]
            assert len(marked) == len(chunk), "a LongText is a chunk by itself"
            encoded = list(self.encoder.encode(marked, prepend=self.bos_token_id, append=self.eos_token_id))
        except (DataError, MemoryError):
            raise
        except Exception as error:  # a tokenizer is a program from elsewhere, and may fail at a text in any way
            if len(chunk) == 1:
                rows.bad(self._bad(chunk[0], error), chunk[0].file)
            else:
                for document in chunk:
                    yield from self._encoded([document], rows)
            return
        for document, whole in zip(chunk, encoded, strict=True):
            yield document, iter([whole])

    def _unknown_counted(self, document: _Document, pieces: Iterator[Encoded], outcome: Outcome) -> Iterator[Encoded]:
        """The pieces. Their unknown tokens are counted as they come."""
        if self.encoder.unknown_id is None:
            return pieces
        text = document.text if isinstance(document.text, TextWithSpans) else None
        return unknown_counted(pieces, self.encoder, text, outcome.findings, document.file, document.line)

    def _guarded(self, document: _Document, pieces: Iterator[Encoded]) -> Iterator[Encoded]:
        """The pieces. Samples of the first ones are written when another one fails, so that is no bad row any more."""
        try:
            yield from pieces
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(str(self._bad(document, error))) from None

    def _bad(self, document: _Document, error: Exception) -> BadRow:
        field = "text" if self.template is None else "conversation"
        problem = f"the tokenizer has no tokens for it ({reason(error)}); choose another, or remove the row"
        if isinstance(error, NoCut):
            problem = f"{error}; split the row, or break its text into lines"
        return BadRow(str(self.files[document.file]), document.line, field, problem)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise RecipeError("data.tokenizer: has no eos token to end a document with; choose one that has")
    return int(tokenizer.eos_token_id)


class _Rows:
    """Reads rows, keeps count of them, and makes documents of the good ones."""

    def __init__(self, builder: SampleBuilder, outcome: Outcome, skip: Callable[[BadRow], object]) -> None:
        self._builder = builder
        self._gives: Gives = "text" if builder.template is None else "conversation"
        self._keys = builder.data.key_names
        self._outcome = outcome
        self._skip = skip
        self._headers: tuple[str, ...] | None = None  # of the chat template, once there is a conversation
        self.bytes_done = 0

    def documents(self, part: Sequence[Span]) -> Iterator[_Document]:
        before = 0
        for span in part:
            for row in read_records(self._builder.files[span.file], span, self._builder.data.text_reading):
                self._outcome.of(span.file).rows += 1
                texts = row if isinstance(row, BadRow) else self._texts(row, span.file)
                if isinstance(row, Record):
                    self.bytes_done = before + max(0, min(row.end, span.stop) - span.start)
                if isinstance(texts, BadRow):
                    self.bad(texts, span.file)
                    continue
                assert isinstance(row, Record)
                for kind in row.findings:
                    self._outcome.findings.add(kind, span.file, row.line)
                split = self._gives == "conversation"
                for number, (text, is_tail) in enumerate(texts, start=1):
                    yield _Document(
                        span.file, row.line, row.digest, is_tail, text, is_extra=split and number < len(texts)
                    )
            before += span.stop - span.start

    def _texts(self, row: Record, file: int) -> Sequence[tuple[TextWithSpans | LongText, bool]] | BadRow:
        """Each text of the row, and whether it is held out as the tail of another."""
        data, template = self._builder.data, self._builder.template
        self._outcome.formats.look(row.value, data.columns)
        read = read_row(row, self._gives, data.format, self._keys)
        if isinstance(read, BadRow):
            return read
        value, unread = read.value, read.unread
        unnamed: tuple[str, ...] = ()
        if read.format is not None:
            self._outcome.formats.add(read.format)
        typed, findings = self._builder.typed, self._outcome.findings
        try:
            if isinstance(value, Conversation):
                assert template is not None, "conversations are for fine-tuning"
                chat, mark = typed.mark(value, findings, file, row.line)
                rendered = rendered_chat(chat, template)
                texts: Sequence[tuple[TextWithSpans | LongText, bool]] = [
                    (typed.unmark(text, mark), False) for text in rendered.samples
                ]
                unnamed = template.unnamed_keys(value)
                if value.weights is not None and read.format in ("messages", "conversations"):
                    findings.add("weighted", file, row.line)
                if any("tool_calls" in message for message in value.messages):
                    findings.add("calls", file, row.line)
                self._headers = headers_of(template) if self._headers is None else self._headers
                if rendered_before(value, self._headers):
                    findings.add("rendered_before", file, row.line)
                for kind, count in (rendered.findings | value.findings()).items():
                    findings.add(kind, file, row.line, count)
                lacks_text = any(_REPLACEMENT in text.text for text in rendered.samples)
            else:
                texts = _texts(typed.document(value, findings, file, row.line), data, typed.as_text)
                lacks_text = one_of(value, (_REPLACEMENT,)) is not None
            if lacks_text:
                findings.add("replacement_characters", file, row.line)
        except ValueError as error:
            field = "conversation" if isinstance(value, Conversation) else "text"
            return BadRow(row.file, row.line, field, str(error))
        if unread:
            self._outcome.unused.add("row", unread, file, row.line)
        if unnamed:
            self._outcome.unused.add("message", unnamed, file, row.line)
        return texts

    def bad(self, row: BadRow, file: int) -> None:
        if self._builder.data.on_bad_row == "skip":
            self._outcome.lost("skipped", file, row.line)
            self._outcome.skipped.add(row)
            self._skip(row)
        else:
            self._outcome.problems.add(row)
            self._outcome.skippable = True


def _texts(
    text: str | LongText, data: DataConfig, typed: ControlTokens | None
) -> list[tuple[TextWithSpans | LongText, bool]]:
    """The document, its tail apart where that is held out."""
    tail_fraction = data.eval_fraction if data.eval_split == "tail" else 0.0
    cut = int(len(text) * (1 - tail_fraction)) if tail_fraction else len(text)
    return [
        (_part(text, start, stop, typed), is_tail)
        for start, stop, is_tail in ((0, cut, False), (cut, len(text), True))
        if start < stop
    ]


def _part(text: str | LongText, start: int, stop: int, typed: ControlTokens | None) -> TextWithSpans | LongText:
    """The characters [start, stop), all of them learned."""
    if isinstance(text, LongText) and stop - start >= _CHUNK_CHARS:
        return text.part(start, stop)
    part = text[start:stop] if isinstance(text, str) else str(text.part(start, stop))
    return TextWithSpans(part, [(0, len(part))], typed=typed.find(part) if typed is not None else ())


def _chunks(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    """Documents in order, together about as much as is encoded at a time; a long one is by itself."""
    chunk: list[_Document] = []
    chars = 0
    for document in documents:
        length = document.num_chars
        if chunk and (len(chunk) == _CHUNK_DOCUMENTS or chars + length > _CHUNK_CHARS):
            yield chunk
            chunk, chars = [], 0
        chunk.append(document)
        chars += length
    if chunk:
        yield chunk


def _text_samples(document: _Document, pieces: Iterator[Encoded], max_seq_len: int, outcome: Outcome) -> Iterator[Row]:
    """Samples that overlap by one token: the last label of one is the first input of the next."""
    held: list[Encoded] = []  # from the first input of the next sample on
    samples = 0
    for piece in pieces:
        held.append(piece)
        if sum(len(part.tokens) for part in held) > max_seq_len:
            whole = _joined(held)
            starts = range(0, len(whole.tokens) - max_seq_len, max_seq_len)
            for start in starts:
                yield _row(document, whole, start, start + max_seq_len)
            held, samples = [_cut(whole, starts[-1] + max_seq_len)], samples + len(starts)
    whole = _joined(held)
    if len(whole.tokens) > 1:
        yield _row(document, whole, 0, len(whole.tokens) - 1)
    elif not samples:
        outcome.lost("too_short", document.file, document.line)


def _joined(pieces: Sequence[Encoded]) -> Encoded:
    if len(pieces) == 1:
        return pieces[0]
    names = ("tokens", "supervised", "num_bytes")
    return Encoded(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in names))


def _cut(whole: Encoded, start: int, stop: int | None = None) -> Encoded:
    return Encoded(whole.tokens[start:stop], whole.supervised[start:stop], whole.num_bytes[start:stop])


def _chat_samples(
    document: _Document, pieces: Iterator[Encoded], data: DataConfig, file: str, outcome: Outcome
) -> Iterator[Row]:
    limit = data.max_seq_len
    kept, num_tokens = [], 0  # what a sample can hold is kept, the rest counted
    for piece in pieces:
        if num_tokens <= limit:
            kept.append(_cut(piece, 0, limit + 1 - num_tokens))
        num_tokens += len(piece.tokens)
    encoded, num_inputs = _joined(kept), num_tokens - 1
    if num_inputs > limit and data.overlong == "error":
        remedy = 'raise it, or set data.overlong to "drop" or "truncate"'
        outcome.problems.add(
            BadRow(file, document.line, "data.max_seq_len", f"{num_inputs} inputs, more than {limit}; {remedy}")
        )
    elif num_inputs > limit and data.overlong == "drop":
        outcome.lost("overlong", document.file, document.line)
    elif not encoded.supervised[1 : min(num_inputs, limit) + 1].any():
        outcome.lost("unsupervised", document.file, document.line)
    else:
        if num_inputs > limit:
            outcome.lost("truncated", document.file, document.line)
        if document.is_extra:
            repeated = int((~encoded.supervised).sum())
            outcome.findings.add("split_tokens", document.file, document.line, repeated)
        yield _row(document, encoded, 0, min(num_inputs, limit))


def _row(document: _Document, encoded: Encoded, start: int, stop: int) -> Row:
    """The sample of inputs [start, stop)."""
    labels = slice(start + 1, stop + 1)
    return Row(
        tokens=encoded.tokens[start : stop + 1],
        loss_mask=encoded.supervised[labels],
        num_bytes=float(encoded.num_bytes[labels] @ encoded.supervised[labels]),
        file=document.file,
        line=document.line,
        digest=document.digest,
        is_tail=document.is_tail,
    )
