"""Files -> samples: what is learned from every row, and the count of every row that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pertoken.config import DataConfig
from pertoken.data.chat import ChatTemplate, rendered_chat
from pertoken.data.encode import Encoded, Encoder, Marked
from pertoken.data.formats import to_conversation, to_text
from pertoken.data.records import BadRow, Problems, Record, read_records
from pertoken.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Counts", "Row", "make_samples"]

# Encoded at a time, by all threads at once: enough to keep them busy, little enough to hold in memory.
_CHUNK_DOCUMENTS = 1000
_CHUNK_CHARS = 4_000_000


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0  # rows read, bad ones included
    skipped: int = 0  # bad rows passed over
    overlong: int = 0  # conversations dropped for having more than max_seq_len inputs
    truncated: int = 0  # conversations cut to max_seq_len inputs
    unsupervised: int = 0  # conversations dropped for having no supervised token (left)
    too_short: int = 0  # documents of one token, which predict nothing


@dataclass(frozen=True)
class Row:
    """One sample and where it comes from."""

    tokens: np.ndarray  # [T + 1] int32
    loss_mask: np.ndarray  # [T] bool
    num_bytes: int  # UTF-8 bytes of the supervised text
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
    marked: Marked


def make_samples(
    files: Sequence[Path],
    *,
    stage: Literal["sft", "pretrain"],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    data: DataConfig,
    counts: Counts,
    skip: Callable[[BadRow], object],
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """The samples of all rows, in order. `counts` is filled on the way.

    With `data.on_bad_row="skip"`, `skip` is called for every bad row. Otherwise, and for overlong rows under
    `data.overlong="error"`, DataError is raised at the end, naming the first of them. `on_progress` is told
    (bytes done, bytes in all).
    """
    problems = Problems()
    hint = ""

    def on_bad_row(row: BadRow) -> None:
        nonlocal hint
        if data.on_bad_row == "skip":
            counts.skipped += 1
            skip(row)
        else:
            problems.add(row)
            hint = 'data.on_bad_row="skip" trains on the other rows'

    template = ChatTemplate(tokenizer, data.template_kwargs) if stage == "sft" else None
    eos = _eos(tokenizer) if stage == "pretrain" else None
    done = _Progress([file.stat().st_size for file in files], on_progress)
    for chunk in _chunks(_documents(files, template, data, counts, on_bad_row, done)):
        encoded = encoder.encode([document.marked for document in chunk], append=eos)
        for document, tokens in zip(chunk, encoded, strict=True):
            if stage == "pretrain":
                yield from _text_samples(document, tokens, data.max_seq_len, counts)
            else:
                yield from _chat_samples(document, tokens, data, str(files[document.file]), counts, problems)
        done.report()
    done.report()
    problems.raise_if_any(hint)


class _Progress:
    def __init__(self, sizes: list[int], tell: Callable[[int, int], None] | None) -> None:
        self._before = [0, *np.cumsum(sizes).tolist()]
        self._tell = tell
        self._done = 0

    def at(self, file: int, end: int) -> None:
        self._done = self._before[file] + end

    def report(self) -> None:
        if self._tell is not None:
            self._tell(self._done, self._before[-1])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise RecipeError("data.tokenizer: has no eos token to end a document with; choose one that has")
    return int(tokenizer.eos_token_id)


def _documents(
    files: Sequence[Path],
    template: ChatTemplate | None,
    data: DataConfig,
    counts: Counts,
    on_bad_row: Callable[[BadRow], None],
    done: _Progress,
) -> Iterator[_Document]:
    tail_fraction = data.eval_fraction if data.eval_split == "tail" else 0.0
    for index, file in enumerate(files):
        for row in read_records(file):
            counts.rows += 1
            if isinstance(row, BadRow):
                on_bad_row(row)
                continue
            done.at(index, row.end)
            texts = _texts(row, data, tail_fraction) if template is None else _rendered(row, template, data)
            if isinstance(texts, BadRow):
                on_bad_row(texts)
                continue
            for marked, is_tail in texts:
                yield _Document(index, row.line, row.digest, is_tail, marked)


def _texts(row: Record, data: DataConfig, tail_fraction: float) -> list[tuple[Marked, bool]] | BadRow:
    text = to_text(row, data.text_key)
    if isinstance(text, BadRow):
        return text
    cut = int(len(text) * (1 - tail_fraction)) if tail_fraction else len(text)
    parts = [(text[:cut], False), (text[cut:], True)]
    return [(Marked(part, [(0, len(part))]), is_tail) for part, is_tail in parts if part]


def _rendered(row: Record, template: ChatTemplate, data: DataConfig) -> list[tuple[Marked, bool]] | BadRow:
    chat = to_conversation(row, data.format, prompt_key=data.prompt_key, completion_key=data.completion_key)
    if isinstance(chat, BadRow):
        return chat
    try:
        return [(rendered_chat(chat, template), False)]
    except ValueError as error:
        return BadRow(row.file, row.line, "conversation", str(error))


def _chunks(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    chunk: list[_Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.marked.text)
        if len(chunk) == _CHUNK_DOCUMENTS or chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _text_samples(document: _Document, encoded: Encoded, max_seq_len: int, counts: Counts) -> Iterator[Row]:
    """Samples that overlap by one token: the last label of one is the first input of the next."""
    num_inputs = len(encoded.tokens) - 1
    if not num_inputs:
        counts.too_short += 1
    for start in range(0, num_inputs, max_seq_len):
        yield _row(document, encoded, start, min(start + max_seq_len, num_inputs))


def _chat_samples(
    document: _Document, encoded: Encoded, data: DataConfig, file: str, counts: Counts, problems: Problems
) -> Iterator[Row]:
    num_inputs, limit = len(encoded.tokens) - 1, data.max_seq_len
    if num_inputs > limit and data.overlong == "error":
        remedy = 'raise it, or set data.overlong to "drop" or "truncate"'
        problems.add(
            BadRow(file, document.line, "data.max_seq_len", f"{num_inputs} inputs, more than {limit}; {remedy}")
        )
    elif num_inputs > limit and data.overlong == "drop":
        counts.overlong += 1
    elif not encoded.supervised[1 : min(num_inputs, limit) + 1].any():
        counts.unsupervised += 1
    else:
        counts.truncated += num_inputs > limit
        yield _row(document, encoded, 0, min(num_inputs, limit))


def _row(document: _Document, encoded: Encoded, start: int, stop: int) -> Row:
    """The sample of inputs [start, stop)."""
    labels = slice(start + 1, stop + 1)
    return Row(
        tokens=encoded.tokens[start : stop + 1],
        loss_mask=encoded.supervised[labels],
        num_bytes=int(encoded.num_bytes[labels] @ encoded.supervised[labels]),
        file=document.file,
        line=document.line,
        digest=document.digest,
        is_tail=document.is_tail,
    )
